#!/usr/bin/env bash
# `gather_for_metrics` in one process: five rows in batches of two, two results a row. Nine results come out, not ten: the last
# batch is cut to the number of its rows, which is one.
. "$(dirname "$0")/environment.sh" torch==2.13.0 accelerate==1.15.0 numpy==2.4.6
python - <<'P'
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

accelerator = Accelerator(cpu=True)
loader = accelerator.prepare(DataLoader(torch.arange(5), batch_size=2))
results = torch.cat([accelerator.gather_for_metrics(batch.repeat_interleave(2)) for batch in loader])
print("processes:", accelerator.num_processes, " results:", results.tolist())
assert results.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4]
P
