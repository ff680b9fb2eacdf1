"""
What a large label matrix costs: one update over 256 rows of which 8 are in memory at a time, compared within each 8 (`plain`)
and all with one another (`matrix_batch_size`). Each in a process of its own, in turns; medians.

python benchmarks/matrix.py
python benchmarks/matrix.py --rows 16 --batch 4 --hidden 64 --layers 2 --image_size 56 --updates 2   # only to see that it runs

What a larger matrix does for retrieval: python benchmarks/objectives.py --settings default --set matrix_batch_size=256
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
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from prepare import full_teachers
from train_step import FEATURES, llava
from transformers import TrainerCallback
from transformers.utils import logging

from hf_sugar import SugarTrainer, SugarTrainingConfig


def captions(count: int, size: int) -> Dataset:
    random = np.random.RandomState(0)
    rows = []
    for i in range(count):
        image = Image.fromarray(random.randint(0, 256, (size, size, 3), dtype=np.uint8))
        content = [
            {"type": "image", "text": None},
            {"type": "text", "text": f"picture {i} of a red circle on a square"},
        ]
        rows.append({"messages": [{"role": "user", "content": content}], "images": [image]})
    return Dataset.from_list(rows, features=FEATURES).add_column("loss_on", ["captions"] * count)


class Clock(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_begin(self, *args, **kwargs):
        self.times.append(time.perf_counter())


def updates(args, directory: Path, data: Dataset, matrix: int | None, count: int) -> tuple[float, float]:
    """Seconds of an update, and GiB at most of this process."""
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    config = SugarTrainingConfig(
        str(directory / "run"),
        teachers={leg: str(directory / "teachers" / leg) for leg in ("image", "text", "cross")},
        teacher_cache_dir=str(directory / "cache"),
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.rows // args.batch,
        matrix_batch_size=matrix,
        max_steps=count + 1,
        learning_rate=1e-4,
        gradient_checkpointing=args.gradient_checkpointing,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
    )
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"]) if args.lora else None
    trainer = SugarTrainer(str(directory / "llava"), config, train_dataset=data, peft_config=lora)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    seconds = (clock.times[-1] - clock.times[0]) / count  # the embeddings ahead come before `on_step_begin`
    memory = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    return seconds, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--image_size", type=int, default=168)
    parser.add_argument("--updates", type=int, default=2, help="that are measured in each process")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lora", action="store_true", help="train LoRA, not all weights")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        llava(args, directory / "llava")
        full_teachers(directory / "teachers", layers=1)
        data = captions(args.rows, args.image_size)

        def apart(matrix, count):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                return process.submit(updates, args, directory, data, matrix, count).result()

        apart(None, 1)  # the teachers' embeddings are made
        found = {"plain": [], "matrix": []}
        for _ in range(args.repeats):
            for name, matrix in (("plain", None), ("matrix", args.rows)):
                found[name].append(apart(matrix, args.updates))
    print(f"\n| {args.rows} rows, {args.batch} at a time | an update (s) | peak memory (GiB) |\n|---|---|---|")
    medians = {name: [statistics.median(values) for values in zip(*runs)] for name, runs in found.items()}
    for name, (seconds, memory) in medians.items():
        print(f"| {name} | {seconds:.2f} | {memory:.3f} |")
    ratios = [a / b for a, b in zip(medians["matrix"], medians["plain"])]
    print(f"| matrix / plain | {ratios[0]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
