"""What is asked of the sampler and what it gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cfs.errors import UserError

LOWEST_TEMPERATURE = 1e-6
"""Below it logits divided by the temperature leave float32; 0 itself is greedy."""


@dataclass(frozen=True)
class SamplingSettings:
    """What decides a sample, beside the model and its index."""

    max_tokens: int
    """Most tokens after the prompt, end-of-text included."""
    temperature: float = 1.0
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"--max-tokens {self.max_tokens}: expected at least 1")
        if self.temperature != 0 and not LOWEST_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(
                f"--temperature {self.temperature}: expected 0 (greedy) or from "
                f"{LOWEST_TEMPERATURE} on"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: expected in (0, 1]")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"--seed {self.seed}: expected in [0, 2^64)")


@dataclass(frozen=True)
class Request:
    """Sample number `index`, to continue `prompt_ids` (seed token included)."""

    index: int
    prompt_ids: list[int]


@dataclass(frozen=True)
class TopK:
    """The head of p_theta* (temperature 1, untruncated) at each generated position, n of them.

    ids        (n, K) int32, most probable first
    logprobs   (n, K) float32, nats
    rest_mass  (n,) float32, the probability of all other tokens together
    """

    ids: np.ndarray
    logprobs: np.ndarray
    rest_mass: np.ndarray


@dataclass(frozen=True)
class Sample:
    """A finished text; log-probabilities are in nats, one per generated token.

    input_ids        (num_prompt_tokens + num_generated,) int32, the stop token included
    logprob_model    (num_generated,) float32, log p_theta* at temperature 1, untruncated
    logprob_sampler  (num_generated,) float32, log q, the law the token was drawn from
    finish_reason    "stop" at end-of-text, "length" at the limit
    """

    index: int
    input_ids: np.ndarray
    num_prompt_tokens: int
    logprob_model: np.ndarray
    logprob_sampler: np.ndarray
    finish_reason: str
    topk: TopK | None = None
