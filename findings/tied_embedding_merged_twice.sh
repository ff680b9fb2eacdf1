#!/usr/bin/env bash
# LoRA on the embeddings of a model whose LM head is tied to them, with PEFT's own option for that (`ensure_weight_tying`):
# `merge_and_unload` adds the update to the shared matrix twice, so that the merged model is another one. No warning there.
. "$(dirname "$0")/environment.sh" torch==2.13.0 transformers==5.23.0 peft==0.21.2 numpy==2.4.6
python - <<'P' 2> /dev/null
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                     tie_word_embeddings=True)
model = LlamaForCausalLM(config).eval()
base = model.get_input_embeddings().weight.detach().clone()
lora = LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True, init_lora_weights=False)
adapted = get_peft_model(model, lora).eval()
ids = torch.arange(10)[None]
with torch.no_grad():
    before = adapted(input_ids=ids).logits
    update = adapted.get_input_embeddings().get_delta_weight("default")
    merged = adapted.merge_and_unload()
    after = merged(input_ids=ids).logits
    factor = ((merged.get_input_embeddings().weight - base) / update).median().item()
print(f"weights changed by {factor:.3f} times the update; largest logit {before.abs().max():.1f}, "
      f"largest change by merging {(after - before).abs().max():.1f}")
assert abs(factor - 2) < 1e-3 and (after - before).abs().max() > 0.1 * before.abs().max()
P
