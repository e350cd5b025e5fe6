"""Draw context-free samples from a model: text prompted with its seed token alone.

    python generate.py --model DIR --out DIR --num-samples 4096
    torchrun --standalone --nproc-per-node 2 generate.py --model DIR --out DIR

Run again with the same flags, an interrupted corpus goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from cfs import ranks as process_ranks
from cfs.assets import TINYWORLD_DIR
from cfs.cli import option, parse, run
from cfs.data.tokenizer import Tokenizer
from cfs.errors import UserError
from cfs.model import load_model, resolve_checkpoint
from cfs.sample.context_free import draw_corpus
from cfs.sample.corpus import CorpusSettings, model_fingerprint
from cfs.sample.sampler import SamplingSettings


@dataclass(frozen=True)
class GenerateConfig:
    """Flags of `generate.py`, in kebab-case there."""

    out: str | None = option(None, "directory of the corpus; required")
    model: str | None = option(None, "model directory or hub name; default: embedded TinyWorld")
    num_samples: int = option(1024, "samples to draw")
    max_tokens: int | None = option(None, "tokens after the seed; default: 511, or the context")
    temperature: float = option(1.0, "sampling temperature; 0 is greedy")
    top_p: float = option(0.95, "nucleus probability")
    batch_size: int = option(128, "samples in progress on each rank")
    seed: int = option(0, "of the samples; sample i depends on it and on i")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute")
    dtype: Literal["float32", "bfloat16"] | None = option(
        None, "of the computation; default: float32 on CPU, bfloat16 on CUDA"
    )

    def __post_init__(self) -> None:
        if self.out is None:
            raise UserError("--out is needed: the directory that the corpus goes to")
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {getattr(self, name)}: expected at least 1")


DEFAULT_MAX_TOKENS = 511  # with the seed token the paper's 512 for OLMo (appendix B)


def main() -> None:
    config = parse(GenerateConfig, "Draw context-free samples from a model into a corpus.")
    assert config.out is not None
    ranks = process_ranks.start(config.device)
    try:
        directory = resolve_checkpoint(config.model or TINYWORLD_DIR)
        tokenizer = Tokenizer(directory)
        dtype = config.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32")
        model = load_model(directory, dtype=getattr(torch, dtype), device=ranks.device)
        context = model.config.max_position_embeddings
        max_tokens = config.max_tokens
        if max_tokens is None:
            max_tokens = min(DEFAULT_MAX_TOKENS, context - 1)
        sampling = SamplingSettings(max_tokens, config.temperature, config.top_p, config.seed)
        settings = CorpusSettings(
            model=ranks.on_main(lambda: model_fingerprint(directory)),
            tokenizer=tokenizer.fingerprint(),
            num_samples=config.num_samples,
            prompt_ids=[tokenizer.seed_id],
            sampling=sampling,
            dtype=dtype,
        )
        corpus = draw_corpus(config.out, model, tokenizer, settings, config.batch_size, ranks)
        if ranks.is_main:
            lengths = [len(s.logprob_model) for s in corpus.samples]
            stopped = sum(s.finish_reason == "stop" for s in corpus.samples) / len(lengths)
            print(
                f"{config.out}: {len(lengths)} samples, mean {sum(lengths) / len(lengths):.1f} "
                f"tokens, {stopped:.1%} ended by end-of-text"
            )
    finally:
        process_ranks.finish()


if __name__ == "__main__":
    run(main)
