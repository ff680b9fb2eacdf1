#!/usr/bin/env bash
# A deepcopy of an SFTTrainer's model (a snapshot, a frozen reference, an average of weights) answers with the weights of the
# original, and its gradients land there: the fused LM head has put a `forward` that belongs to the original into the object.
. "$(dirname "$0")/environment.sh" torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0 accelerate==1.15.0 numpy==2.4.6
python - <<'P' 2> /dev/null
import copy
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "b"])}, "<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
args = SFTConfig("out", use_cpu=True, bf16=False, report_to=[])
trainer = SFTTrainer(model, args, train_dataset=Dataset.from_dict({"text": ["a b"]}), processing_class=tokenizer)
snapshot = copy.deepcopy(trainer.model)
with torch.no_grad():
    for parameter in snapshot.parameters():
        parameter.zero_()
ids = torch.tensor([[4, 5]])
logits = snapshot(input_ids=ids).logits
logits.sum().backward()
original = trainer.model(input_ids=ids).logits
gradients = [sum(p.grad is not None for p in m.parameters()) for m in (snapshot, trainer.model)]
print(f"logits of a copy whose weights are all zero: up to {logits.abs().max():.3f}, equal to the original's: {logits.equal(original)}")
print(f"parameters with a gradient: copy {gradients[0]}, original {gradients[1]}")
assert logits.equal(original) and logits.abs().max() > 0 and gradients[0] == 0 < gradients[1]
P
