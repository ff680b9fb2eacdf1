"""
What `hf-sugar prepare` costs.

`full`: images and texts a second of filling a cache, and as a ratio to the bare forward pass of the same teachers on the
same batches. Architectures of full size (DINOv2-base, CLIP ViT-L/14, BERT-base) with random weights.
`tiny`: with the tiny teachers of the embedded world, cold and warm runs, memory, and the label lookup of a batch.

python benchmarks/prepare.py full --images 64
python benchmarks/prepare.py tiny --rows 1000 20000
python benchmarks/prepare.py full --images 4 --layers 1 && python benchmarks/prepare.py tiny --rows 50 100   # short
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value, load_from_disk
from PIL import Image as PILImage
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging

from hf_sugar import TripleEncoder
from hf_sugar.cli.demo import world_teachers
from hf_sugar.teachers import TeacherCache
from hf_sugar.world import checkpoint


FEATURES = Features(
    {
        "messages": [{"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}],
        "images": List(Image()),
    }
)
WORDS = "a red blue green small large circle square star left right of above below two three".split()


def row(i: int, words: int, size: int, image: bool = True, text: bool = True) -> dict:
    random = np.random.RandomState(i)
    content, images = [], []
    if image:
        coarse = random.randint(0, 256, (8, 8, 3), dtype=np.uint8)
        images.append(PILImage.fromarray(coarse).resize((size, size)))
        content.append({"type": "image", "text": None})
    if text:
        content.append({"type": "text", "text": f"{i} " + " ".join(random.choice(WORDS, words))})
    return {"messages": [{"role": "user", "content": content}], "images": images}


def dataset(directory: Path, count: int, **kwargs) -> Dataset:
    """On disk, so that it is mapped and not held in memory."""
    Dataset.from_generator(
        lambda: (row(i, **kwargs) for i in range(count)), features=FEATURES, cache_dir=str(directory / "generated")
    ).save_to_disk(directory / "data")
    return load_from_disk(directory / "data")


def full_teachers(directory: Path, layers: int | None) -> dict[str, str]:
    torch.manual_seed(0)
    few = {} if layers is None else {"num_hidden_layers": layers}
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {**large, "patch_size": 14, "image_size": 224, **few}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, **few}
    clip = CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)
    for name, model in (
        ("image", Dinov2Model(Dinov2Config(image_size=518, patch_size=14, **few))),
        ("text", BertModel(BertConfig(**few))),
        ("cross", CLIPModel(clip)),
    ):
        model.save_pretrained(directory / name)
    BitImageProcessorPil(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}).save_pretrained(
        directory / "image"
    )
    CLIPImageProcessorPil().save_pretrained(directory / "cross")
    for name, tokens, length in (("text", "bert", 512), ("cross", "clip", 77)):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint(tokens))
        tokenizer.model_max_length = length
        tokenizer.save_pretrained(directory / name)
    return {name: str(directory / name) for name in ("image", "text", "cross")}


@torch.no_grad()
def bare_images(encoder: TripleEncoder, images: list) -> float:
    """Seconds of the forward passes alone; the pixels are ready."""
    pixels = [
        teacher.image_processor([image.convert("RGB") for image in images], return_tensors="pt")
        for teacher in (encoder._image, encoder._cross)
    ]
    started = time.perf_counter()
    for start in range(0, len(images), encoder.batch_size):
        batch = slice(start, start + encoder.batch_size)
        encoder._image.model(pixel_values=pixels[0]["pixel_values"][batch])
        encoder._cross.model.get_image_features(pixel_values=pixels[1]["pixel_values"][batch])
    return time.perf_counter() - started


@torch.no_grad()
def bare_texts(encoder: TripleEncoder, texts: list[str]) -> float:
    texts = sorted(texts, key=len)
    batches = [texts[start : start + encoder.batch_size] for start in range(0, len(texts), encoder.batch_size)]
    tokens = [
        [teacher.tokenizer(batch, padding=True, return_tensors="pt") for teacher in (encoder._text, encoder._cross)]
        for batch in batches
    ]
    started = time.perf_counter()
    for first, second in tokens:
        encoder._text.model(**first)
        encoder._cross.model.get_text_features(**second)
    return time.perf_counter() - started


def full(args, directory: Path):
    encoder = TripleEncoder.from_teachers(full_teachers(directory / "teachers", args.layers), device="cpu")
    assert encoder.dim  # loads the weights
    print("| slices | prepare (1/s) | bare forward pass (1/s) | ratio |\n|---|---|---|---|")
    for kind, bare in (("image", bare_images), ("text", bare_texts)):
        data = dataset(
            directory / kind, args.images, words=12, size=args.size, image=kind == "image", text=kind == "text"
        )
        if kind == "image":
            slices = [sample["images"][0] for sample in data]
        else:
            slices = [sample["messages"][0]["content"][0]["text"] for sample in data]
        bare(encoder, slices[: encoder.batch_size])  # warm up
        prepare, forward = [], []
        for repeat in range(args.repeats):
            if repeat % 2 == 0:  # alternated, and each goes first as often as the other
                forward.append(bare(encoder, slices))
            cache = TeacherCache.for_encoder(directory / f"cache-{kind}-{repeat}", encoder)
            started = time.perf_counter()
            counts = cache.fill(data, encoder)
            prepare.append(time.perf_counter() - started)
            assert counts["encoded"] == len(slices)
            if repeat % 2:
                forward.append(bare(encoder, slices))
        ratio = statistics.median(a / b for a, b in zip(forward, prepare))
        speeds = [len(slices) / statistics.median(seconds) for seconds in (prepare, forward)]
        print(f"| {len(slices)} {kind}s | {speeds[0]:.2f} | {speeds[1]:.2f} | {ratio:.3f} |", flush=True)


def anonymous_memory() -> float:
    """MiB of memory that is the process's own; pages of mapped files, which the system takes back as it likes, are not."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def tiny(args, directory: Path):
    encoder = TripleEncoder.from_teachers(world_teachers(), device="cpu")
    assert encoder.dim
    warm_up = dataset(directory / "warm-up", 64, words=8, size=64)
    TeacherCache.for_encoder(directory / "cache-warm-up", encoder).fill(warm_up, encoder)
    print("| rows | cold (s) | warm (s) | cold / warm | memory after cold (MiB) |\n|---|---|---|---|---|")
    for count in args.rows:
        data = dataset(directory / str(count), count, words=8, size=64)
        place = directory / f"cache-{count}"
        started = time.perf_counter()
        counts = TeacherCache.for_encoder(place, encoder).fill(data, encoder)
        cold = time.perf_counter() - started
        memory = anonymous_memory()
        started = time.perf_counter()
        again = TeacherCache.for_encoder(place, encoder).fill(data, encoder)
        warm = time.perf_counter() - started
        assert counts["encoded"] == 2 * count and again["encoded"] == 0
        print(f"| {count} | {cold:.2f} | {warm:.3f} | {cold / warm:.0f} | {memory:.0f} |", flush=True)
    cache = TeacherCache.for_encoder(place, encoder)
    batches = [data.select(np.random.RandomState(n).randint(0, len(data), 16)) for n in range(20)]
    slices = [
        [item for sample in batch for item in (sample["images"][0], sample["messages"][0]["content"][1]["text"])]
        for batch in batches
    ]
    times = []
    for batch in slices:
        started = time.perf_counter()
        cache.lookup(batch)
        times.append(time.perf_counter() - started)
    print(f"\nlabel lookup of 16 images and 16 texts among {len(cache)}: {1000 * statistics.median(times):.2f} ms")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("full")
    command.set_defaults(run=full)
    command.add_argument("--images", type=int, default=64, help="images, and texts")
    command.add_argument("--size", type=int, default=480, help="height and width of the images")
    command.add_argument("--repeats", type=int, default=4)
    command.add_argument("--layers", type=int, help="layers of every teacher, instead of their own")
    command = commands.add_parser("tiny")
    command.set_defaults(run=tiny)
    command.add_argument("--rows", type=int, nargs="+", default=[1000, 5000, 20000])
    args = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as directory:
        args.run(args, Path(directory))


if __name__ == "__main__":
    main()
