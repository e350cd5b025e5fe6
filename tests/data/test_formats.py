"""Records and examples: what is a target, and what is said of bad data."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cfs.data.formats import FORMATS, make_example, make_examples, read_records
from cfs.data.tokenizer import Tokenizer
from cfs.errors import UserError
from tests.conftest import SHARED_DATA

ROWS = {
    "prompt-response": ({"prompt": "a", "response": "b"}, ("a", "b")),
    "text": ({"text": "abc"}, ("", "abc")),
    "gsm8k": ({"question": "q?", "answer": "x #### 1"}, ("Question: q?\nAnswer:", " x #### 1")),
    "metamathqa": ({"query": "q?", "response": "r"}, ("Question : q?, Answer :", " r")),
    "medreason": (
        {"question": "q?", "options": "A. x", "reasoning": "so", "answer": "A"},
        ("<｜User｜>q?\nA. x<｜Assistant｜><think>", "\nso\n</think>\n\nA"),
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
        ("User: q\nAssistant:", " r"),
    ),
    "tinyworld": ({"prompt": "Copy: a =", "answer": "a"}, ("Copy: a =", " a")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_reads_its_record(name: str, tmp_path: Path) -> None:
    """Catches a prompt that differs from the published protocol; JSONL and parquet agree."""
    row, record = ROWS[name]
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n\n")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "d.parquet")
    assert read_records(tmp_path / "d.jsonl", name) == [record]
    assert read_records(tmp_path / "d.parquet", name) == [record]


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ('{"question": "q"}', "gsm8k", "row 1 has no field 'answer'"),
        ('{"question": "q", "answer": 3}', "gsm8k", "row 1: field 'answer' is int"),
        ('{"question": "q", "answer": " "}', "gsm8k", "row 1 has an empty response"),
        ('{"text": "a"}\n{"text": ', "text", "row 2 is not valid JSON"),
        ("[1]", "text", "row 1 is list"),
        ("", "text", "holds no records"),
        ('{"text": "a"}', "alpaca", "'alpaca' is unknown"),
        ('{"messages": []}', "messages", "row 1"),
        ('{"messages": [{"role": "user", "content": "q"}]}', "messages", "ends with role 'user'"),
    ],
)
def test_bad_data_is_named(content: str, name: str, said: str, tmp_path: Path) -> None:
    """Catches a KeyError without the file, row and field."""
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(UserError) as caught:
        read_records(tmp_path / "d.jsonl", name)
    assert said in str(caught.value)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="not a parquet file"):
        read_records(tmp_path / "d.parquet", "text")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "caf\xe9"}'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_records(tmp_path / "latin.jsonl", "text")
    with pytest.raises(UserError, match="no such file"):
        read_records(tmp_path / "gone.jsonl", "text")


def test_targets_are_the_response_and_end_of_text(tinyworld: Path) -> None:
    """Catches loss on the prompt, a lost end-of-text, a second seed token."""
    tokenizer = Tokenizer(tinyworld)
    (example,) = make_examples([("Copy: lamp =", " lamp")], tokenizer, 64)
    prompt, response = tokenizer.encode("Copy: lamp ="), tokenizer.encode(" lamp")
    ids = [tokenizer.seed_id, *prompt, *response, tokenizer.eos_id]
    assert example.input_ids.tolist() == ids
    assert example.target_mask.tolist() == [False] * (1 + len(prompt)) + [True] * (
        len(response) + 1
    )
    (example,) = make_examples([("Copy: lamp =", " lamp")], tokenizer, 64, all_tokens=True)
    assert example.target_mask.tolist() == [False] + [True] * (len(ids) - 1)


def test_exactly_one_seed_token_where_the_tokenizer_would_add_its_own(stories260k: Path) -> None:
    """Catches the double BOS that Llama tokenizers add by themselves."""
    tokenizer = Tokenizer(stories260k)
    assert (tokenizer.seed_id, tokenizer.eos_id) == (1, 2)
    (example,) = make_examples([("Once upon", " a time")], tokenizer, 64)
    assert example.input_ids.tolist().count(tokenizer.seed_id) == 1
    assert example.input_ids[0] == tokenizer.seed_id
    assert example.input_ids[-1] == tokenizer.eos_id


def test_no_space_is_added_between_prompt_and_response(stories260k: Path) -> None:
    """Catches the second space that SentencePiece-like tokenizers put before a lone text: the
    model would learn tokens that its prompt never leads to."""
    tokenizer = Tokenizer(stories260k)
    (example,) = make_examples([("Answer:", " 42")], tokenizer, 64)
    whole = tokenizer.encode("Answer: 42")
    assert example.input_ids.tolist() == [tokenizer.seed_id, *whole, tokenizer.eos_id]
    assert example.num_targets == len(whole) - len(tokenizer.encode("Answer:")) + 1


def test_settings_saved_in_the_tokenizer_file_are_ignored(tinyworld: Path, tmp_path: Path) -> None:
    """Catches texts cut and padded because somebody saved a tokenizer while it did so."""
    tokenizer = Tokenizer(tinyworld)
    tokenizer.backend.enable_truncation(4)
    tokenizer.backend.enable_padding(length=6)
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert Tokenizer(tmp_path).encode("lamp " * 9) == Tokenizer(tinyworld).encode("lamp " * 9)


def test_cutting_to_length(tinyworld: Path) -> None:
    """Catches a cut example that claims to end, and one without any target."""
    tokenizer = Tokenizer(tinyworld)
    records = [("Copy: lamp =", " lamp lamp lamp"), ("Copy: " + "lamp " * 50, " lamp")]
    (example,) = make_examples(records, tokenizer, 7)
    assert len(example.input_ids) == 7
    assert example.input_ids[-1] != tokenizer.eos_id
    with pytest.raises(UserError, match="--max-length 3"):
        make_examples(records, tokenizer, 3)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs shared/data beside the repository")
@pytest.mark.parametrize(
    ("file", "seed_id"),
    [
        ("allenai_gpt-neox-olmo-dolma-v1_5.json", 50279),
        ("allenai_eleuther-ai-gpt-neox-20b-pii-special.json", 0),
    ],
)
def test_olmo_starts_with_end_of_text(file: str, seed_id: int, tmp_path: Path) -> None:
    """Catches id 0, which is |||IP_ADDRESS||| in OLMo-1B's tokenizer, taken for its seed."""
    source = SHARED_DATA / "tokenizer_olmo1b" / file
    (tmp_path / "tokenizer.json").write_bytes(source.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.seed_id == tokenizer.eos_id == seed_id
    assert tokenizer.num_tokens == 50280


def test_special_tokens_from_config_ids(stories260k: Path, tmp_path: Path) -> None:
    """Catches ignoring config.json where no tokenizer_config.json exists, and lists of ids."""
    (tmp_path / "tokenizer.json").write_bytes((stories260k / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="no end-of-text"):
        Tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": [2, 1], "bos_token_id": 1}')
    assert (Tokenizer(tmp_path).seed_id, Tokenizer(tmp_path).eos_id) == (1, 2)
    (tmp_path / "config.json").write_text('{"eos_token_id": 9999}')
    with pytest.raises(UserError, match="9999 is not in"):
        Tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 2, "vocab_size": 100}')
    with pytest.raises(UserError, match="a vocab_size of 100"):
        Tokenizer(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nope>"}')
    with pytest.raises(UserError, match="'<nope>' is not in"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizers file"):
        Tokenizer(tmp_path)


def test_context_free_example_trains_on_all_but_the_seed() -> None:
    """Catches a context-free sample whose first token is free of charge."""
    example = make_example([7, 1, 2, 3], 1)
    assert example.target_mask.tolist() == [False, True, True, True]
    assert example.num_targets == 3
