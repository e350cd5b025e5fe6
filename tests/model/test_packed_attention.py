"""Documents in one row: each route against attention written out under a block-diagonal mask."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cfs.errors import UserError
from cfs.model.attention import (
    ROUTES,
    Route,
    choose_training_route,
    plain_attention,
    why_not_training,
)
from cfs.model.packed_attention import PackedBatch
from tests.conftest import tiny_model
from tests.model.allocations import LargestTensor

CPU = torch.device("cpu")
HEADS, WIDTH = 8, 64
LENGTHS = [1, 3, 3, 3, 7, 19, 19, 40]


def results(route: Route | None, kv_heads: int, device: torch.device, dtype: torch.dtype):
    """Output and gradients of q, k and v: of the packed batch, and of the formula."""
    total = sum(LENGTHS)
    shapes = [(1, n, total, WIDTH) for n in (HEADS, kv_heads, kv_heads)]
    leaves = [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes]
    document = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)).to(device)
    mask = (document[:, None] == document).tril()
    packed = PackedBatch(LENGTHS, device, route)
    grad = torch.randn(shapes[0], device=device, dtype=dtype)
    for mixed in (packed.attend(0, *leaves), plain_attention(*leaves, mask)):
        yield [mixed.detach(), *torch.autograd.grad(mixed, leaves, grad)]


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_plain_torch_equals_the_formula(kv_heads: int) -> None:
    """Catches documents that see each other or are put together in another order."""
    ours, expected = results("sdpa", kv_heads, CPU, torch.float32)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


def reference_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    """What the flash kernels compute, q (T, H, C), and what they demand of the borders."""
    assert torch.equal(cu_q, cu_k)
    assert cu_q.dtype == torch.int32
    assert max_q == max_k >= int(cu_q.diff().max())
    mixed = []
    for start, end in pairwise(cu_q.tolist()):
        one = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        length = end - start
        mixed.append(plain_attention(*one, torch.ones(length, length).tril().bool())[0])
    return torch.cat([x.transpose(0, 1) for x in mixed])


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_flash_is_called_as_it_is_documented(
    kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches, without a GPU, arguments in another order or layout than flash-attn's own."""

    def flash_attn_varlen_func(*arguments: object, causal: bool = False) -> Tensor:
        assert causal
        return reference_kernel(*arguments)  # type: ignore[arg-type]

    module = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    ours, expected = results("flash", kv_heads, CPU, torch.float32)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("knows_gqa", [True, False])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_varlen_is_called_as_it_is_documented(
    kv_heads: int, knows_gqa: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the same for torch's kernel, with the options of 2.13 and of 2.11."""

    def varlen_attn(q: Tensor, k: Tensor, *rest: object, window_size: object, **options: object):
        assert window_size == (-1, 0)
        assert options == ({"enable_gqa": True} if knows_gqa else {})
        assert knows_gqa or q.shape[1] == k.shape[1]
        return reference_kernel(q, k, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr("cfs.model.packed_attention.VARLEN_KNOWS_GQA", knows_gqa)
    ours, expected = results("varlen", kv_heads, CPU, torch.float32)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("route", ROUTES)
def test_cuda_routes_equal_the_formula(route: Route, kv_heads: int) -> None:
    """Catches a kernel that is not causal, or told of other borders than the documents'."""
    device = torch.device("cuda")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if (reason := why_not_training(route, device, torch.bfloat16)) is not None:
        pytest.skip(reason)
    ours, expected = results(route, kv_heads, device, torch.bfloat16)
    torch.testing.assert_close(ours, expected, atol=5e-2, rtol=2e-2)


@pytest.mark.gpu
def test_float32_on_cuda_takes_plain_torch() -> None:
    """Catches float32 tensors handed to a kernel that knows half precision alone."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    ours, expected = results(None, 2, torch.device("cuda"), torch.float32)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_positions_and_borders() -> None:
    """Catches positions that run on from one document to the next."""
    packed = PackedBatch([2, 3, 1], CPU)
    assert packed.position_ids.tolist() == [0, 1, 0, 1, 2, 0]
    assert packed.cu_seqlens.tolist() == [0, 2, 5, 6]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 4
    assert packed.route == "sdpa"


@torch.no_grad()
def test_a_document_gives_the_logits_that_it_gives_alone() -> None:
    """Catches a model whose packed documents differ from single ones in any other way."""
    model = tiny_model("llama", num_key_value_heads=2)
    documents = [torch.randint(0, 97, (1, length)) for length in (5, 1, 9, 9)]
    row = torch.cat(documents, dim=1)
    context = PackedBatch([d.shape[1] for d in documents], CPU)
    alone = torch.cat([model(d) for d in documents], dim=1)
    torch.testing.assert_close(model(row, context=context), alone, atol=1e-5, rtol=0)


def test_no_mask_of_all_pairs() -> None:
    """Catches attention whose memory grows with the square of the row."""

    total = 64 * 16
    q, k, v = (torch.randn(1, 2, total, 4, requires_grad=True) for _ in range(3))
    with LargestTensor() as largest:
        PackedBatch([64] * 16, CPU).attend(0, q, k, v).sum().backward()
    assert largest.num_bytes <= 4 * q.nbytes < 4 * total * total


@pytest.mark.parametrize("route", ["flash", "varlen"])
def test_a_route_that_is_not_there_is_refused(route: Route) -> None:
    """Catches a silent fallback to another kernel than the one asked for."""
    with pytest.raises(UserError, match=rf"--attention {route}: needs CUDA, not cpu; use"):
        choose_training_route(route, CPU, torch.bfloat16)
    reason = why_not_training(route, torch.device("cuda"), torch.float32)
    assert reason == "needs bfloat16, not float32"
    assert choose_training_route("auto", CPU, torch.bfloat16) == "sdpa"
