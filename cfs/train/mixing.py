"""What methods mix in beside the task's examples: samples of the base, or stored text.

`SOURCES` names a function for each kind of `Mix` (`cfs/baselines/`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from cfs.assets import TINYWORLD_DIR
from cfs.baselines import Mix, ssr
from cfs.baselines.clusters import nearest_to_centroids
from cfs.data import tinyworld
from cfs.data.formats import (
    FORMATS,
    Example,
    Record,
    make_example,
    make_examples,
    read_records,
)
from cfs.data.mixture import Source
from cfs.data.tokenizer import Tokenizer
from cfs.errors import UserError
from cfs.model.packed_attention import PackedBatch
from cfs.sample.corpus import Corpus, read_corpus
from cfs.sample.prompts import Prompts
from cfs.sample.sample import Sample, SamplingSettings
from cfs.sample.settings import model_fingerprint
from cfs.train.config import PRETRAIN_DEFAULTS, TrainConfig
from cfs.train.draws import Draws

TINYWORLD_SHOWN = 10
"""Demonstrations of each old skill."""
EMBEDDED_TOKENS = 4096
"""Of a forward pass."""


@dataclass(frozen=True)
class Mixing:
    """A run's need of examples beside its task's.

    task   the task's examples
    count  how many are to stand beside them
    """

    config: TrainConfig
    mix: Mix
    draws: Draws
    task: list[Example]
    count: int

    def sampling(self, max_tokens: int) -> SamplingSettings:
        """By the flags, or as the method does by default."""
        config, mix = self.config, self.mix
        assert mix.temperature is not None, "only what is sampled asks"
        assert mix.top_p is not None
        return SamplingSettings(
            max_tokens,
            mix.temperature if config.temperature is None else config.temperature,
            mix.top_p if config.top_p is None else config.top_p,
            config.seed,
        )

    def room(self, prompts: Prompts) -> int:
        """Tokens that may follow the longest prompt within the model's context."""
        context = self.draws.base.config.max_position_embeddings
        return min(self.config.max_length - 1, context - int(prompts.lengths.max()))


def mixed_sources(config: TrainConfig, draws: Draws, task: list[Source]) -> list[Source]:
    """A source for each `Mix` of the run's method, in proportion to the task. Collective."""
    examples = [example for source in task for example in source.examples]
    sources = []
    for mix in config.mixes:
        count = round(config.synthetic_ratio * len(examples))
        if count < 1:
            raise UserError(
                f"--synthetic-ratio {config.synthetic_ratio}: is less than one {mix.what}; raise "
                "it, or use --method ft"
            )
        found = SOURCES[mix.kind](Mixing(config, mix, draws, examples, count))
        sources.append(Source(mix.what, found, synthetic=True))
    return sources


# --------------------------------------------------------------------------------- cfs, and cs


def context_free(mixing: Mixing) -> list[Example]:
    """Samples of the base after its seed token alone, every token after it a target."""
    config = mixing.config
    if config.synthetic is not None:
        corpus = _given_corpus(mixing, is_contextual=False)
    else:
        prompts = Prompts([[mixing.draws.tokenizer.seed_id]])
        corpus = mixing.draws.corpus(prompts, mixing.sampling(config.max_length - 1), mixing.count)
    return _examples_of(corpus, mixing)


def contextual(mixing: Mixing) -> list[Example]:
    """The base's answers to the task's prompts in turn, the answers targets."""
    if mixing.config.synthetic is not None:
        return _examples_of(_given_corpus(mixing, is_contextual=True), mixing)
    prompts = Prompts(_prompt_ids(example) for example in mixing.task)
    corpus = mixing.draws.corpus(prompts, mixing.sampling(mixing.room(prompts)), mixing.count)
    return _examples_of(corpus, mixing)


def _prompt_ids(example: Example) -> list[int]:
    """Seed token and prompt of a task example."""
    return example.input_ids[: int(example.target_mask.argmax())].tolist()


def _examples_of(corpus: Corpus, mixing: Mixing) -> list[Example]:
    """Every generated token a target, but for what `--max-length` cuts."""
    length = mixing.config.max_length
    examples = [
        make_example(s.input_ids[:length], s.num_prompt_tokens, s.index)
        for s in corpus.samples[: mixing.count]
        if s.num_prompt_tokens < length
    ]
    if not examples:
        raise UserError(f"--max-length {length}: no {mixing.mix.what} begins within it; raise it")
    return examples


def _given_corpus(mixing: Mixing, is_contextual: bool) -> Corpus:
    """`--synthetic`, if it is of this model and kind, and large enough."""
    config, flag = mixing.config, f"--synthetic {mixing.config.synthetic}"
    assert config.synthetic is not None
    corpus = read_corpus(config.synthetic)
    settings = corpus.manifest["settings"]
    directory = mixing.draws.directory
    if settings["model"] != mixing.draws.ranks.on_main(lambda: model_fingerprint(directory)):
        raise UserError(
            f"{flag}: was drawn from another model than {directory}; the method needs samples of "
            "the model it starts from"
        )
    if (settings["prompt_ids"] is None) != is_contextual:
        kinds = ("answers to prompts", "context-free samples")
        there, wanted = kinds if not is_contextual else kinds[::-1]
        raise UserError(
            f"{flag}: holds {there}; --method {config.method} needs {wanted} (generate.py "
            f"{'with' if is_contextual else 'without'} --contexts)"
        )
    if len(corpus.samples) < mixing.count:
        raise UserError(
            f"{flag}: holds {len(corpus.samples)} samples; --synthetic-ratio "
            f"{config.synthetic_ratio} asks for {mixing.count}"
        )
    return corpus


# -------------------------------------------------------------------------------------- replay


def replay(mixing: Mixing) -> list[Example]:
    """Raw text that the base was pretrained on, every token a target."""
    config, tokenizer = mixing.config, mixing.draws.tokenizer
    file, format_name = config.method_option("replay_data"), config.method_option("replay_format")
    if file is not None:
        records = read_records(file, format_name, flag="--replay-data")
        if len(records) < mixing.count:
            raise UserError(
                f"--replay-data {file}: holds {len(records)} records; --synthetic-ratio "
                f"{config.synthetic_ratio} asks for {mixing.count}"
            )
        chosen = np.random.default_rng([config.seed, 2]).permutation(len(records))
        records = [records[i] for i in sorted(chosen[: mixing.count])]
    elif _is_of_tinyworld(mixing):
        records = [("", text) for text in _pretraining_text(mixing.count, config.seed)]
    else:
        raise UserError(
            "--method replay: needs --replay-data, a file of the text that the model was "
            "pretrained on"
        )
    return make_examples(records, tokenizer, config.max_length, all_tokens=True)


def _pretraining_text(count: int, seed: int) -> list[str]:
    """Documents that the embedded base met in its pretraining; others for each seed."""
    met = PRETRAIN_DEFAULTS["steps"] * PRETRAIN_DEFAULTS["batch_size"]
    first = seed * count % max(1, met - count)
    documents = tinyworld.pretraining_documents(met, seed=0)
    return list(itertools.islice(documents, first, first + count))


# ----------------------------------------------------------------------------------------- ssr


def rehearsal(mixing: Mixing) -> list[Example]:
    """Instances that the base has written after demonstrations, and answered; the answers targets.

    Source: the steps of `baselines/ssr.py`.
    """
    config, draws, tokenizer = mixing.config, mixing.draws, mixing.draws.tokenizer
    records = _demonstrations(mixing)
    texts = tokenizer.encode_batch([prompt + response for prompt, response in records])
    wanted = ssr.OVERSAMPLING * mixing.count
    shown = ssr.contexts(texts, tokenizer.seed_id, tokenizer.eos_id, wanted, config.seed)
    prompts = Prompts(shown)
    room = mixing.room(prompts)
    if room < 1:
        raise UserError(
            f"--demos: {ssr.DEMONSTRATIONS} of them take {int(prompts.lengths.max())} tokens, "
            "which leaves no room in the model's context; give shorter ones"
        )
    endings = ssr.endings([prompt for prompt, _ in records])
    written = draws.corpus(prompts, mixing.sampling(room), wanted)
    found = (ssr.instance_input(_instance(s, tokenizer), endings) for s in written.samples)
    inputs = list(dict.fromkeys(text for text in found if text is not None))
    ids = [[tokenizer.seed_id, *tokens] for tokens in tokenizer.encode_batch(inputs)]
    ids = [tokens for tokens in ids if len(tokens) < config.max_length]
    if not ids:
        raise UserError(
            f"--method ssr: none of {wanted} instances that the base wrote has an input that ends "
            f"with one of {', '.join(map(repr, sorted(endings)))} within --max-length "
            f"{config.max_length}; give other --demos"
        )
    if len(ids) > mixing.count:
        # On one rank: another card's last bits could give another choice, and ranks that differ.
        ids = [ids[i] for i in draws.ranks.on_main(lambda: _representatives(mixing, ids))]
    if draws.ranks.is_main:
        print(
            f"ssr: {len(inputs)} different inputs in {wanted} instances that the base wrote; "
            f"{len(ids)} of {mixing.count} asked for are kept"
        )
    answered = Prompts(ids)
    greedy = SamplingSettings(mixing.room(answered), temperature=0.0, top_p=1.0)
    return _examples_of(draws.corpus(answered, greedy, len(ids)), mixing)


def _demonstrations(mixing: Mixing) -> list[Record]:
    config = mixing.config
    file, format_name = config.method_option("demos"), config.method_option("demos_format")
    if file is not None:
        return read_records(file, format_name, flag="--demos")
    if not _is_of_tinyworld(mixing):
        raise UserError("--method ssr: needs --demos, a few examples of the model's old tasks")
    rng = random.Random(f"demonstrations {config.seed}")
    skills = [make for make in tinyworld.OLD_SKILLS.values() for _ in range(TINYWORLD_SHOWN)]
    items = [tinyworld.draw(make, rng, held_out=False) for make in skills]
    return [FORMATS["tinyworld"](asdict(item)) for item in items]


def _instance(sample: Sample, tokenizer: Tokenizer) -> str:
    """What the base wrote, to its first end-of-text. Special tokens stay: R1's turns are such."""
    ids = sample.input_ids[sample.num_prompt_tokens :].tolist()
    ids = itertools.takewhile(lambda token: token != tokenizer.eos_id, ids)
    return tokenizer.backend.decode(list(ids), skip_special_tokens=False)


def _representatives(mixing: Mixing, ids: list[list[int]]) -> list[int]:
    """Indices of the inputs that stand for all."""
    features = _embeddings(mixing.draws, ids)
    return nearest_to_centroids(features, mixing.count, ssr.CLUSTERS, mixing.config.seed).tolist()


@torch.no_grad()
def _embeddings(draws: Draws, ids: list[list[int]]) -> np.ndarray:
    """(num_texts, D) float32 of unit length: the mean of the base's last hidden states over each
    text, scaled as SSR scales its encoder's."""
    base, found = draws.base, []
    device = base.embed_tokens.weight.device
    per_pass = max(1, EMBEDDED_TOKENS // max(map(len, ids)))
    for start in range(0, len(ids), per_pass):
        texts = ids[start : start + per_pass]
        context = PackedBatch([len(text) for text in texts], device, base.packed_route)
        row = torch.tensor([list(itertools.chain(*texts))], device=device)
        hidden = base.hidden_states(row, context)[0].float()
        found += [part.mean(0).cpu().numpy() for part in hidden.split([len(t) for t in texts])]
    features = np.stack(found)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _is_of_tinyworld(mixing: Mixing) -> bool:
    """Is the base the embedded one, or was it fine-tuned from it?"""
    return mixing.draws.tokenizer.fingerprint() == Tokenizer(TINYWORLD_DIR).fingerprint()


SOURCES: dict[str, Callable[[Mixing], list[Example]]] = {
    "context-free": context_free,
    "contextual": contextual,
    "replay": replay,
    "rehearsal": rehearsal,
}
