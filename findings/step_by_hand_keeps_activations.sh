#!/usr/bin/env bash
# `gradient_checkpointing=True` does nothing for a `training_step` that is called by hand: Trainer (transformers 5.24.0) switches
# it on in `train()`, not where it is made. A profile or a memory figure of single steps is then that of another training.
. "$(dirname "$0")/environment.sh" torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
python - <<'P' 2> /dev/null
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2))
rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 2
trainer_args = 0
args = TrainingArguments("run", gradient_checkpointing=True, max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
trainer = Trainer(model, args, train_dataset=rows)
trainer.current_gradient_accumulation_steps = 1  # `train()` sets this too
calls = []
model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
trainer.training_step(model, next(iter(trainer.get_train_dataloader())))
by_hand = len(calls)
calls.clear()
trainer.train()
print(f"calls of a layer in one step: {by_hand} by hand, {len(calls)} in `train()` (checkpointing computes it twice)")
assert (by_hand, len(calls)) == (1, 2)
P
