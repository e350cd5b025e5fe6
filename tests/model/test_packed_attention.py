"""Documents end to end in one row, against each by itself."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cfs.model.attention import (
    Route,
    choose_training_route,
    plain_attention,
    why_not_training,
)
from cfs.model.packed_attention import PackedBatch
from tests.conftest import tiny_model
from tests.model.allocations import Allocations

CPU = torch.device("cpu")


def document_mask(lengths: list[int]) -> torch.Tensor:
    """(T, T) bool: causal, and within a document."""
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return (document[:, None] == document[None]) & torch.ones(
        len(document), len(document)
    ).tril().bool()


@pytest.mark.parametrize("lengths", [[7], [1, 1, 1], [5, 5, 9, 9, 9, 2], [3, 8, 3]])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_equals_the_block_diagonal_mask(lengths: list[int], kv_heads: int) -> None:
    """Catches a document that looks into another, in values and in gradients."""
    total = sum(lengths)
    q = torch.randn(1, 4, total, 8, requires_grad=True)
    k, v = (torch.randn(1, kv_heads, total, 8, requires_grad=True) for _ in range(2))
    grad = torch.randn(1, 4, total, 8)
    ours = PackedBatch(lengths, CPU).attend(0, q, k, v)
    plain = plain_attention(q, k, v, document_mask(lengths))
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), grad),
        torch.autograd.grad(plain, (q, k, v), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "olmo"])
def test_a_packed_row_has_the_logits_of_its_documents(family: str) -> None:
    """Catches positions that run on from one document to the next."""
    model = tiny_model(family)
    lengths = [6, 6, 11, 2]
    ids = torch.randint(0, 97, (1, sum(lengths)))
    with torch.no_grad():
        packed = model(ids, context=PackedBatch(lengths, CPU))[0].split(lengths)
        for piece, logits in zip(ids[0].split(lengths), packed, strict=True):
            torch.testing.assert_close(logits, model(piece[None])[0], atol=1e-5, rtol=1e-5)


def test_what_the_kernels_are_told() -> None:
    """Catches boundaries off by one, and a bound below the longest document."""
    packed = PackedBatch([4, 4, 9], CPU)
    assert packed.cu_seqlens.tolist() == [0, 4, 8, 17]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 16
    assert packed.position_ids.tolist() == [0, 1, 2, 3] * 2 + list(range(9))
    assert packed.runs == [(2, 4), (1, 9)]
    assert choose_training_route("auto", CPU, torch.float32) == "sdpa"


def kernel_of_documents(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    """What the flash kernels compute, q (T, H, C), and what they demand of the boundaries."""
    assert torch.equal(cu_q, cu_k)
    assert cu_q.dtype == torch.int32
    assert max_q == max_k >= int(cu_q.diff().max())
    mixed = []
    for start, end in pairwise(cu_q.tolist()):
        one = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        mixed.append(plain_attention(*one, document_mask([end - start]))[0].transpose(0, 1))
    return torch.cat(mixed)


@pytest.mark.parametrize("knows_gqa", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("route", ["flash", "varlen"])
def test_kernels_are_called_as_they_are_documented(
    route: Route, kv_heads: int, knows_gqa: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches, without a GPU, arguments in another order or layout than the kernels read."""

    def flash_attn_varlen_func(*arguments: Any, causal: bool = False) -> Tensor:
        assert causal
        return kernel_of_documents(*arguments)

    def varlen_attn(q: Tensor, k: Tensor, *rest: Any, window_size: Any, **options: Any) -> Tensor:
        assert window_size == (-1, 0)
        assert options == ({"enable_gqa": True} if knows_gqa else {}), "torch 2.11 has no GQA"
        assert knows_gqa or q.shape[1] == k.shape[1]
        return kernel_of_documents(q, k, *rest)

    package = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr("cfs.model.packed_attention.VARLEN_KNOWS_GQA", knows_gqa)
    lengths = [1, 5, 5, 9]
    q = torch.randn(1, 4, 20, 8)
    k, v = torch.randn(2, 1, kv_heads, 20, 8)
    ours = PackedBatch(lengths, CPU, route).attend(0, q, k, v)
    plain = plain_attention(q, k, v, document_mask(lengths))
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_memory_does_not_grow_with_the_square_of_the_row() -> None:
    """Catches a (T, T) mask."""
    q, k, v = (torch.randn(1, 2, 1024, 4, requires_grad=True) for _ in range(3))
    with Allocations() as seen:
        PackedBatch([64] * 16, CPU).attend(0, q, k, v).sum().backward()
    assert seen.largest <= 4 * q.numel() < 1024 * 1024


def test_compiled_code_does_not_depend_on_the_lengths() -> None:
    """Catches a compilation for every new list of lengths, of which there is one a batch."""
    torch.compiler.reset()
    attend = torch.compile(lambda context, q: context.attend(0, q, q, q) * 2, backend="eager")
    q = torch.randn(1, 2, 24, 4)
    attend(PackedBatch([24], CPU), q)
    with torch.compiler.set_stance("fail_on_recompile"):
        for lengths in ([8, 8, 8], [1, 23], [3, 4, 5, 12]):
            expected = PackedBatch(lengths, CPU).attend(0, q, q, q) * 2
            assert torch.equal(attend(PackedBatch(lengths, CPU), q), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("route", ["flash", "varlen"])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_cuda_kernels_equal_the_plain_route(route: str, kv_heads: int) -> None:
    """Catches a kernel that is not causal, mixes documents, or groups heads another way."""
    device = torch.device("cuda")
    reason = why_not_training(route, device, torch.bfloat16)  # type: ignore[arg-type]
    if reason is not None:
        pytest.skip(reason)
    lengths = [5, 64, 64, 130]
    total = sum(lengths)
    q = torch.randn(1, 4, total, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    k, v = (
        torch.randn(1, kv_heads, total, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )
    grad = torch.randn_like(q)
    results = []
    for chosen in (route, "sdpa"):
        out = PackedBatch(lengths, device, chosen).attend(0, q, k, v)  # type: ignore[arg-type]
        results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=3e-2, rtol=3e-2)
