"""
A step of SugarTrainer with cached teachers against a step of TRL's SFTTrainer: the same model, the same rows and batches,
the two alternated. Also the peak memory of each trainer in a process
of its own. The teachers' embeddings are as wide as those of DINOv2-base, CLIP ViT-L/14 and BGE-base.

python benchmarks/train_step.py --hidden 1024 --layers 12 --batch 4 --steps 6
python benchmarks/train_step.py --hidden 64 --layers 2 --batch 2 --steps 2 --images 4   # only to see that it runs
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from prepare import full_teachers
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from hf_sugar import SugarTrainer, SugarTrainingConfig
from hf_sugar.world import checkpoint


FEATURES = Features(
    {
        "messages": [{"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}],
        "images": List(Image()),
    }
)


def rows(count: int, size: int) -> Dataset:
    random = np.random.RandomState(0)
    data = []
    for i in range(count):
        pixels = random.randint(0, 256, (size, size, 3), dtype=np.uint8)
        question = [{"type": "image", "text": None}, {"type": "text", "text": f"what is in picture {i}?"}]
        answer = [{"type": "text", "text": "a red circle left of a blue square " * 8}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        data.append({"messages": messages, "images": [PILImage.fromarray(pixels)]})
    return Dataset.from_list(data, features=FEATURES)


def llava(args, directory: Path):
    """A LLaVA of the asked size with random weights, with the tokenizer of the embedded world."""
    processor = AutoProcessor.from_pretrained(checkpoint("llava"))
    tiny = LlavaConfig.from_pretrained(checkpoint("llava"))
    vision = CLIPVisionConfig(
        hidden_size=args.hidden // 2,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        image_size=args.image_size,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        pad_token_id=tiny.text_config.pad_token_id,
        bos_token_id=tiny.text_config.bos_token_id,
        eos_token_id=tiny.text_config.eos_token_id,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tiny.image_token_id,
        image_seq_length=(args.image_size // 14) ** 2,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    print(f"LLaVA of {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters")
    model.save_pretrained(directory)
    processor.patch_size = 14
    processor.num_additional_image_tokens = 1
    processor.vision_feature_select_strategy = "default"
    size = {"height": args.image_size, "width": args.image_size}
    processor.image_processor.size, processor.image_processor.crop_size = {"shortest_edge": args.image_size}, size
    processor.save_pretrained(directory)


def trainer(name: str, directory: Path, data: Dataset, batch: int) -> SFTTrainer:
    common = {
        "per_device_train_batch_size": batch,
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        "disable_tqdm": True,
        "learning_rate": 1e-4,
    }
    path = str(directory / "llava")
    if name == "SFT":
        made = SFTTrainer(path, SFTConfig(str(directory / "sft"), **common), train_dataset=data)
    else:
        teachers = {leg: str(directory / "teachers" / leg) for leg in ("image", "text", "cross")}
        config = SugarTrainingConfig(
            str(directory / "sugar"),
            teachers=teachers,
            teacher_cache_dir=str(directory / "cache"),
            flip_captions=False,
            **common,
        )
        made = SugarTrainer(path, config, train_dataset=data)
    made.create_optimizer_and_scheduler(100)
    made.current_gradient_accumulation_steps = 1
    return made


def step(trainer: SFTTrainer, rows: list[dict]) -> tuple[float, float]:
    """Seconds of collating, and of forward, backward and update."""
    started = time.perf_counter()
    batch = trainer.data_collator(rows)
    collated = time.perf_counter()
    trainer.model.train()
    trainer.training_step(trainer.model, batch)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    return collated - started, time.perf_counter() - collated


def fill_cache(directory: Path, data: Dataset, batch: int):
    """What `hf-sugar prepare` does, so that no process that is measured loads a teacher."""
    logging.set_verbosity_error()
    trainer("Sugar", directory, data, batch)


def peak(name: str, directory: Path, data: Dataset, batch: int) -> float:
    """GiB at most of a process that makes this trainer and takes two steps."""
    logging.set_verbosity_error()
    alone = trainer(name, directory, data, batch)
    for _ in range(2):
        step(alone, [alone.train_dataset[n % len(data)] for n in range(batch)])
    # not getrusage, which counts what the parent process held
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--image_size", type=int, default=336)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--steps", type=int, default=6, help="alternated pairs of steps, after one that is not counted"
    )
    parser.add_argument("--images", type=int, default=64, help="rows, of one image each")
    args = parser.parse_args()
    logging.set_verbosity_error()
    began = time.perf_counter()

    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        data = rows(args.images, args.image_size)
        llava(args, directory / "llava")
        full_teachers(directory / "teachers", layers=1)  # the width of an embedding counts here, not its content

        def apart(function, *arguments):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                return process.submit(function, *arguments, directory, data, args.batch).result()

        apart(fill_cache)
        memory = {name: apart(peak, name) for name in ("SFT", "Sugar")}  # while nothing else fills the machine
        print(f"memory measured, {time.perf_counter() - began:.0f} s", flush=True)
        trainers = {name: trainer(name, directory, data, args.batch) for name in memory}
        times = {name: [] for name in trainers}
        for n in range(args.steps + 1):
            chosen = [(n * args.batch + i) % len(data) for i in range(args.batch)]
            for name in ("SFT", "Sugar") if n % 2 else ("Sugar", "SFT"):
                times[name].append(step(trainers[name], [trainers[name].train_dataset[i] for i in chosen]))
    print(
        f"\n| batch {args.batch} | collate (s) | forward, backward, update (s) | together (s) | peak memory (GiB) |"
        "\n|---|---|---|---|---|"
    )
    together = {name: [sum(parts) for parts in pairs[1:]] for name, pairs in times.items()}
    for name, pairs in times.items():
        medians = [statistics.median(part) for part in zip(*pairs[1:])] + [statistics.median(together[name])]
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in medians) + f" | {memory[name]:.2f} |")
    ratios = [a / b for a, b in zip(together["Sugar"], together["SFT"])]
    print(f"\nSugar / SFT, median over pairs of steps: {statistics.median(ratios):.3f}")
    print("every pair: " + " ".join(f"{ratio:.3f}" for ratio in ratios))
    print(f"the whole: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
