"""`hf-longspec train` where accelerate takes CPUs that speak gloo for GPUs: otherwise it shards nothing over CPUs.

test_training_sharded.py starts this file by torchrun. All else is real: FSDP2, DeepSpeed, Trainer, our command.
"""

import os
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import training_args

from hf_longspec.cli import main

PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
training_args.is_torch_bf16_gpu_available = lambda: True

if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:  # typer's own
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)  # torch's caches keep FSDP2's group alive: gloo's threads would abort Python's own end
