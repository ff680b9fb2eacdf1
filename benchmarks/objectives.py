"""
Which discriminative loss retrieves: the demo's training with each of some settings, measured on the rendered world.

python benchmarks/objectives.py --seeds 0 1
python benchmarks/objectives.py --settings default "paper, real scales" --seeds 0
python benchmarks/objectives.py --settings default --set structure_weight=0.1 --set contrastive_weight=10
python benchmarks/objectives.py --settings default --set matrix_batch_size=16 --set per_device_train_batch_size=16

"Real scales" moves the teachers' cosines to where those of CLIP and BGE lie (image with text .13 + .13 c, text with text
.5 + .5 c), which changes no order and so nothing that the labels could teach.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import yaml
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig

from hf_sugar import SugarTrainer, SugarTrainingConfig, TripleEncoder
from hf_sugar.cli.arguments import DataArguments
from hf_sugar.cli.demo import PAPER, WORLD_LORA, WORLD_TRAINING, render_world
from hf_sugar.data import load_data
from hf_sugar.evaluation import EvaluationData, evaluate_tasks
from hf_sugar.inference import SugarEmbedder, SugarGenerator
from hf_sugar.teachers import add_teacher_embeddings
from hf_sugar.world import checkpoint, world_teachers


SETTINGS = {
    "default": {},
    "paper": PAPER,
    "paper, captions alone": {**PAPER, "flip_captions": False},
    "structure, calibrated": {"discriminative_loss": "structure"},
    "structure, mean kernel": {**PAPER, "flip_captions": False, "label_kernel": "mean"},
    "contrastive": {"discriminative_loss": "contrastive"},
    "default, real scales": {},
    "structure, calibrated, real scales": {"discriminative_loss": "structure"},
    "paper, real scales": PAPER,
}
SHOWN = {
    "test/image_to_text_recall@1": "image to text",
    "test/text_to_image_recall@1": "text to image",
    "test_unseen/image_to_text_recall@1": "unseen",
    "test_unseen/text_to_image_recall@1": "unseen",
    "context_recall@1": "next image R@1",
    "context_recall@10": "R@10",
    "text_score": "text score",
    "image_score": "image",
    "group_score": "group",
    "descriptions/exact_match": "descriptions",
    "test_unseen_descriptions/exact_match": "unseen",
    "questions/exact_match": "questions",
}


def at_real_scales(dataset: Dataset) -> Dataset:
    """The dataset with the teachers' embeddings moved, and a record that says so."""
    record = json.loads(dataset[0]["teachers"])
    split, width = record["split"], record["dim"]
    moved = {"split": split + 1, "dim": width + 4, "fingerprint": f"{record['fingerprint']} at real scales"}

    def move(row):
        kinds = [part["type"] for message in row["messages"] for part in message["content"]]
        vectors = []
        for kind, vector in zip(kinds, np.asarray(row["teacher_embeddings"], np.float32).reshape(-1, width)):
            text = kind == "text"
            first = [*(np.sqrt(0.5) * vector[:split]), np.sqrt(0.5)] if text else [*vector[:split], 0]
            rest = [0, np.sqrt(0.74)] if text else [np.sqrt(0.74), 0]
            vectors.append([*first, *(np.sqrt(0.13) * vector[split:]), np.sqrt(0.13), *rest])
        return {"teacher_embeddings": vectors, "teachers": json.dumps({**record, **moved})}

    return dataset.map(move, remove_columns=["teacher_embeddings", "teachers"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="NAME")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of SugarTrainingConfig")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("runs/objectives"))
    args = parser.parse_args()
    disable_progress_bars()
    changes = {name: yaml.safe_load(value) for name, value in (setting.split("=", 1) for setting in args.set)}

    data, evaluation = DataArguments(), EvaluationData()
    render_world(args.output / "world", data, evaluation)
    encoder = TripleEncoder.from_teachers(world_teachers())
    rows = add_teacher_embeddings(load_data(data.train_data), encoder, args.output / "teacher_cache")
    print("| setting | seed |", " | ".join(SHOWN.values()), "|\n|---|---|", "---|" * len(SHOWN))
    for name in args.settings:
        for seed in args.seeds:
            settings = {**WORLD_TRAINING, "logging_strategy": "no", "disable_tqdm": True, **SETTINGS[name], **changes}
            trainer = SugarTrainer(
                str(checkpoint("llava")),
                SugarTrainingConfig(str(args.output / "run"), **{**settings, "seed": seed}),
                train_dataset=at_real_scales(rows) if "real scales" in name else rows,
                peft_config=LoraConfig(**WORLD_LORA),
            )
            trainer.train()
            model, processor = trainer.model.eval(), trainer.processing_class
            results = evaluate_tasks(evaluation, SugarEmbedder(model, processor), SugarGenerator(model, processor))
            figures = " | ".join(f"{results[metric].value:.1f}" for metric in SHOWN)
            print(f"| {name} {' '.join(args.set)} | {seed} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
