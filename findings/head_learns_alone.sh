#!/usr/bin/env bash
# Two processes, a LLaVA of transformers under FSDP2, TRL's fused LM head: the gradients of every weight are the mean of the two
# processes', but those of the LM head are each process's own, without a word. accelerate puts the head of a text model behind
# its last norm, so that its weight is whole when TRL reads it; in an image-text model it finds no such norm, and TRL takes
# the divided weight by `full_tensor()`, without `grad_placements`. (accelerate takes FSDP settings of processes with
# accelerators alone; these are told that they have some.)
. "$(dirname "$0")/environment.sh" torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 trl==1.16.0 numpy==2.4.6
cat > train.py <<'P'
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from trl.trainer.utils import add_fused_lm_head

start = PartialState.__init__
def with_accelerator(self, *args, **kwargs):
    start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU
PartialState.__init__ = with_accelerator

def llava():
    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**small, image_size=28, patch_size=14),
                         text_config=LlamaConfig(**small, vocab_size=384),
                         image_token_index=4, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config).train()
    add_fused_lm_head(model)
    return model

accelerator = Accelerator(cpu=True)
plain, model = llava(), llava()
ids = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(dist.get_rank()))
ids[:, 1:5] = 4
inputs = dict(input_ids=ids, labels=ids.masked_fill(ids == 4, -100), pixel_values=torch.ones(2, 3, 28, 28),
              attention_mask=torch.ones_like(ids), fused_lm_head=True)
plain(**inputs).loss.backward()
model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
accelerator.backward(model(**inputs).loss)
divided = dict(model.named_parameters())
for name, parameter in plain.named_parameters():
    if parameter.grad is not None and parameter.grad.any():
        mean = parameter.grad.clone()
        dist.all_reduce(mean)
        error = (divided[name].grad.full_tensor() - mean / 2).norm() / (mean / 2).norm()
        if error > 1e-3 and accelerator.is_main_process:
            print("WRONG", name)
P
export ACCELERATE_USE_CPU=true ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP
export FSDP_TRANSFORMER_CLS_TO_WRAP=LlamaDecoderLayer,CLIPEncoderLayer
torchrun --nproc-per-node 2 --master-addr 127.0.0.1 --master-port 29713 train.py 2> log > out.txt || { cat log; exit 1; }
diff out.txt <(echo "WRONG lm_head.weight")
