"""Freezing: some parameters do not train at all.

What stays is named by parts of the architecture, separated by commas: `embeddings` (and the head
tied to them), `head`, `attention`, `mlp`, `norms`, `layers:0-7` (blocks by number).
The simplest of the methods that update a subset of the parameters (the paper, section 1.1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from cfs.baselines.method import Method
from cfs.cli import option
from cfs.errors import UserError

PARTS = {
    "embeddings": r"embed_tokens\.",
    "head": r"lm_head\.",
    "attention": r"layers\.\d+\.self_attn\.",
    "mlp": r"layers\.\d+\.mlp\.",
    "norms": r"(layers\.\d+\.)?\w*norm\.",
}
LAYERS = re.compile(r"layers:(\d+)-(\d+)")


def is_frozen(name: str, part: str) -> bool:
    """Does the parameter belong to the part of the model? `UserError` for an unknown part."""
    if (blocks := LAYERS.fullmatch(part)) and int(blocks[1]) <= int(blocks[2]):
        number = re.match(r"layers\.(\d+)\.", name)
        return number is not None and int(blocks[1]) <= int(number[1]) <= int(blocks[2])
    if part not in PARTS:
        raise UserError(
            f"--freeze {part}: expected {', '.join(PARTS)} or layers:FIRST-LAST, "
            "several separated by commas"
        )
    return re.match(PARTS[part], name) is not None


@dataclass
class Freeze(Method):
    """Subsets of the parameters keep the values of theta*."""

    name = "freeze"
    summary = "some parts of the model do not train"
    source = "the paper, section 1.1"
    freeze: str = option("embeddings", "parts that do not train, such as embeddings,attention")

    def check(self) -> None:
        for part in self.freeze.split(","):
            is_frozen("", part)

    def wrap(self, model: nn.Module) -> None:
        names = [name for name, _ in model.named_parameters()]
        for part in self.freeze.split(","):
            blocks = LAYERS.fullmatch(part)
            last = f"layers.{blocks[2]}." if blocks else ""
            if not any(is_frozen(name, part) and name.startswith(last) for name in names):
                raise UserError(
                    f"--freeze {part}: the model has no parameter of it, or not so many layers"
                )
        for name, parameter in model.named_parameters():
            if any(is_frozen(name, part) for part in self.freeze.split(",")):
                parameter.requires_grad_(False)
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError(f"--freeze {self.freeze}: nothing is left to train")
