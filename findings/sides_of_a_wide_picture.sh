#!/usr/bin/env bash
# transformers (5.24.0) prepares a picture for CLIP, DINOv2 and LLaVA-1.5 by cutting out the square in its middle: of 16:9 the outer
# 44 % are not seen, by model or teacher, and two pictures that differ there alone are equal to the last bit. The original LLaVA-1.5
# was trained on whole pictures, padded to a square (huggingface/transformers#33175: padding gives its logits). LLaVA's own image
# processor pads where it is told `do_pad=True`, which it is not by itself (#33191: that would have changed figures).
. "$(dirname "$0")/environment.sh" torch==2.13.0 transformers==5.24.0 pillow==12.3.0 numpy==2.4.6
python - <<'P' 2> /dev/null
import numpy as np
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

WIDTH, HEIGHT = 640, 360
rng = np.random.default_rng(0)
picture = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def columns_seen(processor):
    """Share of 16 strips of the picture that change its pixels when they are painted over."""
    def prepared(pixels):
        return processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"]

    changed = []
    for strip in np.split(np.arange(WIDTH), 16):
        painted = picture.copy()
        painted[:, strip] = 0
        changed.append(not np.array_equal(prepared(painted), prepared(picture)))
    return sum(changed) / len(changed)


square = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
found = {
    "CLIP": columns_seen(CLIPImageProcessorPil(**square)),
    "DINOv2": columns_seen(BitImageProcessorPil(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})),
    "LLaVA": columns_seen(LlavaImageProcessorPil(**square)),
    "LLaVA, do_pad": columns_seen(LlavaImageProcessorPil(**square, do_pad=True)),
}
print({name: f"{share:.0%} of the strips seen" for name, share in found.items()})
assert found["CLIP"] == found["LLaVA"] == 10 / 16 and found["DINOv2"] <= 10 / 16 and found["LLaVA, do_pad"] == 1
P
