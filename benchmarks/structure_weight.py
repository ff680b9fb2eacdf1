"""
What the weight of the structure loss (alpha in Eq. 1, which the paper does not publish) does: retrieval and exact match
after the demo's training, for several weights and seeds. The default of `SugarTrainingConfig` comes from this table.

python benchmarks/structure_weight.py --weights 0.1 0.3 1 3 --seeds 0
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig

from hf_sugar import SugarTrainer, SugarTrainingConfig
from hf_sugar.cli.arguments import DataArguments
from hf_sugar.cli.demo import WORLD_LORA, WORLD_TRAINING, render_world, world_teachers
from hf_sugar.data import load_data
from hf_sugar.evaluation import EvaluationData, evaluate_tasks
from hf_sugar.inference import SugarEmbedder, SugarGenerator
from hf_sugar.world import checkpoint


SHOWN = (
    "test/image_to_text_recall@1",
    "test/text_to_image_recall@1",
    "context_recall@1",
    "text_score",
    "descriptions/exact_match",
    "questions/exact_match",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.1, 0.3, 1.0, 3.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("runs/structure_weight"))
    parser.add_argument("--max_steps", type=int, default=WORLD_TRAINING["max_steps"])
    args = parser.parse_args()

    data, evaluation = DataArguments(), EvaluationData()
    render_world(args.output / "world", data, evaluation)
    rows = load_data(data.train_data)
    print("weight | seed | " + " | ".join(SHOWN))
    for weight in args.weights:
        for seed in args.seeds:
            trainer = SugarTrainer(
                str(checkpoint("llava")),
                SugarTrainingConfig(
                    str(args.output / "run"),
                    **{
                        **WORLD_TRAINING,
                        "structure_weight": weight,
                        "seed": seed,
                        "max_steps": args.max_steps,
                        "teachers": world_teachers(),
                        "teacher_cache_dir": str(args.output / "teacher_cache"),
                        "disable_tqdm": True,
                        "logging_strategy": "no",
                    },
                ),
                train_dataset=rows,
                peft_config=LoraConfig(**WORLD_LORA),
            )
            trainer.train()
            model, processor = trainer.model.eval(), trainer.processing_class
            with torch.no_grad():
                results = evaluate_tasks(evaluation, SugarEmbedder(model, processor), SugarGenerator(model, processor))
            print(f"{weight} | {seed} | " + " | ".join(f"{results[name].value:.1f}" for name in SHOWN), flush=True)


if __name__ == "__main__":
    main()
