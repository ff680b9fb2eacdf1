#!/usr/bin/env bash
# 4096 ones added up in bfloat16 by `index_add` on the CPU: 256 where the target has one dimension, 4096 where it has two, and
# 4096 by `scatter_add`. A count of tokens kept in the dtype of the model stops at 256 in one of three ways to write it.
. "$(dirname "$0")/environment.sh" torch==2.13.0 numpy==2.4.6
python - <<'P'
import torch

ones, zeros = torch.ones(4096, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.long)
target = torch.zeros(1, dtype=torch.bfloat16)
sums = (target.index_add(0, zeros, ones).item(), target[:, None].index_add(0, zeros, ones[:, None].contiguous()).item(),
        target[:, None].expand(1, 8).clone().index_add(0, zeros, ones[:, None].expand(-1, 8).contiguous())[0, 0].item(),
        target.scatter_add(0, zeros, ones).item())
print("index_add 1-D, (1, 1), (1, 8), scatter_add:", sums)
assert sums[0] == 256 and sums[2] == 4096 and sums[3] == 4096
P
