"""FLOW: what theta* finds easy in the task counts more.

    w_i = exp(-f_i / tau),  f_i = mean over example i's targets of -log p_theta*(y_t | x, y_<t)
    loss = (1 / N) sum_i w_i sum_t -log p_theta(y_t | x, y_<t)

with N the number of targets, not the sum of weights, and tau the median of the f_i over the whole
task (Sanyal et al. 2025, arXiv 2502.02797, and its public code). The weights are fixed before the
first step. `--flow-temperature X` multiplies tau; the larger, the more alike the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np

from cfs.baselines.method import Method
from cfs.cli import option


def easy_sample_weights(nll_nats: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """exp(-f / (temperature * median(f))), (num_examples,) float64 in (0, 1].

    nll_nats  (num_examples,) mean negative log-likelihoods, 0 or more
    """
    tau = temperature * float(np.median(nll_nats))
    if tau == 0.0:  # theta* is certain of most examples: all of those count alike
        return np.where(nll_nats > 0.0, 0.0, 1.0)
    return np.exp(-nll_nats / tau)


@dataclass
class Flow(Method):
    """Easy-sample weights from theta*'s own losses."""

    name = "flow"
    summary = "task examples weighted by how easy the base finds them"
    source = "Sanyal et al. 2025, arXiv 2502.02797"
    weighs_examples = True
    flow_temperature: float = option(1.0, "multiple of the median loss that weights are taken at")

    def check(self) -> None:
        self.require("flow_temperature", 0 < self.flow_temperature < inf, "above 0")

    def example_weights(self, nll_nats: np.ndarray) -> np.ndarray:
        return easy_sample_weights(nll_nats, self.flow_temperature)
