# SPDX-License-Identifier: BSD-3-Clause
"""nn.MultiheadAttention by our kernels: a drop-in subclass, and a way to put it into a model.

Source: Vaswani et al., Attention Is All You Need (2017), section 3.2.2; the contract is that of
torch.nn.MultiheadAttention.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _transforms

__all__ = ["MultiheadAttention", "replace_mha", "restore_mha"]

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)

# torch's own checks and projections, so that their texts and numbers are torch's.
_F: Any = F


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`: same constructor, parameters, state_dict and meaning.

    Differences, all deliberate: a row whose keys are all masked gives 0 in the output and in the
    weights (torch: NaN with need_weights); need_weights allocates nothing of the size of the
    weights but the weights that it returns; torch's inference fast path is not taken, except for
    NestedTensors, which are legal only there. Not for TorchScript's `torch.jit.script`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_forward_pre_hook(_keep_off_fast_path)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `query` over `key` and `value`; see torch.nn.MultiheadAttention.forward.

        Args:
            query: (L, N, E), (N, L, E) with batch_first, or (L, E).
            key, value: (S, N, kdim), (S, N, vdim), likewise.
            key_padding_mask: (N, S) or (S,); bool, True ignores the key, or added to the scores.
            need_weights: also return the weights.
            attn_mask: (L, S) or (N * num_heads, L, S); bool, True forbids, or added.
            average_attn_weights: return the mean of the weights over the heads.
            is_causal: a hint that attn_mask is the causal mask, which is then not read if the
                weights are not wanted.

        Returns:
            (output, weights): output as query; weights (N, L, S), (N, num_heads, L, S) if not
            averaged, without N for unbatched input, None if not wanted. Differentiable both.

        Raises:
            AssertionError, RuntimeError: shapes and masks that do not fit, with torch's texts.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        _check_mask_types(key_padding_mask, attn_mask)
        _F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer "
                "module method `generate_square_subsequent_mask` to create this mask."
            )
        batched = query.dim() == 3
        if not batched:
            query, key, value = _same(lambda x: x.unsqueeze(0), query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        batch_first = self.batch_first or not batched

        num_keys = key.shape[1 if batch_first else 0]
        q, k, v = self._heads(query, key, value, batch_first)
        causal = is_causal and not need_weights and self._hint_serves(attn_mask, key_padding_mask)
        keep, bias = self._masks(None if causal else attn_mask, key_padding_mask, q, k, num_keys)

        dropout_p = self.dropout if self.training else 0.0
        rng_state = None
        if dropout_p > 0:
            rng_state = _transforms.draw_rng_state(q.shape[0] * q.shape[1], q, k, v, bias, keep)
        options: dict[str, Any] = {
            "bias": bias,
            "mask": keep,
            "rng_state": rng_state,
            "rng_state_drawn": True,
            "dropout_p": dropout_p,
            "scale": 1 / math.sqrt(self.head_dim),
            "window_right": 0 if causal else None,
        }
        out, lse = _transforms.attention(
            q, k, v, deterministic=torch.are_deterministic_algorithms_enabled(), **options
        )
        weights = None
        if need_weights:
            weights = _transforms.attention_weights(
                q, k, lse, average=average_attn_weights, **options
            )
            weights = weights if batched else weights.squeeze(0)
        out = out.permute(0, 2, 1, 3) if batch_first else out.permute(2, 0, 1, 3)
        out = F.linear(out.flatten(2), self.out_proj.weight, self.out_proj.bias)
        return (out if batched else out.squeeze(0)), weights

    def _heads(
        self, query: Tensor, key: Tensor, value: Tensor, batch_first: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The projections, and the keys that the module itself adds, as views (N, H, L, E / H)."""
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(
                f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}"
            )
        if self._qkv_same_embed_dim:
            if key.shape != value.shape:
                raise AssertionError(
                    f"key shape {key.shape} does not match value shape {value.shape}"
                )
            if query is key and key is value:
                q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
            else:
                q, k, v = _F._in_projection_packed(
                    query, key, value, self.in_proj_weight, self.in_proj_bias
                )
        else:
            if key.shape[:2] != value.shape[:2]:
                raise AssertionError(
                    f"key's sequence and batch dims {key.shape[:2]} do not match value's "
                    f"{value.shape[:2]}"
                )
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            q, k, v = _F._in_projection(
                query, key, value, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight,
                *biases,
            )  # fmt: skip

        batch_dim, length_dim = (0, 1) if batch_first else (1, 0)
        one_key = list(k.shape)
        one_key[length_dim] = 1
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(one_key)], length_dim)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(one_key)], length_dim)
        if self.add_zero_attn:
            k = torch.cat([k, k.new_zeros(one_key)], length_dim)
            v = torch.cat([v, v.new_zeros(one_key)], length_dim)
        q, k, v = (
            x.view(*x.shape[:2], self.num_heads, self.head_dim).permute(batch_dim, 2, length_dim, 3)
            for x in (q, k, v)
        )
        return q, k, v

    def _hint_serves(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> bool:
        """Whether causal attention can stand for attn_mask: torch's rule, and with padding where
        the mask needs no gradient and the module adds no keys, which a causal mask would hide."""
        if key_padding_mask is None:
            return True
        adds_keys = self.bias_k is not None or self.add_zero_attn
        return attn_mask is not None and not attn_mask.requires_grad and not adds_keys

    def _masks(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        q: Tensor,
        k: Tensor,
        num_keys: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        """torch's masks as the op's, of 4 dimensions: (keep, bias). Keys added by the module are
        seen by everyone. Two bool masks become one of each, so that neither is expanded."""
        batch, _, num_queries, _ = q.shape
        added = k.shape[2] - num_keys
        if attn_mask is not None:
            expected = (batch * self.num_heads, num_queries, num_keys)[3 - attn_mask.dim() :]
            if attn_mask.shape != expected:
                raise RuntimeError(
                    f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but "
                    f"should be {expected}."
                )
            attn_mask = F.pad(attn_mask, (0, added)) if added else attn_mask
            if attn_mask.dim() == 2:
                attn_mask = attn_mask[None, None]
            else:
                attn_mask = attn_mask.view(batch, self.num_heads, *attn_mask.shape[1:])
        if key_padding_mask is not None:
            if added:
                key_padding_mask = F.pad(key_padding_mask, (0, added))
            _F._check_key_padding_mask(key_padding_mask, k.shape[2], batch)
            key_padding_mask = key_padding_mask[:, None, None]

        forbids = [
            m for m in (attn_mask, key_padding_mask) if m is not None and m.dtype == torch.bool
        ]
        bias = [m for m in (attn_mask, key_padding_mask) if m is not None and m.dtype != torch.bool]
        if len(forbids) == 2:
            bias.append(q.new_zeros(forbids[1].shape).masked_fill(forbids.pop(), -math.inf))
        return (
            ~forbids[0] if forbids else None,
            sum(bias[1:], start=bias[0]) if bias else None,
        )


def replace_mha(model: ModuleT) -> ModuleT:
    """Makes every torch.nn.MultiheadAttention in `model` one of ours, in place; returns `model`.

    The modules keep their identity, parameters, hooks and mode: only their class changes. Encoder
    layers that would bypass the module in inference no longer do, and encoders no longer turn
    padded batches into NestedTensors. Subclasses of nn.MultiheadAttention are left alone, with a
    warning that names them. `restore_mha` undoes it.
    """
    skipped = []
    for name, module in model.named_modules():
        if type(module) is torch.nn.MultiheadAttention:
            module.__class__ = MultiheadAttention
            module.register_forward_pre_hook(_keep_off_fast_path)
            setattr(module, _REPLACED, True)
        elif isinstance(module, torch.nn.MultiheadAttention) and not isinstance(
            module, MultiheadAttention
        ):
            skipped.append(f"{name or '(model)'} ({type(module).__name__})")
    for module in model.modules():
        if (
            isinstance(module, torch.nn.TransformerEncoder)
            and not hasattr(module, _NESTED)
            and any(hasattr(m, _REPLACED) for m in module.modules())
        ):
            setattr(module, _NESTED, getattr(module, "use_nested_tensor", False))
            module.use_nested_tensor = False
    if skipped:
        warnings.warn(
            "flash_attn: replace_mha left subclasses of nn.MultiheadAttention as they are: "
            + ", ".join(skipped),
            stacklevel=2,
        )
    return model


def restore_mha(model: ModuleT) -> ModuleT:
    """Undoes `replace_mha` on `model`, in place; returns `model`."""
    for module in model.modules():
        if hasattr(module, _REPLACED):
            delattr(module, _REPLACED)
            module.__class__ = torch.nn.MultiheadAttention
            for key, hook in list(module._forward_pre_hooks.items()):
                if hook is _keep_off_fast_path:
                    del module._forward_pre_hooks[key]
        if hasattr(module, _NESTED):
            module.use_nested_tensor = getattr(module, _NESTED)
            delattr(module, _NESTED)
    return model


_REPLACED = "_flash_attn_replaced"
_NESTED = "_flash_attn_use_nested_tensor"


def _keep_off_fast_path(module: torch.nn.Module, args: Any) -> None:
    """nn.TransformerEncoderLayer takes the inference fast path, which reads the parameters of its
    attention and never calls it, only where no submodule has a forward hook."""


def _same(f: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f of each, the same tensor where they are: one projection then serves all three."""
    f_key = f(key)
    return (
        f_key if query is key else f(query),
        f_key,
        f_key if value is key else f(value),
    )


def _check_mask_types(key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> None:
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(f"only bool and floating types of {name} are supported")
    if (
        key_padding_mask is not None
        and attn_mask is not None
        and key_padding_mask.dtype != attn_mask.dtype
    ):
        warnings.warn(
            "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type "
            "for both instead.",
            stacklevel=4,
        )
