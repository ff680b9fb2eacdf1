"""
What the teachers' embeddings cost: preparing them, and reading them at every step.

`full`: images and texts a second of `add_teacher_embeddings`, and as a ratio to the bare forward pass of the same teachers on
the same batches. Architectures of full size (DINOv2-base, CLIP ViT-L/14, BERT-base) with random weights.
`tiny`: cold and warm runs with the tiny teachers of this package, and memory.
`collator`: milliseconds of collating a batch of 8 rows of an image of 336 pixels and a text, with and without the column.
`padding`: how much of a block of 512 texts, of captions and of documents, is padding where texts of like length share a batch, and
how much faster the text teacher is with them laid end to end (of every fourth batch).

python benchmarks/prepare.py full --images 64
python benchmarks/prepare.py tiny --rows 1000 20000
python benchmarks/prepare.py collator
python benchmarks/prepare.py padding
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
from transformers import AutoTokenizer, BertConfig, BertModel, CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging

from hf_sugar import SugarProcessor, TripleEncoder
from hf_sugar.teachers import add_teacher_embeddings
from hf_sugar.training import SugarCollator
from hf_sugar.world import checkpoint


PART = {"type": Value("string"), "text": Value("string")}
FEATURES = Features(
    {
        "messages": [{"role": Value("string"), "content": [PART]}],
        "images": List(Image()),
        "loss_on": Value("string"),
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
    return {"messages": [{"role": "user", "content": content}], "images": images, "loss_on": "text"}


def dataset(directory: Path, count: int, **kwargs) -> Dataset:
    """On disk, so that it is mapped and not held in memory."""
    made = Dataset.from_generator(
        lambda: (row(i, **kwargs) for i in range(count)), features=FEATURES, cache_dir=str(directory / "made")
    )
    made.save_to_disk(directory / "data")
    return load_from_disk(directory / "data")


def full_teachers(directory: Path, layers: int | None) -> dict[str, str]:
    torch.manual_seed(0)
    few = {} if layers is None else {"num_hidden_layers": layers}
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {**large, "patch_size": 14, "image_size": 224, **few}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, **few}
    end = AutoTokenizer.from_pretrained(checkpoint("clip")).eos_token_id
    clip = CLIPConfig(text_config={**text, "eos_token_id": end}, vision_config=vision, projection_dim=768)
    for name, model in (
        ("image", Dinov2Model(Dinov2Config(image_size=518, patch_size=14, **few))),
        ("text", BertModel(BertConfig(**few))),
        ("cross", CLIPModel(clip)),
    ):
        model.save_pretrained(directory / name)
    size = {"height": 224, "width": 224}
    BitImageProcessorPil(size={"shortest_edge": 256}, crop_size=size).save_pretrained(directory / "image")
    CLIPImageProcessorPil().save_pretrained(directory / "cross")
    for name, tokens, length in (("text", "bert", 512), ("cross", "clip", 77)):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint(tokens))
        tokenizer.model_max_length = length
        tokenizer.save_pretrained(directory / name)
    return {name: str(directory / name) for name in ("image", "text", "cross")}


@torch.no_grad()
def bare(encoder: TripleEncoder, slices: list) -> float:
    """Seconds of the forward passes alone; pixels and tokens are ready."""
    images = not isinstance(slices[0], str)
    teachers = (encoder._image if images else encoder._text, encoder._cross)
    slices = slices if images else sorted(slices, key=len)
    inputs = []
    for start in range(0, len(slices), encoder.batch_size):
        batch = slices[start : start + encoder.batch_size]
        inputs.append(
            [
                teacher.image_processor([image.convert("RGB") for image in batch], return_tensors="pt")
                if images
                else teacher.tokenizer(batch, padding=True, return_tensors="pt")
                for teacher in teachers
            ]
        )
    started = time.perf_counter()
    for first, second in inputs:
        teachers[0].model(**first)
        (teachers[1].model.get_image_features if images else teachers[1].model.get_text_features)(**second)
    return time.perf_counter() - started


def full(args, directory: Path):
    encoder = TripleEncoder.from_teachers(full_teachers(directory / "teachers", args.layers), device="cpu")
    assert encoder.dim  # loads the weights
    print("| slices | prepare (1/s) | bare forward pass (1/s) | ratio |\n|---|---|---|---|")
    for kind in ("image", "text"):
        data = dataset(directory / kind, args.images, words=12, size=480, image=kind == "image", text=kind == "text")
        slices = [r["images"][0] if r["images"] else r["messages"][0]["content"][0]["text"] for r in data]
        bare(encoder, slices[: encoder.batch_size])  # warm up
        prepare, forward = [], []
        for repeat in range(args.repeats):
            if repeat % 2 == 0:  # alternated, and each goes first as often as the other
                forward.append(bare(encoder, slices))
            started = time.perf_counter()
            add_teacher_embeddings(data, encoder, directory / f"cache-{kind}-{repeat}")
            prepare.append(time.perf_counter() - started)
            if repeat % 2:
                forward.append(bare(encoder, slices))
        ratio = statistics.median(a / b for a, b in zip(forward, prepare))
        speeds = [len(slices) / statistics.median(seconds) for seconds in (prepare, forward)]
        print(f"| {len(slices)} {kind}s | {speeds[0]:.2f} | {speeds[1]:.2f} | {ratio:.3f} |", flush=True)


def anonymous_memory() -> float:
    """MiB of memory that is the process's own; pages of mapped files, which the system takes back as it likes, are not."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


def tiny(args, directory: Path):
    encoder = TripleEncoder.from_teachers("tiny", device="cpu")
    add_teacher_embeddings(dataset(directory / "warm-up", 64, words=8, size=64), encoder, directory / "warm-up-cache")
    print("| rows | cold (s) | warm (s) | cold / warm | memory after cold (MiB) |\n|---|---|---|---|---|")
    for count in args.rows:
        data = dataset(directory / str(count), count, words=8, size=64)
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            add_teacher_embeddings(data, encoder, directory / f"cache-{count}")
            seconds.append(time.perf_counter() - started)
            if len(seconds) == 1:
                memory = anonymous_memory()
        cold, warm = seconds
        print(f"| {count} | {cold:.2f} | {warm:.3f} | {cold / warm:.0f} | {memory:.0f} |", flush=True)


def collator(args, directory: Path):
    encoder = TripleEncoder.from_teachers(full_teachers(directory / "teachers", 1), device="cpu")
    processor = SugarProcessor.from_pretrained(checkpoint("llava"))
    processor.patch_size = 14
    processor.num_additional_image_tokens = 1
    processor.vision_feature_select_strategy = "default"
    size = {"height": 336, "width": 336}
    processor.image_processor.size, processor.image_processor.crop_size = {"shortest_edge": 336}, size
    data = dataset(directory, 16, words=8, size=336)
    data = add_teacher_embeddings(data, encoder, directory / "cache").cast_column("images", List(Image(decode=False)))
    data = data.with_format("numpy", columns=["teacher_embeddings"], output_all_columns=True)
    with_column, without = SugarCollator(processor, teachers=encoder.record), SugarCollator(processor)
    times = []
    for n in range(args.repeats + 1):
        pair = []
        for collate in (with_column, without):
            started = time.process_time()
            collate(data.__getitems__([(8 * n + i) % 16 for i in range(8)]))
            pair.append(1000 * (time.process_time() - started))
        times.append(pair)
    together, plain = (statistics.median(column) for column in zip(*times[1:]))
    share = statistics.median(a - b for a, b in times[1:])
    print(
        f"processor time of a batch: {together:.1f} ms with the column, {plain:.1f} ms without; difference {share:.2f} ms"
    )


@torch.no_grad()
def padding(args, directory: Path):
    encoder = TripleEncoder.from_teachers(full_teachers(directory / "teachers", args.layers), device="cpu")
    teacher, random = encoder._text, np.random.RandomState(0)
    assert teacher.padding_free
    print("| texts | words | tokens | padding, sorted by length | padded (texts/s) | end to end (texts/s) | ratio |")
    print("|---|---|---|---|---|---|---|")
    for kind, least, most in (("captions", 5, 25), ("parts of documents", 20, 400)):
        counts = np.exp(random.uniform(np.log(least), np.log(most), 512)).astype(int)
        texts = sorted((" ".join(random.choice(WORDS, count)) for count in counts), key=len)
        batches = [texts[start : start + encoder.batch_size] for start in range(0, len(texts), encoder.batch_size)]
        masks = [teacher.tokenizer(batch, padding=True, return_tensors="pt")["attention_mask"] for batch in batches]
        tokens = sum(int(mask.sum()) for mask in masks)
        speeds = []
        for _ in range(args.repeats + 1):
            speeds.append([])
            for teacher.padding_free in (False, True):
                started = time.perf_counter()
                count = sum(len(teacher.texts(batch)) for batch in batches[::4])
                speeds[-1].append(count / (time.perf_counter() - started))
        padded, laid = (statistics.median(column) for column in zip(*speeds[1:]))  # the first warms up
        ratio = statistics.median(b / a for a, b in speeds[1:])
        share = 1 - tokens / sum(mask.numel() for mask in masks)
        print(
            f"| {kind} | {least} to {most} | {tokens} | {share:.1%} | {padded:.1f} | {laid:.1f} | {ratio:.2f} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=("full", "tiny", "collator", "padding"))
    parser.add_argument("--images", type=int, default=64, help="images, and texts, of `full`")
    parser.add_argument("--layers", type=int, help="layers of every teacher of `full`, instead of their own")
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 5000, 20000], help="of `tiny`")
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as directory:
        globals()[args.run](args, Path(directory))


if __name__ == "__main__":
    main()
