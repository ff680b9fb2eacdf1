#!/usr/bin/env bash
# Two processes on the CPU that are told to train under FSDP2, or under DeepSpeed's ZeRO-3, train under plain DDP: accelerate
# (1.15.0) gives each the whole model, and says nothing. What was tried on the CPU before the GPUs were paid for was not tried.
. "$(dirname "$0")/environment.sh" torch==2.13.0 accelerate==1.15.0 deepspeed==0.19.8
cat > run.py <<'P'
import torch
from accelerate import Accelerator

accelerator = Accelerator()
model, optimizer = torch.nn.Linear(8, 8), None
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
if accelerator.is_main_process:
    numbers = sum(parameter.numel() for parameter in model.parameters())
    print(accelerator.distributed_type.value, type(model).__name__, numbers)
P
found=""
for settings in \
  "ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_RESHARD_AFTER_FORWARD=true" \
  "ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_ZERO_STAGE=3 DS_ACCELERATOR=cpu"; do
  said=$(env $settings ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc_per_node 2 run.py 2> said.txt)
  echo "${settings%% *}: $said; warnings: $(grep -ciE "fsdp|deepspeed|ignor" said.txt || true)"
  [ "$said" = "MULTI_CPU DistributedDataParallel 72" ]
  ! grep -qiE "fsdp|deepspeed|ignor" said.txt
done
