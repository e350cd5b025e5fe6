"""The decoder that both families are: embed, pre-norm blocks, norm, head.

The one primitive of the loss, log p_theta(x_t | x_<t) at chosen targets, is an output of the
forward pass: under FSDP the head's weight exists in full only in there.

Shapes: B rows, T positions, D model width, V vocabulary, N targets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cfs.model.attention import AttentionContext, CausalBatch, Route
from cfs.model.config import ModelConfig
from cfs.model.layers import MLP, Attention, Rope
from cfs.model.logprobs import chunked_logprobs


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, norm_class: Any) -> None:
        super().__init__()
        self.input_layernorm = norm_class(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = norm_class(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """A causal language model; `Llama` and `Olmo` name the norm."""

    norm_class: Any = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.source_dir: str | None = None
        """Directory the weights came from; its tokenizer files go with a saved copy."""
        self.packed_route: Route | None = None
        """Kernel for packed documents; None for the best that there is."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer, self.norm_class) for layer in range(config.num_layers)
        )
        self.norm = self.norm_class(config)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.rope = Rope(config)

    def forward(
        self,
        input_ids: Tensor,
        target_mask: Tensor | None = None,
        context: AttentionContext | None = None,
        grad_hint: Tensor | None = None,
        head: Callable[[Tensor, Tensor, Tensor], Any] | None = None,
    ) -> Any:
        """Logits, or with `target_mask` the log-probability of each marked token.

        input_ids   (B, T) int64; rows start at position 0 unless `context` says otherwise
        target_mask (B, T) bool, True where the token is a target; never at the first token of a
                    row or document, which nothing predicts
        grad_hint   (N,) float32, the gradient that the log-probabilities will get, where it is
                    known (`chunked_logprobs`)
        head        computes something else at the targets: called with what predicts them, the
                    final hidden states (N, D), with the head's weight (V, D), and with their ids
                    (N,) int64. A loss that needs more than log p gets at the weight here, where
                    FSDP has gathered it; after the forward pass its storage may be freed

        Returns (B, T, V) logits in the model's dtype, or (N,) float32 log p(x_t | x_<t) in nats
        for the N True entries of `target_mask` in row-major order. Only those positions reach
        the head. With `head` what that returns, tensors or a tuple of them.
        """
        hidden = self.hidden_states(input_ids, context or CausalBatch(*_span(input_ids)))
        if target_mask is None:
            assert head is None, "a head of one's own needs targets"
            return self.logits(hidden)
        places = target_mask.flatten().nonzero().squeeze(1)
        predictors = hidden.flatten(0, 1).index_select(0, places - 1)
        targets = input_ids.flatten()[places]
        if head is not None:
            return head(predictors, self.head_weight, targets)
        return chunked_logprobs(predictors, self.head_weight, targets, grad_hint=grad_hint)

    def hidden_states(self, input_ids: Tensor, context: AttentionContext) -> Tensor:
        """(B, T) int64 -> (B, T, D) after the final norm."""
        x = self.embed_tokens(input_ids)
        cos, sin = self.rope.phases(context.position_ids)
        for block in self.layers:
            x = block(x, cos, sin, context)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), same dtype."""
        return hidden @ self.head_weight.T

    @property
    def head_weight(self) -> Tensor:
        """(V, D); the embedding itself where the config ties them."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight


def _span(input_ids: Tensor) -> tuple[int, torch.device]:
    return input_ids.shape[1], input_ids.device
