"""Draw samples from a model into a corpus that can be interrupted, resumed and repaired.

    python generate.py --model DIR --out DIR --num-samples 4096
    python generate.py --model DIR --out DIR --contexts FILE --format gsm8k
    torchrun --standalone --nproc-per-node 2 generate.py --model DIR --out DIR

Context-free samples continue the seed token alone: BOS, or end-of-text where the family has no
BOS (section 3, Table 1 of the paper). Contextual samples answer the fine-tuning data's prompts.
"""

from __future__ import annotations

import functools
from itertools import islice
from pathlib import Path

import torch

from cfs import ranks as process_ranks
from cfs.assets import TINYWORLD_DIR
from cfs.cli import parse, run
from cfs.data.prompts import context_prompts, seed_prompt
from cfs.data.tokenizer import Tokenizer
from cfs.errors import UserError
from cfs.model import load_model, read_config, resolve_checkpoint
from cfs.model.attention import choose_route
from cfs.ranks import Ranks
from cfs.sample.config import (
    CONTEXT_FREE_TEMPERATURE,
    CONTEXTUAL_TEMPERATURE,
    MAX_TOKENS,
    NUM_SAMPLES,
    GenerateConfig,
)
from cfs.sample.corpus import SAMPLES_PER_PART, num_parts, read_manifest, stream_corpus
from cfs.sample.draw import Drawing, Drawn, draw_corpus
from cfs.sample.preview import preview
from cfs.sample.prompts import Prompts
from cfs.sample.sample import SamplingSettings
from cfs.sample.sampler import choose_num_slots
from cfs.sample.settings import CorpusSettings, model_fingerprint
from cfs.sample.statistics import measure, print_statistics


def fitting_max_tokens(config: GenerateConfig, prompts: Prompts, context: int) -> int:
    """--max-tokens, or its default; `UserError` where a prompt and it exceed the context."""
    lengths = prompts.lengths
    longest = int(lengths.max())
    wanted = config.max_tokens or max(1, min(MAX_TOKENS, context - longest))
    if longest + wanted <= context:
        return wanted
    if config.contexts is None:
        what, count, remedy = "the seed", longest, "shorten --seed-text"
    else:
        too_long = lengths + wanted > context
        what = f"{config.contexts}: record {int(too_long.argmax()) + 1}: its prompt"
        count = int(lengths[too_long.argmax()])
        remedy = f"remove the records with longer prompts ({int(too_long.sum())} of {len(prompts)})"
    if longest < context:
        remedy = f"use --max-tokens {context - longest} or less, or {remedy}"
    raise UserError(
        f"{what} has {count} token{'s' * (count > 1)}, which with --max-tokens {wanted} exceeds "
        f"the model's context of {context}; {remedy}"
    )


def generate(config: GenerateConfig, ranks: Ranks) -> None:
    """From flags to a finished corpus and its table. Collective."""
    assert config.out is not None
    directory = resolve_checkpoint(config.model or TINYWORLD_DIR)
    tokenizer = Tokenizer(directory)
    model_config = read_config(directory)
    if config.store_topk > model_config.vocab_size:
        raise UserError(
            f"--store-topk {config.store_topk}: the vocabulary has {model_config.vocab_size} tokens"
        )
    if config.contexts is None:
        prompts = Prompts([seed_prompt(config.seed_text, tokenizer)])
        temperature, num_samples = CONTEXT_FREE_TEMPERATURE, NUM_SAMPLES
    else:
        prompts = context_prompts(config.contexts, config.format, tokenizer)
        temperature = CONTEXTUAL_TEMPERATURE
        num_samples = (config.samples_per_prompt or 1) * len(prompts)
    num_samples = config.num_samples or num_samples
    temperature = temperature if config.temperature is None else config.temperature
    max_tokens = fitting_max_tokens(config, prompts, model_config.max_position_embeddings)
    dtype = config.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32")
    choose_route(config.attention, ranks.device, getattr(torch, dtype))
    is_contextual = config.contexts is not None
    settings = CorpusSettings(
        model=ranks.on_main(lambda: model_fingerprint(directory)),
        tokenizer=tokenizer.fingerprint(),
        num_samples=num_samples,
        prompt_ids=None if is_contextual else prompts.of_sample(0),
        sampling=SamplingSettings(max_tokens, temperature, config.top_p, config.seed),
        dtype=dtype,
        num_prompts=len(prompts),
        prompts=prompts.fingerprint() if is_contextual else None,
        store_topk=config.store_topk,
    )

    @functools.cache
    def prepare() -> Drawing:
        model = load_model(directory, dtype=getattr(torch, dtype), device=ranks.device)
        share = -(-num_parts(num_samples) // ranks.world_size) * SAMPLES_PER_PART
        longest = int(prompts.lengths.max())
        slots = config.batch_size or choose_num_slots(
            model, longest + max_tokens, min(share, num_samples), config.store_topk
        )
        if ranks.is_main:
            kind = f"to {len(prompts):,} prompts" if is_contextual else "context-free"
            print(
                f"{num_samples:,} samples {kind}, at most {max_tokens} tokens each, {slots} at a "
                f"time on {ranks.world_size} rank{'s' * (ranks.world_size > 1)} -> {config.out}",
                flush=True,
            )
        return Drawing(model, tokenizer, prompts, slots, config.attention)

    if not Path(config.out).exists():
        prepare()  # a model that cannot be loaded leaves no directory behind
    drawn = draw_corpus(config.out, settings, prepare, ranks, config.repair)
    ranks.on_main(lambda: report(config, drawn, tokenizer))


def report(config: GenerateConfig, drawn: Drawn, tokenizer: Tokenizer) -> None:
    """Read the corpus once, checking every part, and print what is in it."""
    assert config.out is not None
    statistics = measure(stream_corpus(config.out), read_manifest(config.out)["num_samples"])
    if drawn.repaired:
        more = f" and {len(drawn.repaired) - 8} more" if len(drawn.repaired) > 8 else ""
        state = f"repaired {', '.join(drawn.repaired[:8])}{more}"
    elif drawn.num_samples == 0:
        state = "was already complete, and every part is intact"
    else:
        state = "complete"
    print_statistics(statistics, drawn, f"{config.out}: {state}")
    decode = functools.partial(tokenizer.backend.decode, skip_special_tokens=False)
    for sample in islice(stream_corpus(config.out), config.preview):
        print(preview(sample, decode))


def main() -> None:
    config = parse(GenerateConfig, DESCRIPTION)
    ranks = process_ranks.start(config.device)
    try:
        generate(config, ranks)
    finally:
        process_ranks.finish()


DESCRIPTION = (
    "Draw samples from a model into a corpus: context-free ones, which continue the seed token "
    "alone, or with --contexts answers to the fine-tuning data's prompts. An interrupted corpus "
    "goes on where it stopped when the same command is run again."
)

if __name__ == "__main__":
    run(main, resumes="run again")
