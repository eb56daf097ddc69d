# SPDX-License-Identifier: BSD-3-Clause
"""Measurements of flash_attn beside its rivals. Never tests: see tests/ for what must hold."""
