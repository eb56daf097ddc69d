#!/bin/sh
# SPDX-License-Identifier: BSD-3-Clause
# usage: linkage.sh OBJECT...
# An object that is compiled for one instruction set must not offer a weak symbol: the linker keeps
# one copy of each for the whole program, and an older CPU would die of an AVX-512 one.
status=0
for object in "$@"; do
  weak=$(nm -C "$object" | grep -E ' [WVu] ' | grep -v 'DW\.ref')
  if [ -n "$weak" ]; then
    echo "$object: weak symbols"
    echo "$weak"
    status=1
  fi
done
exit $status
