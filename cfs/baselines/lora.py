"""LoRA: the weights stay where they are, and low-rank updates of the projections train instead.

    y = x W^T + (alpha / r) (x A^T) B^T,   A (r, in), B (out, r)

so that each projection's weight is W + (alpha / r) B A in the end (Hu et al. 2022, section 4.1);
alpha = r by default (the paper, section E.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfs.baselines.lora_adapter import ADAPTERS, save_adapter
from cfs.baselines.method import Method, Shard
from cfs.cli import option

PROJECTIONS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
STAY = "LoRA leaves the weights themselves as they are, and the other method works on those"
Named = Iterable[tuple[str, Tensor]]


class LoraLinear(nn.Module):
    """A projection: its frozen weight under its old name, and A and B beside it."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        assert linear.bias is None, "the families' projections have none"
        self.scale = scale
        # Before the weight: whoever gets the parameters one by one then has A and B when the
        # weight comes, and need not hold the weight (`merged_parameters`).
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_empty(linear.out_features, rank))
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), same dtype."""
        update = F.linear(self.scale * F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.weight) + update


@dataclass
class Lora(Method):
    """The LoRA baseline of the paper; joined with cfs in its Table 8."""

    name = "lora"
    summary = "low-rank updates train, the weights do not"
    source = "Hu et al. 2022, arXiv 2106.09685; Biderman et al. 2024, arXiv 2405.09673"
    claims: ClassVar[dict[str, str]] = {"trained parameters": "trains low-rank updates alone"}
    excludes: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("l2", "l2-init", "ewc", "mofo", "lota", "sfa", "hma"), STAY),
        "freeze": "LoRA freezes every weight itself; --lora-targets says where it acts",
        "pretrain": "its weights are random, and LoRA would leave them so",
    }
    lora_rank: int = option(64, "rank r of the updates; Table 8 has 64, 128 and 256")
    lora_alpha: float | None = option(None, "updates count alpha / r times; left out: r")
    lora_targets: str = option(PROJECTIONS, "projections to update, or all-linear", "NAMES")

    @property
    def alpha(self) -> float:
        return self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.lora_rank

    def check(self) -> None:
        self.require("lora_rank", self.lora_rank >= 1, "1 or more")
        self.require("lora_alpha", 0 < self.alpha < math.inf, "a finite number above 0")

    def wrap(self, model: nn.Module) -> None:
        """A and B get the weights' device and dtype, and values only by `init_adapters`."""
        # The head is no projection: its weight is read, and its module is never called. It alone
        # stands outside the blocks, and PEFT's all-linear leaves it out too.
        linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
        known = {path.rpartition(".")[2] for path in linears if "." in path}
        given = {name.strip() for name in self.lora_targets.split(",")}
        targets = known if given == {"all-linear"} else given
        rule = f"names among {', '.join(sorted(known))}, separated by commas, or all-linear"
        self.require("lora_targets", targets <= known, rule)
        widest = max(max(m.weight.shape) for path, m in linears.items() if "." in path)
        self.require("lora_rank", self.lora_rank <= widest, f"at most {widest}, the largest width")
        model.requires_grad_(False)
        for path, linear in linears.items():
            if path.rpartition(".")[2] in targets:
                model.set_submodule(path, LoraLinear(linear, self.lora_rank, self.scale))

    def fill(self, shards: Sequence[Shard], seed: int) -> None:
        init_adapters(shards, seed)

    def result(self, named: Named) -> Iterator[tuple[str, Tensor]]:
        return merged_parameters(named, self.scale)

    leaves_more = True

    def write_more(self, named: Named, out: Path, base: str) -> None:
        save_adapter(named, out / "adapter", self.lora_rank, self.alpha, base)


@torch.no_grad()
def init_adapters(shards: Iterable[Shard], seed: int) -> None:
    """A uniform on +-1/sqrt(in), as in the authors' code and PEFT; B zero, so that nothing changes.

    Each A is drawn whole, by the seed and its name: all ranks hold rows of the same matrix.
    """
    for shard in shards:
        if shard.name.endswith(".lora_A"):
            key = np.random.SeedSequence((seed, *shard.name.encode())).generate_state(1)
            generator = torch.Generator().manual_seed(int(key[0]))
            whole = torch.rand(shard.whole_shape, generator=generator, device="cpu")
            shard.local.copy_((2 * whole[shard.rows] - 1) / math.sqrt(whole.shape[1]))
        elif shard.name.endswith(".lora_B"):
            shard.local.zero_()


@torch.no_grad()
def merged_parameters(named: Named, scale: float) -> Iterator[tuple[str, Tensor]]:
    """The base model's parameters in its order, with W + scale B A in place of adapted weights W:
    in float32, so that the writer's rounding is the only one.

    named  the wrapped model's, whole, in its order; one module's three are held at a time
    """
    adapters: dict[str, Tensor] = {}
    for name, value in named:
        if name.endswith(ADAPTERS):
            adapters[name] = value.float()
            continue
        module = name.removesuffix("weight")
        if f"{module}lora_A" in adapters:
            a, b = (adapters.pop(f"{module}lora_{letter}") for letter in "AB")
            value = torch.addmm(value.float(), b, a, alpha=scale)
        yield name, value
    assert not adapters, f"after its weight came {', '.join(adapters)}"
