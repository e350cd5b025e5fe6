"""What a run trains on: the task, the samples mixed in, and those that measure the KL."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from cfs.data import tinyworld
from cfs.data.formats import FORMATS, Example, Record, make_example, make_examples, read_records
from cfs.data.mixture import Source
from cfs.data.tokenizer import Tokenizer
from cfs.errors import UserError
from cfs.model import Decoder
from cfs.ranks import Ranks
from cfs.sample.prompts import Prompts
from cfs.sample.sample import Sample, SamplingSettings
from cfs.train.config import TrainConfig
from cfs.train.draws import Draws
from cfs.train.kl import HeldOutSamples, sequence_logprobs

HELD_OUT_SEED, FISHER_SEED = 2**32, 2**33
"""Added to the run's seed for the samples that measure the KL and the Fisher information, so that
training never sees them."""
TINYWORLD_TASK_EXAMPLES = 6000


@dataclass(frozen=True)
class TaskData:
    """The fine-tuning data as the mixture takes it, and what became of its records."""

    sources: list[Source]
    num_records: int
    num_cut: int
    """Examples that `--max-length` cut."""

    @property
    def num_examples(self) -> int:
        return sum(len(source.examples) for source in self.sources)


def task_data(config: TrainConfig, tokenizer: Tokenizer) -> TaskData:
    """Read and tokenise the task; interleaved files share an epoch by their weights.

    An epoch draws as many examples as all files hold together, of each file its share.
    """
    all_tokens = any(method.all_tokens for method in config.methods)
    parts = [
        (name, weight, records, make_examples(records, tokenizer, config.max_length, all_tokens))
        for name, weight, records in task_records(config)
    ]
    num_examples = sum(len(examples) for *_, examples in parts)
    total = sum(weight or 0.0 for _, weight, *_ in parts)
    sources = [
        Source(
            f"{name} record",
            examples,
            per_epoch=None if weight is None else max(1, round(weight / total * num_examples)),
        )
        for name, weight, _, examples in parts
    ]
    cut = sum(int(e.input_ids[-1]) != tokenizer.eos_id for s in sources for e in s.examples)
    return TaskData(sources, sum(len(records) for _, _, records, _ in parts), cut)


def task_records(config: TrainConfig) -> list[tuple[str, float | None, list[Record]]]:
    """Name, weight if it is interleaved, and records of each task file.

    TinyWorld's come from its generator, by the run's seed.
    """
    if config.interleave is not None:
        return [
            (Path(file).name, weight, read_records(file, format_name, flag="--interleave"))
            for file, format_name, weight in map(parse_interleaved, config.interleave)
        ]
    if config.data is not None:
        return [(Path(config.data).name, None, read_records(config.data, config.format))]
    if config.from_scratch:
        count = config.steps * config.batch_size  # every document is met once
        documents = tinyworld.pretraining_documents(count, config.seed)
        return [("TinyWorld", None, [("", text) for text in documents])]
    items = tinyworld.task_items(TINYWORLD_TASK_EXAMPLES, config.seed, config.skill)
    return [("TinyWorld", None, [FORMATS["tinyworld"](asdict(item)) for item in items])]


def parse_interleaved(text: str) -> tuple[str, str, float]:
    """File, format and weight of one FILE:FORMAT=WEIGHT."""
    named = re.fullmatch(r"(.+):([\w-]+)=([0-9.eE+-]+)", text)
    try:
        weight = float(named[3]) if named else 0.0
    except ValueError:
        weight = 0.0
    if named is None or not 0 < weight < math.inf:
        raise UserError(
            f"--interleave {text}: expected FILE:FORMAT=WEIGHT with a weight above 0, "
            "such as train.jsonl:gsm8k=0.3"
        )
    return named[1], named[2], weight


def held_out_samples(
    config: TrainConfig, directory: Path, base: Decoder, tokenizer: Tokenizer, ranks: Ranks
) -> HeldOutSamples:
    """Samples of the base at temperature 1 and top-p 1, of which the KL estimate is unbiased."""
    samples = unconditional_samples(
        config, directory, base, tokenizer, config.kl_samples, HELD_OUT_SEED, ranks
    )
    return HeldOutSamples(
        [make_example(s.input_ids, s.num_prompt_tokens) for s in samples],
        np.array([s.logprob_model.sum(dtype=np.float64) for s in samples]),
    )


def fisher_samples(
    config: TrainConfig,
    directory: Path,
    base: Decoder,
    tokenizer: Tokenizer,
    count: int,
    ranks: Ranks,
) -> list[Example]:
    """Samples of the base at temperature 1 and top-p 1, for its Fisher information."""
    samples = unconditional_samples(config, directory, base, tokenizer, count, FISHER_SEED, ranks)
    return [make_example(s.input_ids, s.num_prompt_tokens, s.index) for s in samples]


def unconditional_samples(
    config: TrainConfig,
    directory: Path,
    base: Decoder,
    tokenizer: Tokenizer,
    count: int,
    seed: int,
    ranks: Ranks,
) -> list[Sample]:
    """x ~ p_theta*: after the seed token alone, at temperature 1 and top-p 1."""
    sampling = SamplingSettings(
        config.max_length - 1, temperature=1.0, top_p=1.0, seed=seed + config.seed
    )
    drawn = Draws(Path(config.corpora), directory, base, tokenizer, ranks)
    return drawn.corpus(Prompts([[tokenizer.seed_id]]), sampling, count).samples


def mean_nlls(
    base: Decoder, sources: list[Source], config: TrainConfig, ranks: Ranks
) -> list[np.ndarray]:
    """For each source (num_examples,) float64: each example's mean over targets of -log p_theta*.

    Collective.
    """
    found = []
    for source in sources:
        ids, logprobs = sequence_logprobs(base, source.examples, config.micro_batch_tokens, ranks)
        values = np.empty(len(source.examples))
        for part_ids, part in ranks.gather((ids, logprobs)):
            values[part_ids] = -part
        found.append(values / [example.num_targets for example in source.examples])
    return found


def weighted(sources: list[Source], weights: np.ndarray) -> list[Source]:
    """The sources with a weight for each example, in the order of them all."""
    cuts = np.cumsum([len(source.examples) for source in sources])[:-1]
    parts = np.split(weights, cuts)
    return [replace(source, weights=part) for source, part in zip(sources, parts, strict=True)]
