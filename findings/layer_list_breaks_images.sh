#!/usr/bin/env bash
# transformers 5.24, a stock LLaVA: `output_hidden_states=[-1]` (the last layer only) works for a text and raises a TypeError with
# an image, because the list reaches the vision tower, whose layer -2 is then None. With 5.23 both work.
. "$(dirname "$0")/environment.sh" torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cat > layers.py <<'P'
import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

size = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2)
model = LlavaForConditionalGeneration(LlavaConfig(
    text_config=LlamaConfig(vocab_size=64, num_hidden_layers=2, **size), image_token_index=4, image_seq_length=4,
    vision_config=CLIPVisionConfig(num_hidden_layers=3, image_size=28, patch_size=14, **size))).eval()
ids, image = torch.tensor([[5, 4, 4, 4, 4, 6]]), torch.zeros(1, 3, 28, 28)
for name, inputs in (("text", {"input_ids": ids[:, :1]}), ("image", {"input_ids": ids, "pixel_values": image})):
    for layers in (True, [-1]):
        try:
            states = model(**inputs, output_hidden_states=layers).hidden_states
            print(name, layers, "".join("-" if state is None else "T" for state in states))
        except TypeError as error:
            print(name, layers, "TypeError", error)
P
python layers.py 2> /dev/null | tee new
pip --disable-pip-version-check install -q transformers==5.23.0 2> /dev/null
echo "transformers 5.23.0"
python layers.py 2> /dev/null | tee old
diff new <(printf "text True TTT\ntext [-1] --T\nimage True TTT\nimage [-1] TypeError 'NoneType' object is not subscriptable\n")
diff old <(printf 'text True TTT\ntext [-1] --T\nimage True TTT\nimage [-1] --T\n')
