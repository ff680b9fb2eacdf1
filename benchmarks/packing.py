"""
Rows laid end to end against padded rows.

`train`: tokens (padding not counted) a second of a step of SugarTrainer with LoRA and activation checkpointing, and the peak
memory; rows as in LLaVA-1.5's mix, with documents: 40 to 1,500 tokens, in random order.
`embed`: images a second of SugarEmbedder with a LLaVA (all images as many tokens) and with a LLaVA-NeXT (1,065 to 2,927
tokens). sentence-transformers' `encode` of the exported model beside it, where it is installed.
Each way in a process of its own, the padded one of an earlier build if `--before` names its directory; they are alternated.
Medians, and medians of ratios of neighbours.

python benchmarks/packing.py train --hidden 1024 --layers 12 --steps 2
python benchmarks/packing.py embed --hidden 256 --layers 4 --images 16
python benchmarks/packing.py train --hidden 64 --layers 2 --steps 1 && python benchmarks/packing.py embed --hidden 64 --layers 2 --images 4   # short
"""

import argparse
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from prepare import WORDS
from train_step import FEATURES, llava
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor, set_seed
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.utils import logging

import hf_sugar
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


def start(make, *arguments, source: str | None = None) -> ProcessPoolExecutor:
    """A process of its own, in which `make` gives the function to be timed; of another build of the package, if `source` says so."""
    path = list(sys.path)
    sys.path[:0] = [str(Path(source, "src").absolute())] if source else []
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _make, (make, *arguments))
    print(f"a process with {process.submit(_package).result()}", flush=True)
    sys.path[:] = path
    return process


def _make(make, *arguments):
    global _function
    logging.set_verbosity_error()
    _function = make(*arguments)


def _package() -> str:
    return hf_sugar.__file__


def _work(*arguments) -> tuple[Any, float, float, float]:
    """What comes of it, seconds, CPU seconds, and the GiB that the process had at most until now."""
    started = time.perf_counter(), time.process_time()
    value = _function(*arguments)
    seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    return value, *seconds, int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def alternated(ways: dict[str, ProcessPoolExecutor], rounds: list) -> tuple[dict[str, np.ndarray], dict[str, list]]:
    """Seconds, CPU seconds and GiB of each way in each round but the first, and what came of each round."""
    measured, values = {name: [] for name in ways}, {name: [] for name in ways}
    for n, argument in enumerate(rounds):
        for name in list(ways)[:: 1 if n % 2 else -1]:
            value, *found = ways[name].submit(_work, argument).result()
            measured[name].append(found)
            values[name].append(value)
            print(f"round {n}, {name}: {found[0]:.2f} s, {found[1]:.2f} CPU seconds, {found[2]:.2f} GiB", flush=True)
    for process in ways.values():
        process.shutdown()
    return {name: np.array(found[1:]) for name, found in measured.items()}, values


def steps(padding_free: bool, directory: Path, data: Dataset):
    config = SugarTrainingConfig(
        str(directory / "sugar"),
        padding_free=padding_free,
        teachers="tiny",
        teacher_cache_dir=str(directory / "cache"),
        report_to="none",
        bf16=False,
        disable_tqdm=True,
    )
    trainer = SugarTrainer(str(directory / "llava"), config, data, peft_config=LoraConfig(r=16, lora_alpha=32))
    trainer.create_optimizer_and_scheduler(100)
    trainer.model.activation_checkpointing_enable()  # as `train` does, which is not called here
    trainer.current_gradient_accumulation_steps = 1

    def step(numbers: range) -> tuple[list[int], float]:
        """Tokens of the rows, and the loss."""
        batch = trainer.data_collator([trainer.train_dataset[n] for n in numbers])
        tokens = batch["attention_mask"].sum(dim=1).tolist()
        trainer.model.train()
        loss = trainer.training_step(trainer.model, batch).item()
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return tokens, loss

    return step


def train(args, directory: Path):
    numbers = [range(2), *(range(2 + n * args.batch, 2 + (n + 1) * args.batch) for n in range(args.steps))]
    data = mixed_rows(numbers[-1].stop, args.image_size)
    llava(args, directory / "llava")
    ways = {"padded": start(steps, False, directory, data, source=args.before)}
    ways["end to end"] = start(steps, True, directory, data)
    measured, values = alternated(ways, numbers)
    lengths = [tokens for tokens, _ in values["end to end"][1:]]
    share = sum(map(sum, lengths)) / sum(len(tokens) * max(tokens) for tokens in lengths)
    print(f"\nbatches of {args.batch} rows, of whose places {share:.0%} are tokens: {lengths}\n")
    print("| way | tokens/s | tokens a CPU second | peak memory (GiB) | end to end: speed | CPU work | peak | loss |")
    print("|---|---|---|---|---|---|---|---|")
    best, tokens = measured["end to end"], np.array(list(map(sum, lengths)))
    for name, found in measured.items():
        speeds = np.median(tokens[:, None] / found[:, :2], axis=0)
        ratios = np.median(found[:, :2] / best[:, :2], axis=0)
        print(
            f"| {name} | {speeds[0]:.1f} | {speeds[1]:.1f} | {found[-1, 2]:.2f} | {ratios[0]:.2f}x | {ratios[1]:.2f}x | "
            f"{best[-1, 2] / found[-1, 2]:.2f}x | {values[name][-1][1]:.6f} |"
        )


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
    plain.text_config.max_position_embeddings = parts.tokenizer.model_max_length = 4096
    config = LlavaNextConfig(
        text_config=plain.text_config,
        vision_config=plain.vision_config,
        image_token_index=plain.image_token_id,
        image_grid_pinpoints=PINPOINTS,
    )
    set_seed(0)
    LlavaNextForConditionalGeneration(config).save_pretrained(directory / "llava_next")
    processor.save_pretrained(directory / "llava_next")


def embedding(path: Path, batch: int, images: list[Image.Image], padding_free: bool = True):
    processor = SugarProcessor.from_pretrained(path)
    model = SugarForConditionalGeneration.from_pretrained(path).eval()
    model.padding_free = padding_free
    embedder = SugarEmbedder(model, processor, batch)
    return lambda round: embedder(images)


def encoding(path: Path, batch: int, images: list[Image.Image]):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(path), device="cpu", trust_remote_code=True)
    return lambda round: model.encode(images, batch_size=batch)


def embed(args, directory: Path):
    llava(args, directory / "llava")
    llava_next(directory)
    random = np.random.RandomState(0)
    images = [picture(random, *SHAPES[random.randint(len(SHAPES))]) for _ in range(args.images)]
    for family in ("llava", "llava_next"):
        model = SugarForConditionalGeneration.from_pretrained(directory / family, retrieval_dim=128)
        processor, path = SugarProcessor.from_pretrained(directory / family), directory / f"{family}_sugar"
        model.save_pretrained(path)
        processor.save_pretrained(path)
        arguments = path, args.batch, images
        ways = {"padded": start(embedding, *arguments, False, source=args.before)}
        ways["SugarEmbedder"] = start(embedding, *arguments)
        if importlib.util.find_spec("sentence_transformers"):
            exported = directory / f"{family}_st"
            export_sentence_transformers(model, processor, exported)
            ways["sentence-transformers"] = start(encoding, exported, *arguments[1:])
        measured, values = alternated(ways, list(range(args.steps + 1)))
        tokens = processor.count_tokens([""] * len(images), [[image.size[::-1]] for image in images])
        print(f"\n{family}: {len(images)} images of {min(tokens)} to {max(tokens)} tokens, batches of {args.batch}\n")
        print("| way | images/s | SugarEmbedder: speed | CPU work | largest difference |\n|---|---|---|---|---|")
        for name, found in measured.items():
            ratios = np.median(found[:, :2] / measured["SugarEmbedder"][:, :2], axis=0)
            difference = np.abs(values[name][-1] - values["SugarEmbedder"][-1]).max()
            speed = len(images) / np.median(found[:, 0])
            print(f"| {name} | {speed:.2f} | {ratios[0]:.2f}x | {ratios[1]:.2f}x | {difference:.0e} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "embed"])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--image_size", type=int, default=336)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="alternated rounds, after one that is not counted")
    parser.add_argument("--images", type=int, default=16, help="images to embed")
    parser.add_argument("--before", help="directory of an earlier build, from which the padded way is then")
    args = parser.parse_args()
    logging.set_verbosity_error()
    # or glibc keeps what is freed in blocks below 32 MB, and the peak is its heap's
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        {"train": train, "embed": embed}[args.what](args, Path(directory))
    print(f"the whole: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
