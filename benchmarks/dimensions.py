"""
What short and quantized embeddings find: the demo's training with 768 dimensions, with and without `matryoshka_dims`,
measured on the rendered world at several lengths, and searched in indexes of one byte and of one bit a dimension.

python benchmarks/dimensions.py --seeds 0 1
python benchmarks/dimensions.py --steps 2 --seeds 0 --output runs/dimensions_short   # short
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
from hf_sugar.evaluation import EvaluationData, evaluate_tasks, image_text_pairs
from hf_sugar.teachers import add_teacher_embeddings
from hf_sugar.world import checkpoint, load_world, world_teachers


LENGTHS = (768, 256, 64, 32)
SETTINGS = {"whole": None, "Matryoshka": [256, 64, 32]}
SHOWN = {
    "test/image_to_text_recall@1": "image to text R@1",
    "test/text_to_image_recall@1": "text to image R@1",
    "test_unseen/text_to_image_recall@1": "unseen R@1",
    "context_recall@10": "next image R@10",
}
# FAISS factory, and how many candidates of each hit are compared exactly
INDEXES = (("Flat", 0), ("SQ8", 0), ("SQ8", 4), ("RaBitQ", 0), ("RaBitQ", 4), ("RaBitQ", 16))


def table(title: str, columns: list[str], lines: dict[str, list[list[float]]]) -> None:
    """Print the means over seeds."""
    print(f"\n| {title} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, runs in lines.items():
        print(f"| {name} | {' | '.join(f'{value:.1f}' for value in np.mean(runs, axis=0))} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=WORLD_TRAINING["max_steps"])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--output", type=Path, default=Path("runs/dimensions"))
    parser.add_argument(
        "--train_only",
        action="store_true",
        help="to be measured by a later call; training that was interrupted goes on",
    )
    args = parser.parse_args()
    disable_progress_bars()

    data, evaluation = DataArguments(), EvaluationData()
    render_world(args.output / "world", data, evaluation)
    evaluation.generation_data = evaluation.winoground_data = None
    encoder = TripleEncoder.from_teachers(world_teachers())
    rows = add_teacher_embeddings(load_data(data.train_data), encoder, args.output / "teacher_cache")
    for seed in args.seeds:
        for name in args.settings:
            directory = args.output / f"{name}-{seed}"
            if not (directory / "config.json").is_file():
                settings = {**WORLD_TRAINING, "max_steps": args.steps, "logging_strategy": "no", "disable_tqdm": True}
                settings |= {"retrieval_dim": LENGTHS[0], "matryoshka_dims": SETTINGS[name], "seed": seed}
                settings |= {"save_strategy": "steps", "save_steps": 50, "save_total_limit": 1}
                trainer = SugarTrainer(
                    str(checkpoint("llava")),
                    SugarTrainingConfig(str(directory), **settings),
                    train_dataset=rows,
                    peft_config=LoraConfig(**WORLD_LORA),
                )
                trainer.train(resume_from_checkpoint=get_last_checkpoint(directory) if directory.exists() else None)
                trainer.save_model()
    if args.train_only:
        return

    found, searched = {}, {}
    images, captions = image_text_pairs(load_data(evaluation.image_text_data["test"], "test"))
    others = [row["images"][0] for row in load_world("captions", "train", 4000, seed=1)]
    for seed in args.seeds:
        for name in args.settings:
            directory = str(args.output / f"{name}-{seed}")
            model = SugarForConditionalGeneration.from_pretrained(directory, dtype="float32").eval()
            processor = SugarProcessor.from_pretrained(directory)
            for dim in LENGTHS:
                results = evaluate_tasks(evaluation, SugarEmbedder(model, processor, truncate_dim=dim))
                line = [results[metric].value for metric in SHOWN]
                found.setdefault(f"{dim}, {name}", []).append(line)
            for dim in (768, 64):
                embed = SugarEmbedder(model, processor, truncate_dim=dim)
                queries, vectors = embed(captions), np.concatenate([embed(images), embed(others)])
                own = np.arange(len(captions))[:, None]
                for factory, multiplier in INDEXES:
                    index = SugarIndex(vectors, factory=factory, rescore_multiplier=multiplier)
                    hits = np.array([[hit.index for hit in row] for row in index.search(queries, 10)]) == own
                    measured = index.measure()
                    line = [100 * hits[:, 0].mean(), 100 * hits.any(axis=1).mean(), measured["recall@10"]]
                    line.append(measured["bytes"] / len(vectors))
                    rescored = f", {multiplier} rescored" if multiplier else ""
                    searched.setdefault(f"{dim}, {name}: {factory}{rescored}", []).append(line)
    table("length, training", list(SHOWN.values()), found)
    table(
        f"index of {len(vectors)} images",
        ["text to image R@1", "R@10", "recall@10 of exact search", "bytes an image"],
        searched,
    )


if __name__ == "__main__":
    main()
