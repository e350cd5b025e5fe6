"""Packed weights give the model that was packed."""

from __future__ import annotations

import pytest
import torch

from cfs.model.packed import PackedLinear, can_pack, packed_for_decoding
from tests.conftest import tiny_model

packing = pytest.mark.skipif(
    not can_pack(torch.zeros(1)), reason="this torch has no packed product for this processor"
)


@packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("family", ["olmo", "llama"])
@torch.no_grad()
def test_logits_stay_as_they_are(
    family: str, options: dict[str, object], dtype: torch.dtype
) -> None:
    """Catches a layer left out, and a head that is not the embedding it is tied to."""
    model = tiny_model(family, **options).to(dtype)
    packed = packed_for_decoding(model, 4)
    assert packed is not model
    names = {n for n, m in packed.named_modules() if isinstance(m, PackedLinear)}
    assert len(names) == 2 * 7, "q, k, v, o, gate, up, down of both layers"
    ids = torch.randint(0, 97, (3, 11))
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(packed(ids), model(ids), atol=tolerance, rtol=0)


@packing
@torch.no_grad()
def test_the_model_itself_stays_trainable_and_unpacked() -> None:
    """Catches packing that changes the model in place."""
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    packed_for_decoding(model, 4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_dtype_that_cannot_be_packed_is_left_alone() -> None:
    """Catches an error where only speed is at stake."""
    model = tiny_model().double()
    assert packed_for_decoding(model, 4) is model
