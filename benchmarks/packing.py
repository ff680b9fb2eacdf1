"""
Rows laid end to end against padded rows.

`train`: tokens (padding not counted) a second of a step of SugarTrainer with LoRA and activation checkpointing, and the peak
memory of each in a process of its own; rows as in LLaVA-1.5's mix, with documents: 40 to 1,500 tokens, in random order.
`embed`: images a second of SugarEmbedder with a LLaVA (all images as many tokens) and with a LLaVA-NeXT (1,065 to 2,927
tokens), against batches put together without a look at tokens and padded. sentence-transformers' `encode` of the exported
model beside it, where it is installed.
The ways are alternated; medians, and medians of ratios of neighbours.

python benchmarks/packing.py train --hidden 1024 --layers 12 --steps 3
python benchmarks/packing.py embed --hidden 256 --layers 4 --images 32
python benchmarks/packing.py train --hidden 64 --layers 2 --steps 1 && python benchmarks/packing.py embed --hidden 64 --layers 2 --images 4   # short
"""

import argparse
import importlib.util
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from prepare import WORDS
from train_step import FEATURES, llava, step
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor, set_seed
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.utils import logging

from hf_sugar import SugarEmbedder, SugarForConditionalGeneration, SugarProcessor, SugarTrainer, SugarTrainingConfig
from hf_sugar.export import export_sentence_transformers


# Share of rows, images, and words from and to.
KINDS = [(0.5, 1, 20, 150), (0.15, 1, 150, 700), (0.1, 0, 30, 1300), (0.25, 2, 60, 300)]
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SHAPES = [(300, 300), (400, 900), (900, 400), (700, 700), (1100, 330), (330, 1100), (640, 480), (200, 800)]


def picture(random: np.random.RandomState, height: int, width: int) -> Image.Image:
    return Image.fromarray(random.randint(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height))


def mixed_rows(count: int, size: int) -> Dataset:
    random, data = np.random.RandomState(0), []
    for _ in range(count):
        _, images, least, most = KINDS[random.choice(len(KINDS), p=[kind[0] for kind in KINDS])]
        words = random.choice(WORDS, int(np.exp(random.uniform(np.log(least), np.log(most)))))
        parts = [{"type": "text", "text": " ".join(part)} for part in np.array_split(words, max(1, images))]
        question = [part for text in parts for part in ({"type": "image", "text": None}, text)[images == 0 :]]
        answer = question.pop() if images else {"type": "text", "text": "a red circle"}
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": [answer]}]
        data.append({"messages": messages, "images": [picture(random, size, size) for _ in range(images)]})
    return Dataset.from_list(data, features=FEATURES)


def trainer(padding_free: bool, directory: Path, data: Dataset, batch: int) -> SugarTrainer:
    logging.set_verbosity_error()
    config = SugarTrainingConfig(
        str(directory / "sugar"),
        padding_free=padding_free,
        teachers="tiny",
        teacher_cache_dir=str(directory / "cache"),
        per_device_train_batch_size=batch,
        report_to="none",
        bf16=False,
        disable_tqdm=True,
    )
    made = SugarTrainer(str(directory / "llava"), config, data, peft_config=LoraConfig(r=16, lora_alpha=32))
    made.create_optimizer_and_scheduler(100)
    made.current_gradient_accumulation_steps = 1
    return made


def peak(padding_free: bool, directory: Path, data: Dataset, batch: int) -> float:
    """GiB at most of a process that makes this trainer and takes a step."""
    alone = trainer(padding_free, directory, data, batch)
    step(alone, [alone.train_dataset[n] for n in range(batch)])
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def train(args, directory: Path):
    data = mixed_rows(args.batch * (args.steps + 1), args.image_size)
    llava(args, directory / "llava")

    def apart(function, *arguments):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(function, *arguments, directory, data, args.batch).result()

    trainers = {name: trainer(name == "end to end", directory, data, args.batch) for name in ("padded", "end to end")}
    speeds, work, shares = {name: [] for name in trainers}, {name: [] for name in trainers}, []
    for n in range(args.steps + 1):
        rows = [trainers["padded"].train_dataset[n * args.batch + i] for i in range(args.batch)]
        mask = trainers["padded"].data_collator(rows)["attention_mask"]
        shares.append(mask.float().mean().item())
        print(f"batch {n}: rows of {mask.sum(dim=1).tolist()} tokens", flush=True)
        for name in list(trainers)[:: 1 if n % 2 else -1]:
            started = time.process_time()
            speeds[name].append(int(mask.sum()) / step(trainers[name], rows)[1])
            work[name].append(int(mask.sum()) / (time.process_time() - started))
            print(f"{name}: {speeds[name][-1]:.1f} tokens/s, {work[name][-1]:.1f} a CPU second", flush=True)
    memory = {name: apart(peak, name == "end to end") for name in trainers}
    print(f"\nbatches of {args.batch} rows, of whose places {statistics.mean(shares):.0%} are tokens\n")
    print("| way | tokens/s | tokens a CPU second | peak memory (GiB) |\n|---|---|---|---|")
    for name in trainers:
        medians = [statistics.median(values[name][1:]) for values in (speeds, work)]
        print(f"| {name} | {medians[0]:.1f} | {medians[1]:.1f} | {memory[name]:.2f} |")
    for unit, values in (("tokens/s", speeds), ("tokens a CPU second", work)):
        ratios = [free / padded for padded, free in zip(values["padded"][1:], values["end to end"][1:])]
        print(f"{unit}, end to end / padded: {statistics.median(ratios):.2f}")
    print(f"peak memory, end to end / padded: {memory['end to end'] / memory['padded']:.2f}")


def llava_next(directory: Path):
    """The language model and vision tower of the LLaVA beside it, with another way to cut images."""
    plain = SugarForConditionalGeneration.from_pretrained(directory / "llava").config.vlm_config
    parts = SugarProcessor.from_pretrained(directory / "llava")
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": plain.vision_config.image_size},
        crop_size={"height": plain.vision_config.image_size, "width": plain.vision_config.image_size},
        image_grid_pinpoints=PINPOINTS,
    )
    settings = dict(patch_size=14, num_additional_image_tokens=1, vision_feature_select_strategy="default")
    processor = LlavaNextProcessor(images, parts.tokenizer, chat_template=parts.chat_template, **settings)
    config = LlavaNextConfig(
        text_config=plain.text_config,
        vision_config=plain.vision_config,
        image_token_index=plain.image_token_id,
        image_grid_pinpoints=PINPOINTS,
    )
    set_seed(0)
    LlavaNextForConditionalGeneration(config).save_pretrained(directory / "llava_next")
    processor.save_pretrained(directory / "llava_next")


def embedding_ways(path: Path, processor: SugarProcessor, batch: int) -> dict:
    model = SugarForConditionalGeneration.from_pretrained(path, retrieval_dim=128).eval()
    embedder = SugarEmbedder(model, processor, batch)

    def before(images):
        model.padding_free = False
        found = [embedder(images[n : n + batch]) for n in range(0, len(images), batch)]
        model.padding_free = True
        return np.concatenate(found)

    ways = {"padded, in the order given": before, "SugarEmbedder": embedder}
    if importlib.util.find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        exported = path.with_name(f"{path.name}_st")
        export_sentence_transformers(model, processor, exported)
        exported = SentenceTransformer(str(exported), device="cpu", trust_remote_code=True)
        ways["sentence-transformers"] = partial(exported.encode, batch_size=batch)
    return ways


def embed(args, directory: Path):
    llava(args, directory / "llava")
    llava_next(directory)
    random = np.random.RandomState(0)
    images = [picture(random, *SHAPES[random.randint(len(SHAPES))]) for _ in range(args.images)]
    for family in ("llava", "llava_next"):
        processor = SugarProcessor.from_pretrained(directory / family)
        ways = embedding_ways(directory / family, processor, args.batch)
        seconds, results = {name: [] for name in ways}, {}
        for n in range(args.steps + 1):
            for name in list(ways)[:: 1 if n % 2 else -1]:
                started = time.perf_counter(), time.process_time()
                results[name] = ways[name](images)
                seconds[name].append(time.perf_counter() - started[0])
                work = time.process_time() - started[1]
                print(f"{name}: {seconds[name][-1]:.2f} s, {work:.2f} CPU seconds", flush=True)
        tokens = processor.count_tokens([""] * len(images), [[image.size[::-1]] for image in images])
        print(f"\n{family}: {len(images)} images of {min(tokens)} to {max(tokens)} tokens, batches of {args.batch}\n")
        print("| way | images/s | SugarEmbedder is faster by | largest difference |\n|---|---|---|---|")
        for name in ways:
            ratios = [a / b for a, b in zip(seconds[name][1:], seconds["SugarEmbedder"][1:])]
            difference = np.abs(results[name] - results["SugarEmbedder"]).max()
            speed = len(images) / statistics.median(seconds[name][1:])
            print(f"| {name} | {speed:.2f} | {statistics.median(ratios):.2f} | {difference:.0e} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "embed"])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--image_size", type=int, default=336)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="alternated rounds, after one that is not counted")
    parser.add_argument("--images", type=int, default=32, help="images to embed")
    args = parser.parse_args()
    logging.set_verbosity_error()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        {"train": train, "embed": embed}[args.what](args, Path(directory))
    print(f"the whole: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
