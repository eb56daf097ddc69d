# SPDX-License-Identifier: BSD-3-Clause
"""What `make` builds on this machine: FLASH_ATTN_CUDA if set; else auto where torch sees a GPU, and
0 where it does not. With --explain, says so."""

import os
import sys

import torch

asked = os.environ.get("FLASH_ATTN_CUDA", "")
choice = asked or ("auto" if torch.cuda.is_available() else "0")
if "--explain" not in sys.argv:
    print(choice)
elif asked:
    print(f"CUDA backend: FLASH_ATTN_CUDA={asked}")
elif choice == "0":
    print(
        "CUDA backend: skipped, torch sees no GPU here (FLASH_ATTN_CUDA=1 builds it all the same)"
    )
else:
    print(f"CUDA backend: for {torch.cuda.get_device_name()}")
