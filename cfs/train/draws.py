"""Corpora of the base that a run draws, or finds drawn by an earlier one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cfs.data.tokenizer import Tokenizer
from cfs.model import Decoder
from cfs.ranks import Ranks
from cfs.sample.corpus import Corpus, read_corpus
from cfs.sample.draw import Drawing, draw_corpus
from cfs.sample.prompts import Prompts
from cfs.sample.sample import SamplingSettings
from cfs.sample.sampler import choose_num_slots
from cfs.sample.settings import CorpusSettings, model_fingerprint


@dataclass(frozen=True)
class Draws:
    """What draws from one base model, and where the corpora are kept.

    corpora    their directory; each is named by the fingerprint of its settings
    directory  the base's checkpoint
    """

    corpora: Path
    directory: Path
    base: Decoder
    tokenizer: Tokenizer
    ranks: Ranks

    def corpus(self, prompts: Prompts, sampling: SamplingSettings, num_samples: int) -> Corpus:
        """`num_samples` continuations of the prompts, in turn. Collective."""
        is_one = len(prompts) == 1
        settings = CorpusSettings(
            model=self.ranks.on_main(lambda: model_fingerprint(self.directory)),
            tokenizer=self.tokenizer.fingerprint(),
            num_samples=num_samples,
            prompt_ids=prompts.of_sample(0) if is_one else None,
            sampling=sampling,
            dtype=str(self.base.embed_tokens.weight.dtype).removeprefix("torch."),
            num_prompts=len(prompts),
            prompts=None if is_one else prompts.fingerprint(),
        )
        place = self.corpora / settings.fingerprint()
        slots = choose_num_slots(
            self.base, int(prompts.lengths.max()) + sampling.max_tokens, num_samples
        )
        drawing = Drawing(self.base, self.tokenizer, prompts, slots)
        draw_corpus(place, settings, lambda: drawing, self.ranks)
        return read_corpus(place)
