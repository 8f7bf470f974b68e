#!/usr/bin/env bash
# torch 2.13.0, CPU.
#
# `torch.optim.Muon` makes the step of a matrix orthogonal in bfloat16, whatever the format of the matrix: on a CPU
# without arithmetic in bfloat16 (AVX2 only) one step of a matrix of 1536 × 576 takes seconds, where the same
# products in float32 take a tenth of a second. There is no option for it, no warning, and the docs name the format of
# no operation.
# Who meets it: whoever tries a recipe of a GPU on a CPU: the optimizer takes twenty times what forward and backward do.
#
# Seen on 2026-11-30 (AMD EPYC, AVX2, one thread; seconds, of a machine with other work):
#   products in torch.bfloat16
#   a step of Muon: 5.01 s; the same 15 products in float32: 0.18 s
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room"
"$room/bin/python" -m pip install -qq --no-compile torch==2.13.0 numpy
cd "$room"
bin/python - << 'PYTHON' 2> err.txt || { cat err.txt; exit 1; }
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)
formats = set()


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func.name():
            formats.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


weight = torch.nn.Parameter(torch.randn(1536, 576))
weight.grad = torch.randn_like(weight)
optimizer = torch.optim.Muon([weight], lr=1e-3)
with Watch():
    start = time.process_time()
    optimizer.step()
    step = time.process_time() - start
x = torch.randn(576, 1536)
start = time.process_time()
for _ in range(5):
    square = x @ x.T
    square @ square, square @ x
floats = time.process_time() - start
print("products in", *formats)
print(f"a step of Muon: {step:.2f} s; the same 15 products in float32: {floats:.2f} s")
assert weight.dtype == torch.float32 and formats == {torch.bfloat16}
PYTHON
