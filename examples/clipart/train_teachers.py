"""
Train small stand-in teachers on the drawings: a CLIP of drawings and their titles, a DINOv2 of the drawings, and a BERT
of texts about the same drawing. They take the place of CLIP ViT-L/14, DINOv2-base and BGE-base where those cannot be
had; nothing measured with them says how the real ones would do.

python examples/clipart/train_teachers.py --data examples/clipart --output runs/clipart/teachers
"""

import argparse
import sys
from pathlib import Path

from hf_sugar.data import load_data, row_slices
from hf_sugar.evaluation import image_text_pairs


sys.path.insert(0, str(Path(__file__).parents[1] / "tiny_checkpoints"))
from train import save_checkpoint, train_bert, train_clip, train_dinov2  # noqa: E402


def pairs_of_documents(documents) -> tuple[list, list[str]]:
    """Each drawing of a document with the sentence behind it."""
    images, texts = [], []
    for row in documents:
        slices = row_slices(row)
        for image, text in zip(slices, slices[1:]):
            if not isinstance(image, str) and isinstance(text, str):
                images.append(image)
                texts.append(text)
    return images, texts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("examples/clipart"), help="folder of the clip-art set")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/clipart/teachers"), help="where to save the teachers"
    )
    parser.add_argument("--steps", type=int, default=200, help="steps of each teacher")
    parser.add_argument("--image_size", type=int, default=48, help="width and height that drawings are brought to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    images, texts = image_text_pairs(load_data({"path": str(args.data / "llava_train.json")}))
    more_images, more_texts = pairs_of_documents(load_data({"path": str(args.data / "mmc4_train.jsonl")}))
    size = (args.image_size, args.image_size)
    images, more_images = ([image.resize(size) for image in some] for some in (images, more_images))
    print(f"{len(images)} drawings with titles, {len(more_images)} with sentences in documents")

    clip, processor, _ = train_clip(images + more_images, texts + more_texts, steps=args.steps, seed=args.seed)
    save_checkpoint(clip, processor, args.output / "clip")
    dinov2, processor, _ = train_dinov2(images, steps=args.steps, seed=args.seed)
    save_checkpoint(dinov2, processor, args.output / "dinov2")
    # a title with its category and the title alone
    alike = [(text, text.split(". It belongs to")[0] + ".") for text in texts]
    bert, tokenizer, _ = train_bert(alike, steps=args.steps, seed=args.seed)
    save_checkpoint(bert, tokenizer, args.output / "bert")
    print(f"saved to {args.output}")


if __name__ == "__main__":
    main()
