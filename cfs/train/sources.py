"""What a run trains on: the task, the samples mixed in, and those that measure the KL."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from cfs.data import tinyworld
from cfs.data.formats import FORMATS, Example, Record, make_example, read_records
from cfs.data.tokenizer import Tokenizer
from cfs.errors import UserError
from cfs.model import Decoder
from cfs.ranks import Ranks
from cfs.sample.corpus import Corpus, read_corpus
from cfs.sample.draw import Drawing, draw_corpus
from cfs.sample.prompts import Prompts
from cfs.sample.sample import SamplingSettings
from cfs.sample.sampler import choose_num_slots
from cfs.sample.settings import CorpusSettings, model_fingerprint
from cfs.train.config import TrainConfig
from cfs.train.kl import HeldOutSamples

HELD_OUT_SEED = 2**32
"""Added to the run's seed for the samples that measure the KL, so that training never sees them."""
TINYWORLD_TASK_EXAMPLES = 6000


def task_records(config: TrainConfig) -> list[Record]:
    """The fine-tuning data; TinyWorld's come from its generator, by the run's seed."""
    if config.data is not None:
        return read_records(config.data, config.format)
    if config.method_spec.from_scratch:
        count = config.steps * config.batch_size  # every document is met once
        return [("", text) for text in tinyworld.pretraining_documents(count, config.seed)]
    items = tinyworld.task_items(TINYWORLD_TASK_EXAMPLES, config.seed)
    return [FORMATS["tinyworld"](asdict(item)) for item in items]


def synthetic_examples(
    config: TrainConfig,
    directory: Path,
    base: Decoder,
    tokenizer: Tokenizer,
    count: int,
    ranks: Ranks,
) -> list[Example]:
    """`count` context-free samples of the base, every token after the seed a target."""
    if count < 1:
        raise UserError(
            f"--synthetic-ratio {config.synthetic_ratio}: is less than one sample; raise it, or "
            "use --method ft"
        )
    if config.synthetic is None:
        sampling = SamplingSettings(
            config.max_length - 1, config.temperature, config.top_p, config.seed
        )
        corpus = cached_corpus(config, directory, base, tokenizer, count, sampling, ranks)
    else:
        corpus = read_corpus(config.synthetic)
        fingerprint = ranks.on_main(lambda: model_fingerprint(directory))
        if corpus.manifest["settings"]["model"] != fingerprint:
            raise UserError(
                f"--synthetic {config.synthetic}: was drawn from another model than {directory}; "
                "the method needs samples of the model it starts from"
            )
        if len(corpus.samples) < count:
            raise UserError(
                f"--synthetic {config.synthetic}: holds {len(corpus.samples)} samples; "
                f"--synthetic-ratio {config.synthetic_ratio} asks for {count}"
            )
    return [
        make_example(s.input_ids[: config.max_length], s.num_prompt_tokens)
        for s in corpus.samples[:count]
    ]


def held_out_samples(
    config: TrainConfig, directory: Path, base: Decoder, tokenizer: Tokenizer, ranks: Ranks
) -> HeldOutSamples:
    """Samples of the base at temperature 1 and top-p 1, of which the KL estimate is unbiased."""
    sampling = SamplingSettings(
        config.max_length - 1, temperature=1.0, top_p=1.0, seed=HELD_OUT_SEED + config.seed
    )
    corpus = cached_corpus(config, directory, base, tokenizer, config.kl_samples, sampling, ranks)
    return HeldOutSamples(
        [make_example(s.input_ids, s.num_prompt_tokens) for s in corpus.samples],
        np.array([s.logprob_model.sum(dtype=np.float64) for s in corpus.samples]),
    )


def cached_corpus(
    config: TrainConfig,
    directory: Path,
    base: Decoder,
    tokenizer: Tokenizer,
    num_samples: int,
    sampling: SamplingSettings,
    ranks: Ranks,
) -> Corpus:
    """The corpus of these settings under --corpora, drawn by this run if no earlier one did."""
    settings = CorpusSettings(
        model=ranks.on_main(lambda: model_fingerprint(directory)),
        tokenizer=tokenizer.fingerprint(),
        num_samples=num_samples,
        prompt_ids=[tokenizer.seed_id],
        sampling=sampling,
        dtype=str(base.embed_tokens.weight.dtype).removeprefix("torch."),
    )
    place = Path(config.corpora) / settings.fingerprint()
    slots = choose_num_slots(base, 1 + sampling.max_tokens, num_samples)
    drawing = Drawing(base, tokenizer, Prompts([[tokenizer.seed_id]]), slots)
    draw_corpus(place, settings, lambda: drawing, ranks)
    return read_corpus(place)
