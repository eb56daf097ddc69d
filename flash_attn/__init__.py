# SPDX-License-Identifier: BSD-3-Clause
"""Exact attention for PyTorch in linear memory, on CPU and CUDA.

    flash_attn.scaled_dot_product_attention(q, k, v, is_causal=True)   # torch's signature
    flash_attn.attention(q, k, v, causal="bottom_right")               # every feature
    flash_attn.flash_attn_func(q, k, v, causal=True)                   # FlashAttention-2's

`__version__` is the FlashAttention-2 API level; `build_info()` says what this build is.
"""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)

__version__ = "2.8.3"

from . import nn, reference
from ._backends import can_use, use_backend, use_cpu_isa
from ._ops import build_info
from ._patch import disable_sdpa_patch, enable_sdpa_patch, sdpa_patch
from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .sdpa import attention, dropout_mask, scaled_dot_product_attention

__all__ = [
    "__version__",
    "attention",
    "build_info",
    "can_use",
    "disable_sdpa_patch",
    "dropout_mask",
    "enable_sdpa_patch",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "nn",
    "reference",
    "scaled_dot_product_attention",
    "sdpa_patch",
    "use_backend",
    "use_cpu_isa",
]
