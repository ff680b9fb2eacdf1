#!/usr/bin/env bash
# A LLaVA loaded and saved under DeepSpeed's ZeRO-3 has weights of other names than one saved by a single GPU. transformers
# (5.24.0) undoes at saving the renamings that it made at loading: elsewhere those that renamed something, under ZeRO-3 all that
# it knows, one for checkpoints of another layout among them. `language_model.model.x` becomes `language_model.model.model.x`.
# 5.24.0 reads both; what goes by the names does not: 4.57.6 makes the whole language model new, and warns.
. "$(dirname "$0")/environment.sh" torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 deepspeed==0.19.8
pip --disable-pip-version-check install -q -t earlier transformers==4.57.6 2> pip.log || { cat pip.log; exit 1; }
cat > zero3.py <<'P'
import os

os.environ.update(DS_ACCELERATOR="cpu", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29617")
import deepspeed
from transformers import LlavaForConditionalGeneration
from transformers.integrations import HfDeepSpeedConfig

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would be compiled
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
settings = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
known = HfDeepSpeedConfig(settings)
model = LlavaForConditionalGeneration.from_pretrained("before")
engine, *_ = deepspeed.initialize(model=model, config_params=settings)
model.save_pretrained("after", state_dict=engine._zero3_consolidated_16bit_state_dict())  # as Trainer saves
P
python - <<'P' 2> /dev/null
import os
import subprocess
import sys

import torch
from safetensors import safe_open
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
vision = CLIPVisionConfig(**size, image_size=28, patch_size=14)
text = LlamaConfig(**size, num_key_value_heads=2, vocab_size=64)
model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
model.save_pretrained("before")
subprocess.run([sys.executable, "zero3.py"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
names = [{*safe_open(f"{path}/model.safetensors", "pt").keys()} for path in ("before", "after")]
print("language model:", *(next(name for name in found if "embed_tokens" in name) for found in names))
print(f"{len(names[0] - names[1])} of {len(names[0])} weights have another name")
assert "language_model.model.model.embed_tokens.weight" in names[1]
check = """
import sys, transformers
from transformers import LlavaForConditionalGeneration
missing = LlavaForConditionalGeneration.from_pretrained(sys.argv[1], output_loading_info=True)[1]["missing_keys"]
print(transformers.__version__, sys.argv[1], len([name for name in missing if "language_model" in name]))
"""
for version, expected in (("", (0, 0)), ("earlier", (0, 11))):
    for path, number in zip(("before", "after"), expected):
        environment = {**os.environ, "PYTHONPATH": version}
        said = subprocess.run([sys.executable, "-c", check, path], capture_output=True, text=True, env=environment).stdout
        print(f"transformers, saved, weights of the language model made new: {said.strip()}")
        assert said.split()[-1] == str(number)
P
