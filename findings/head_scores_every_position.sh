#!/usr/bin/env bash
# TRL (1.16.0) trains through a fused LM head that, by its description, projects the positions that have a label. That holds
# where Triton runs, on NVIDIA and Intel GPUs. On a CPU or a Mac it projects all of them, so prompts, padding, and the hundreds
# of places of an image cost as much as the answer; with a large vocabulary that is most of a step's memory.
. "$(dirname "$0")/environment.sh" torch==2.13.0 transformers==5.24.0 trl==1.16.0
python - <<'P' 2> /dev/null
import torch
import trl.trainer.utils as utils
from transformers import LlamaConfig, LlamaForCausalLM

model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
utils.add_fused_lm_head(model)
print(" ".join(utils.add_fused_lm_head.__doc__.split("returns a")[0].split("With `fused_lm_head=True`")[1].split())[:110], "...")
apply, rows = utils._ChunkedLogProbFunction.apply, []
utils._ChunkedLogProbFunction.apply = lambda hidden, *rest: rows.append(len(hidden)) or apply(hidden, *rest)
tokens = torch.randint(64, (2, 601))
labels = tokens.clone()
labels[:, :-10] = -100
model(input_ids=tokens, labels=labels, fused_lm_head=True)
print(f"{int((labels[:, 1:] != -100).sum())} positions have a label, {rows[0]} are projected")
assert rows == [1200]
P
