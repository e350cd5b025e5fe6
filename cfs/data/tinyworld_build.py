"""Write what TinyWorld ships: tokenizer, model config and the skills' test items.

    python -m cfs.data.tinyworld_build

Deterministic; run again it writes the same files. The base's weights come from
`train.py --method pretrain` (docs/tinyworld.md).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from cfs.data import tinyworld

PACKAGE = Path(__file__).parent.parent
END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 1024
TEST_ITEMS = 200

MODEL_CONFIG = {
    "architectures": ["OlmoForCausalLM"],
    "model_type": "olmo",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "clip_qkv": None,
    "bos_token_id": None,
    "torch_dtype": "float32",
}

FINAL_ANSWER = r"The answer is (-?\d+)\."
"""What is scored of a worked answer."""

CHOICE_TASK = """task: tinyworld_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: "{{{{choices.index(answer)}}}}"
metric_list:
  - metric: acc
"""
GENERATION_TASK = """task: tinyworld_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: {target}
generation_kwargs:
  until: ["\\n"]
  do_sample: false
  max_gen_toks: 64
filter_list:
  - name: answer
    filter:
      - function: regex
        regex_pattern: '{pattern}'
      - function: take_first
metric_list:
  - metric: exact_match
"""


def train_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE whose tokens are words and single digits, with the space before them."""
    pieces = Regex(r" ?\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]|\s+")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [*tinyworld.pretraining_documents(20_000, seed=1)]
    texts += [item.text for item in tinyworld.task_items(5_000, seed=1)]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_model_files(directory: Path) -> None:
    """config.json and the tokenizer files, everything but the weights."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    eos_id = tokenizer.token_to_id(END_OF_TEXT)
    config = MODEL_CONFIG | {
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
    }
    _write_json(directory / "config.json", config)
    _write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT},
    )


def write_tasks(directory: Path) -> None:
    """An lm-eval task file and its test items for every skill."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in (*tinyworld.OLD_SKILLS, *tinyworld.NEW_SKILLS):
        items = tinyworld.test_items(name, TEST_ITEMS)
        rows = []
        for item in items:
            row: dict[str, object] = {"prompt": item.prompt, "answer": item.answer}
            if item.choices:
                row["choices"] = list(item.choices)
            if final := re.search(FINAL_ANSWER, item.answer):
                row["final"] = final[1]
            rows.append(json.dumps(row))
        (directory / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        if items[0].choices:
            task = CHOICE_TASK.format(name=name)
        elif re.search(FINAL_ANSWER, items[0].answer):
            task = GENERATION_TASK.format(name=name, target="final", pattern=FINAL_ANSWER)
        else:
            task = GENERATION_TASK.format(name=name, target="answer", pattern=r"^\s*(.*)$")
        (directory / f"{name}.yaml").write_text(task, encoding="utf-8")


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_model_files(PACKAGE / "assets" / "tinyworld")
    write_tasks(PACKAGE / "eval" / "tasks" / "tinyworld")
