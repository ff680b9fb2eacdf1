#!/usr/bin/env bash
# Two processes, a plain Trainer: `evaluate()` before `train()` takes DDP away, without a word. Each process then trains a
# model of its own, and what is saved is the one of process 0. (accelerate 1.13 wraps the model in both orders.)
. "$(dirname "$0")/environment.sh" torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cat > train.py <<'P'
import sys
import torch
from transformers import Trainer, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 1)
    def forward(self, x, labels):
        return {"loss": ((self.layer(x)[:, 0] - labels) ** 2).mean()}

torch.manual_seed(1)
rows = [{"x": torch.randn(2), "labels": torch.randn(())} for _ in range(16)]
args = TrainingArguments("out", use_cpu=True, max_steps=4, per_device_train_batch_size=4, learning_rate=0.1,
                         report_to=[], save_strategy="no", disable_tqdm=True)
trainer = Trainer(Model(), args, train_dataset=rows, eval_dataset=rows)
if sys.argv[1] == "evaluate":
    trainer.evaluate()
trainer.train()
weights = trainer.accelerator.gather(trainer.model.layer.weight.detach())
if trainer.accelerator.is_main_process:
    print("RESULT", type(trainer.model_wrapped).__name__, "equal" if weights[0].equal(weights[1]) else "different")
P
for order in train evaluate; do
  torchrun --nproc-per-node 2 --master-addr 127.0.0.1 --master-port 29712 train.py "$order" 2> log > out.txt || { cat log; exit 1; }
  sed -n "s/^RESULT/$order first:/p" out.txt | tee -a results
done
diff results <(printf 'train first: DistributedDataParallel equal\nevaluate first: Model different\n')
