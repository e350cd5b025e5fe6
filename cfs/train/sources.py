"""What a run trains on: the task, the samples mixed in, and those that measure the KL."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cfs.data import tinyworld
from cfs.data.formats import FORMATS, Example, Record, make_example, make_examples, read_records
from cfs.data.mixture import Source
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
    all_tokens = config.method_spec.all_tokens
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
    if config.method_spec.from_scratch:
        count = config.steps * config.batch_size  # every document is met once
        documents = tinyworld.pretraining_documents(count, config.seed)
        return [("TinyWorld", None, [("", text) for text in documents])]
    items = tinyworld.task_items(TINYWORLD_TASK_EXAMPLES, config.seed)
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
        make_example(s.input_ids[: config.max_length], s.num_prompt_tokens, s.index)
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
