"""Records of every dataset format as (prompt, response) pairs, and as tokenised examples.

No chat template is applied: prompt and response stay two texts, so that the boundary of the loss
is theirs (R1's own template would drop the reasoning from the response).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cfs.data.tokenizer import Tokenizer
from cfs.errors import UserError

Record = tuple[str, str]
"""(prompt, response); the prompt is empty for raw text, whose every token is a target."""


@dataclass(frozen=True)
class Example:
    """One sequence: seed token, prompt, response, end-of-text.

    input_ids    (T,) int64
    target_mask  (T,) bool, True where the token's loss counts; never at the seed token
    number       of the record in its file, counted from 1, or of the sample in its corpus
    """

    input_ids: np.ndarray
    target_mask: np.ndarray
    number: int = 0

    @property
    def num_targets(self) -> int:
        return int(self.target_mask.sum())


# --------------------------------------------------------------------------- record -> (x, y)


def _prompt_response(row: Mapping[str, Any]) -> Record:
    return _text(row, "prompt"), _text(row, "response")


def _plain_text(row: Mapping[str, Any]) -> Record:
    return "", _text(row, "text")


def _messages(row: Mapping[str, Any]) -> Record:
    """A conversation that ends with the assistant; earlier turns are the prompt.

    Rendered plainly, as "User: ...\\nAssistant: ...", since base models know no chat tokens.
    """
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("field 'messages' is not a list of turns")
    turns = [(str(m["role"]), _text(m, "content")) for m in messages]
    if turns[-1][0] != "assistant":
        raise ValueError(f"field 'messages' ends with role {turns[-1][0]!r}; expected 'assistant'")
    history = [f"{role.capitalize()}: {content}" for role, content in turns[:-1]]
    return "\n".join([*history, "Assistant:"]), f" {turns[-1][1]}"


def _gsm8k(row: Mapping[str, Any]) -> Record:
    """As lm-eval's gsm8k task words it, so that training and scoring agree."""
    return f"Question: {_text(row, 'question')}\nAnswer:", f" {_text(row, 'answer')}"


def _metamathqa(row: Mapping[str, Any]) -> Record:
    """The paper's appendix B: "Question : {question}, Answer : {answer}"."""
    return f"Question : {_text(row, 'query')}, Answer :", f" {_text(row, 'response')}"


def _medreason(row: Mapping[str, Any]) -> Record:
    """R1-Distill's own turns, with the reasoning inside <think> (appendix B)."""
    question, options = _text(row, "question"), row.get("options") or ""
    asked = f"{question}\n{options}" if options else question
    thoughts = f"\n{_text(row, 'reasoning')}\n</think>\n\n{_text(row, 'answer')}"
    return f"<｜User｜>{asked}<｜Assistant｜><think>", thoughts


def _tinyworld(row: Mapping[str, Any]) -> Record:
    return _text(row, "prompt"), f" {_text(row, 'answer')}"


FORMATS: dict[str, Callable[[Mapping[str, Any]], Record]] = {
    "prompt-response": _prompt_response,
    "messages": _messages,
    "text": _plain_text,
    "gsm8k": _gsm8k,
    "metamathqa": _metamathqa,
    "medreason": _medreason,
    "tinyworld": _tinyworld,
}


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} is {type(value).__name__}; expected text")
    return value


# ------------------------------------------------------------------------------ file -> records


def read_records(path: str | Path, format_name: str | None, flag: str = "--data") -> list[Record]:
    """Every record of a JSONL, JSON-array or parquet file. `UserError` names file, row, field."""
    if format_name not in FORMATS:
        raise UserError(f"--format {format_name!r} is unknown; known: {', '.join(FORMATS)}")
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{flag} {file}: no such file")
    records = []
    for number, row in _rows(file):
        try:
            prompt, response = FORMATS[format_name](row)
        except KeyError as error:
            raise UserError(
                f"{file}: row {number} has no field {error}, which --format {format_name} needs; "
                f"its fields are {', '.join(map(str, row))}"
            ) from error
        except (ValueError, TypeError) as error:
            raise UserError(f"{file}: row {number}: {error} (--format {format_name})") from error
        if not response.strip():
            raise UserError(f"{file}: row {number} has an empty response; remove the row")
        records.append((prompt, response))
    if not records:
        raise UserError(f"{file}: holds no records")
    return records


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows with their numbers, counted from 1."""
    if file.suffix == ".parquet":
        try:
            yield from enumerate(pq.read_table(file, use_threads=False).to_pylist(), start=1)
        except pa.ArrowInvalid as error:
            raise UserError(f"{file}: not a parquet file ({error})") from error
        return
    if file.suffix == ".json":
        yield from _checked(
            file, enumerate(_parse(file, 1, file.read_text("utf-8", errors="replace")), start=1)
        )
        return
    with file.open(encoding="utf-8") as lines:
        parsed = ((i, _parse(file, i, line)) for i, line in enumerate(lines, 1) if line.strip())
        try:
            yield from _checked(file, parsed)
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text ({error})") from error


def _parse(file: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{file}: row {number} is not valid JSON ({error})") from error


def _checked(
    file: Path, rows: Iterable[tuple[int, Any]]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{file}: row {number} is {type(row).__name__}; expected an object")
        yield number, row


# ------------------------------------------------------------------------- records -> examples


def make_examples(
    records: list[Record], tokenizer: Tokenizer, max_length: int, all_tokens: bool = False
) -> list[Example]:
    """Tokenise: seed, prompt, response, end-of-text, cut to `max_length` tokens.

    The response and the end-of-text are targets; with `all_tokens` the prompt is too (eq. 1 of
    the paper). A cut example has no end-of-text; one whose prompt alone fills it is left out,
    so fewer examples than records may come back.
    """
    pairs = tokenizer.encode_continuations([p for p, _ in records], [r for _, r in records])
    examples = []
    for number, (prompt, response) in enumerate(pairs, start=1):
        ids = [tokenizer.seed_id, *prompt, *response, tokenizer.eos_id][:max_length]
        first_target = 1 if all_tokens else 1 + len(prompt)
        if first_target < len(ids):
            examples.append(make_example(ids, first_target, number))
    if not examples:
        raise UserError(f"--max-length {max_length}: no example has a response within it; raise it")
    return examples


def make_example(ids: list[int] | np.ndarray, first_target: int, number: int = 0) -> Example:
    """The example in which every token from `first_target` on is a target."""
    input_ids = np.asarray(ids, dtype=np.int64)
    return Example(input_ids, np.arange(len(input_ids)) >= first_target, number)
