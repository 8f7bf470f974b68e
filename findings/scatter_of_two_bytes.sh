#!/usr/bin/env bash
# torch 2.13.0, CPU.
#
# `scatter_` of 16 rows into a store writes 16 rows, and takes the same time whatever the store's size, for float32 and
# for integers. For bfloat16 and float16 it takes time in proportion to the whole store: 70 milliseconds and more for
# 2 KiB written into 32 MiB. `index_copy_` does not, nor does `scatter_` on an int16 view of the same memory.
# Who meets it: a cache of keys and values in a short format, written in place at each token: the longer the context,
# the slower a token, and a profile of float32 shows nothing.
#
# Seen on 2026-11-30, microseconds for 16 rows of 64 numbers into 4096 rows, and into 64 times as many:
#   torch.float32, viewed as None: 8 and 9 microseconds
#   torch.bfloat16, viewed as None: 133 and 70830 microseconds
#   torch.float16, viewed as None: 112 and 68223 microseconds
#   torch.bfloat16, viewed as torch.int16: 8 and 9 microseconds
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room"
"$room/bin/python" -m pip install -qq --no-compile torch==2.13.0 numpy==2.4.6
cd "$room"
OMP_NUM_THREADS=1 bin/python - << 'PYTHON'
import time

import torch


def fastest(store, view=None):
    """Seconds of the fastest of ten writes."""
    index, rows = (torch.arange(16) * 7)[:, None].expand(16, 64), torch.ones(16, 64, dtype=store.dtype)
    into, rows = (store, rows) if view is None else (store.view(view), rows.view(view))
    times = []
    for _ in range(11):
        started = time.perf_counter()
        into.scatter_(0, index, rows)
        times.append(time.perf_counter() - started)
    assert store.sum() == rows.numel()
    return min(times[1:])


for dtype, view in [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, torch.int16)]:
    small, large = (fastest(torch.zeros(rows, 64, dtype=dtype), view) for rows in (4096, 64 * 4096))
    print(f"{dtype}, viewed as {view}: {small * 1e6:.0f} and {large * 1e6:.0f} microseconds")
    slow = dtype.itemsize == 2 and view is None
    assert (large > 8 * small) if slow else (large < 3 * small + 1e-4), (dtype, view)
PYTHON
