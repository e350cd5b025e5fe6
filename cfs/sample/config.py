"""Everything `generate.py` can be told, flat; the command line is made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cfs.cli import option
from cfs.errors import UserError
from cfs.model.attention import ATTENTION_HELP

# The paper's (section 3): context-free at temperature 1, contextual at 0.6; both within top-p 0.95.
CONTEXT_FREE_TEMPERATURE, CONTEXTUAL_TEMPERATURE = 1.0, 0.6
TOP_P = 0.95
NUM_SAMPLES = 1024
MOST_SLOTS = 2**16
MAX_TOKENS = 511
"""With the seed token the paper's 512 for OLMo (appendix B)."""


@dataclass(frozen=True)
class GenerateConfig:
    """Flags of `generate.py`, in kebab-case there."""

    out: str | None = option(None, "directory of the corpus; required", "DIR")
    model: str | None = option(
        None, "model directory or hub name; default: embedded TinyWorld", "DIR"
    )

    seed_text: str | None = option(
        None,
        "what every sample continues: bos (the default), newline, space, or any text; it takes "
        "the place of the seed token",
    )
    contexts: str | None = option(
        None, "fine-tuning data whose prompts the samples answer instead, JSONL or parquet", "FILE"
    )
    format: str | None = option(None, "of --contexts, and needed with it; as for train.py", "NAME")

    num_samples: int | None = option(
        None, f"samples to draw; default: {NUM_SAMPLES}, or --samples-per-prompt for each prompt"
    )
    samples_per_prompt: int | None = option(
        None, "answers to each prompt of --contexts, instead of --num-samples; default: 1"
    )
    max_tokens: int | None = option(
        None, f"tokens after the seed or prompt; default: {MAX_TOKENS}, or what the context leaves"
    )
    temperature: float | None = option(
        None,
        f"sampling temperature, 0 is greedy; default: {CONTEXT_FREE_TEMPERATURE}, with --contexts "
        f"{CONTEXTUAL_TEMPERATURE}",
    )
    top_p: float = option(TOP_P, "nucleus probability")
    store_topk: int = option(
        0, "also store the K most probable tokens of each position and the mass of the rest", "K"
    )
    seed: int = option(0, "of the samples; sample i depends on it and on i")

    batch_size: int | None = option(
        None, "samples in progress on each rank; default: as many as fit the memory"
    )
    repair: bool = option(
        False, "check every part of the corpus at --out, and draw damaged or missing ones again"
    )
    preview: int = option(0, "print the first so many samples at the end")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute")
    dtype: Literal["float32", "bfloat16"] | None = option(
        None, "of the computation; default: float32 on CPU, bfloat16 on CUDA"
    )
    attention: Literal["auto", "flash", "varlen", "sdpa"] = option("auto", ATTENTION_HELP)

    def __post_init__(self) -> None:
        if self.out is None:
            raise UserError("--out is needed: the directory that the corpus goes to")
        lowest = {"num_samples": 1, "samples_per_prompt": 1, "batch_size": 1, "max_tokens": 1}
        for name, least in (lowest | {"store_topk": 0, "preview": 0}).items():
            value = getattr(self, name)
            if value is not None and value < least:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {value}: expected at least {least}")
        if (self.batch_size or 0) > MOST_SLOTS:
            raise UserError(f"--batch-size {self.batch_size}: expected at most {MOST_SLOTS}")
        if (self.contexts is None) != (self.format is None):
            raise UserError("--contexts and --format go together: give both or neither")
        if self.contexts is not None and self.seed_text is not None:
            raise UserError(
                "--seed-text is what context-free samples continue, --contexts what contextual "
                "ones do; give one of them"
            )
        if self.samples_per_prompt is not None and self.contexts is None:
            raise UserError("--samples-per-prompt: there are no prompts without --contexts")
        if self.samples_per_prompt is not None and self.num_samples is not None:
            raise UserError(
                "--samples-per-prompt and --num-samples both say how many; give one of them"
            )
