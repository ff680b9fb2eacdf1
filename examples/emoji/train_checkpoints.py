"""
Train the tiny checkpoints of the example on its train split alone: the teachers (a CLIP of drawings and their names, a
DINOv2 of the drawings, a BERT of texts about the same drawing), and a LLaVA with the tower of that CLIP, which is taught to
name the drawings. The teachers stand in for CLIP ViT-L/14, DINOv2-base and BGE-base: nothing measured with them says how
the real ones would do.

    python examples/emoji/train_checkpoints.py --data examples/emoji --output_dir runs/emoji/checkpoints
"""

import argparse
import sys
import time
from functools import cache
from pathlib import Path

import torch
from transformers import CLIPModel

from hf_sugar.data import load_data
from hf_sugar.data.images import load_image, undecoded
from hf_sugar.evaluation import image_text_pairs


sys.path.insert(0, str(Path(__file__).parents[1] / "tiny_checkpoints"))
from train import pretrain_llava, save_checkpoint, train_bert, train_clip, train_dinov2  # noqa: E402


NAMES = ["clip", "dinov2", "bert", "llava"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("examples/emoji"), help="folder of the drawings")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/emoji/checkpoints"), help="where to save")
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=NAMES, help="which to train; the LLaVA needs the CLIP"
    )
    parser.add_argument("--clip_steps", type=int, default=500, help="steps of 64 pairs")
    parser.add_argument("--dinov2_steps", type=int, default=100, help="steps of 128 drawings")
    parser.add_argument("--bert_steps", type=int, default=200, help="steps of 64 pairs of texts")
    parser.add_argument("--llava_steps", type=int, default=1200, help="steps of 2048 tokens")
    parser.add_argument("--image_size", type=int, default=32, help="width and height that drawings are brought to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    started = time.monotonic()
    files = [args.data / name for name in ("captions_train.jsonl", "llava_train.json", "mmc4_train.jsonl")]
    size = (args.image_size, args.image_size)
    images, names = image_text_pairs(load_data(str(files[0])))
    images = [image.resize(size) for image in images]

    def save(name: str, model, processor, losses: list[float]):
        save_checkpoint(model, processor, args.output_dir / name)
        print(f"{name}: loss {sum(losses[-20:]) / len(losses[-20:]):.3f}, {time.monotonic() - started:.0f} s")

    if "clip" in args.only:
        save("clip", *train_clip(images, names, steps=args.clip_steps, batch_size=64, lr=1e-3, seed=args.seed))
    if "dinov2" in args.only:
        save("dinov2", *train_dinov2(images, steps=args.dinov2_steps, seed=args.seed))
    if "bert" in args.only:
        alike = [(name, f"a drawing of {name}") for name in names]
        save("bert", *train_bert(alike, steps=args.bert_steps, batch_size=64, seed=args.seed))
    if "llava" in args.only:
        rows = load_data([str(file) for file in files])
        drawing = cache(lambda path: load_image(path).resize(size))  # several rows name the same
        drawings = [[drawing(image["path"]) for image in row] for row in undecoded(rows)["images"]]
        clip = CLIPModel.from_pretrained(args.output_dir / "clip", dtype=torch.float32)
        save("llava", *pretrain_llava(rows, drawings, clip, steps=args.llava_steps, seed=args.seed))


if __name__ == "__main__":
    main()
