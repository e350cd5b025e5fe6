"""Samples as text that is safe to print."""

from __future__ import annotations

import sys
from collections.abc import Callable

from cfs.sample.sample import Sample


def preview(sample: Sample, decode: Callable[[list[int]], str]) -> str:
    """A sample for a terminal: prompt and text apart, nothing obeyed.

    decode  ids to text, best with the special tokens

    Whatever is not printable is escaped: control and formatting characters can move the cursor,
    retitle the window or reorder what is read. So is what the terminal's encoding lacks.
    """
    encoding = sys.stdout.encoding or "utf-8"

    def shown(ids: list[int]) -> str:
        lines = (
            "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
            for line in decode(ids).split("\n")
        )
        return "\n    ".join(lines).encode(encoding, "backslashreplace").decode(encoding)

    ids, num_prompt = sample.input_ids.tolist(), sample.num_prompt_tokens
    return (
        f"\nsample {sample.index} ({len(ids) - num_prompt} tokens, {sample.finish_reason})\n"
        f"  prompt:\n    {shown(ids[:num_prompt])}\n  text:\n    {shown(ids[num_prompt:])}"
    )
