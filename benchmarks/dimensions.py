"""
What short and quantized embeddings find: the demo's training with 768 dimensions, with and without `matryoshka_dims`,
measured on the rendered world at several lengths, and searched in indexes of one byte and of one bit a dimension.

python benchmarks/dimensions.py --seeds 0 1
python benchmarks/dimensions.py --steps 2 --others 100 --output runs/dimensions_short   # short
python benchmarks/dimensions.py --models runs/demo/sugar --lengths 128 64 32 16   # a model that is there
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import disable_progress_bars
from peft import LoraConfig
from transformers.trainer_utils import get_last_checkpoint

from hf_sugar import (
    SugarEmbedder,
    SugarForConditionalGeneration,
    SugarIndex,
    SugarProcessor,
    SugarTrainer,
    SugarTrainingConfig,
    TripleEncoder,
)
from hf_sugar.cli.arguments import DataArguments
from hf_sugar.cli.demo import WORLD_LORA, WORLD_TRAINING, render_world
from hf_sugar.data import load_data
from hf_sugar.evaluation import EvaluationData, image_text_pairs, load_tasks
from hf_sugar.evaluation.tasks import run_tasks
from hf_sugar.teachers import add_teacher_embeddings
from hf_sugar.world import checkpoint, load_world, world_teachers


SETTINGS = {"whole": None, "Matryoshka": [256, 64, 32]}
SHOWN = {
    "test/image_to_text_recall@1": "image to text R@1",
    "test/text_to_image_recall@1": "text to image R@1",
    "test_unseen/image_to_text_recall@1": "unseen R@1",
    "test_unseen/text_to_image_recall@1": "unseen R@1",
}
# FAISS factory, and how many candidates of each hit are compared exactly
INDEXES = (("Flat", 0), ("SQ8", 0), ("SQ8", 4), ("RaBitQ", 0), ("RaBitQ", 4), ("RaBitQ", 16))


def cut(embeddings: np.ndarray, dim: int) -> np.ndarray:
    """What `truncate_dim` gives, without embedding again."""
    return embeddings[:, :dim] / np.linalg.norm(embeddings[:, :dim], axis=1, keepdims=True)


class Recorded:
    """An embedding function, whose results can be had again in the same order, cut."""

    def __init__(self, embed):
        self.embed, self.whole = embed, []

    def __call__(self, items):
        self.whole.append(self.embed(items))
        return self.whole[-1]

    def again(self, dim):
        results = iter(self.whole)
        return lambda items: cut(next(results), dim)


def table(title: str, columns: list[str], lines: dict[str, list[list[float]]]) -> None:
    """Print the means over seeds."""
    print(f"\n| {title} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, runs in lines.items():
        print(f"| {name} | {' | '.join(f'{value:.1f}' for value in np.mean(runs, axis=0))} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=WORLD_TRAINING["max_steps"])
    parser.add_argument("--models", nargs="+", type=Path, help="to measure, in place of those that would be trained")
    parser.add_argument("--lengths", type=int, nargs="+", default=[768, 256, 64, 32])
    parser.add_argument(
        "--others", type=int, default=4000, help="images in an index besides those that are searched for"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/dimensions"))
    parser.add_argument("--train_only", action="store_true", help="training that was interrupted goes on in any case")
    args = parser.parse_args()
    disable_progress_bars()

    data, evaluation = DataArguments(), EvaluationData()
    render_world(args.output / "world", data, evaluation)
    models: dict[str, list[Path]] = {path.name: [path] for path in args.models or []}
    for seed in [] if args.models else args.seeds:
        for name in args.settings:
            models.setdefault(name, []).append(args.output / f"{name}-{seed}")
            train(models[name][-1], data, args, matryoshka_dims=SETTINGS[name], seed=seed)
    if args.train_only:
        return

    tasks = load_tasks(EvaluationData(image_text_data=evaluation.image_text_data))
    images, captions = image_text_pairs(load_data(evaluation.image_text_data["test"], "test"))
    others = [row["images"][0] for row in load_world("captions", "train", args.others, seed=1)]
    found, searched = {}, {}
    for name, directories in models.items():
        for directory in directories:
            model = SugarForConditionalGeneration.from_pretrained(directory, dtype="float32").eval()
            embed = Recorded(SugarEmbedder(model, SugarProcessor.from_pretrained(directory)))
            run_tasks(tasks, embed, None)
            queries, vectors = embed.embed(captions), np.concatenate([embed.embed(images), embed.embed(others)])
            for dim in args.lengths:
                results = run_tasks(tasks, embed.again(dim), None)
                line = [results[metric].value for metric in SHOWN]
                found.setdefault(f"{dim}, {name}", []).append(line)
                for factory, multiplier in INDEXES:
                    index = SugarIndex(cut(vectors, dim), factory=factory, rescore_multiplier=multiplier)
                    hits = np.array([[hit.index for hit in row] for row in index.search(cut(queries, dim), 10)])
                    hits = hits == np.arange(len(captions))[:, None]
                    measured = index.measure()
                    line = [100 * hits[:, 0].mean(), 100 * hits.any(axis=1).mean(), measured["recall@10"]]
                    line.append(measured["bytes"] / len(vectors))
                    rescored = f", {multiplier} rescored" if multiplier else ""
                    searched.setdefault(f"{dim}, {name}: {factory}{rescored}", []).append(line)
    table("length, training", list(SHOWN.values()), found)
    columns = ["text to image R@1", "R@10", "recall@10 of exact search", "bytes an image"]
    table(f"index of {len(vectors)} images", columns, searched)


def train(directory: Path, data: DataArguments, args: argparse.Namespace, **changes) -> None:
    """Train a model, or go on, unless it is there."""
    if (directory / "config.json").is_file():
        return
    encoder = TripleEncoder.from_teachers(world_teachers())
    settings = {**WORLD_TRAINING, "max_steps": args.steps, "retrieval_dim": args.lengths[0], **changes}
    settings |= {"logging_strategy": "no", "disable_tqdm": True}
    settings |= {"save_strategy": "steps", "save_steps": 50, "save_total_limit": 1}
    trainer = SugarTrainer(
        str(checkpoint("llava")),
        SugarTrainingConfig(str(directory), **settings),
        train_dataset=add_teacher_embeddings(load_data(data.train_data), encoder, args.output / "teacher_cache"),
        peft_config=LoraConfig(**WORLD_LORA),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(directory) if directory.exists() else None)
    trainer.save_model()


if __name__ == "__main__":
    main()
