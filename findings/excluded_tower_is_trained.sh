#!/usr/bin/env bash
# LoRA on `q_proj` of a LLaVA with `exclude_modules=["vision_tower"]` (or the string): the vision tower is adapted all the same.
# A list is compared with the ends of names and a string with whole names, so that only `.*vision_tower.*` keeps it out.
. "$(dirname "$0")/environment.sh" torch==2.13.0 transformers==5.23.0 peft==0.21.2 numpy==2.4.6
python - <<'P' 2> /dev/null
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

size = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2)
counts = []
for exclude in (None, ["vision_tower"], "vision_tower", ".*vision_tower.*"):
    model = LlavaForConditionalGeneration(LlavaConfig(
        text_config=LlamaConfig(vocab_size=64, num_hidden_layers=2, **size),
        vision_config=CLIPVisionConfig(num_hidden_layers=3, image_size=28, patch_size=14, **size)))
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], exclude_modules=exclude))
    names = [name for name, _ in model.named_modules() if name.endswith("lora_A")]
    counts.append(sum("vision_tower" in name for name in names))
    print(f"exclude_modules={exclude!r}: {counts[-1]} adapted layers in the vision tower")
assert counts == [3, 3, 3, 0]
P
