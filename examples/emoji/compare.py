"""
What each ablation of a demo with `--ablations` loses against Sugar, with the 95% interval of the difference: a test drawing
is drawn with its results of all seeds, in both runs alike.

    python examples/emoji/compare.py --runs runs/emoji-seeds --seeds 0 1 2
"""

import argparse
from pathlib import Path

import numpy as np

from hf_sugar import SugarEmbedder, SugarForConditionalGeneration, SugarProcessor
from hf_sugar.data import load_data
from hf_sugar.evaluation import Estimate, exact_match, image_text_pairs, recall_at_k, report_table
from hf_sugar.inference import SugarGenerator


def hits(directory: Path, data: Path) -> dict[str, np.ndarray]:
    """What a model gets right, drawing by drawing."""
    model, processor = (
        SugarForConditionalGeneration.from_pretrained(directory),
        SugarProcessor.from_pretrained(directory),
    )
    embed = SugarEmbedder(model, processor)
    images, names = map(embed, image_text_pairs(load_data(str(data / "captions_test.jsonl"))))
    rows = load_data(str(data / "llava_test.json"))
    named = np.ones(len(rows))
    named[[miss["index"] for miss in exact_match(SugarGenerator(model, processor), rows)["misses"]]] = 0
    found = {}
    for task, scores in (("image to text", images @ names.T), ("text to image", names @ images.T)):
        found |= {f"{task} R@{k}": values for k, values in recall_at_k(scores, range(len(scores)), (1, 10)).items()}
    return {**found, "naming, exact match": named}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("examples/emoji"), help="folder of the drawings")
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji-seeds"), help="output folder of the demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the demo")
    args = parser.parse_args()

    def mean_hits(run: str) -> dict[str, np.ndarray]:
        ends = [f"-{seed}" for seed in args.seeds] if len(args.seeds) > 1 else [""]
        runs = [hits(args.runs / f"{run}{end}", args.data) for end in ends]
        return {name: np.mean([each[name] for each in runs], axis=0) for name in runs[0]}

    sugar = mean_hits("sugar")
    columns = {"Sugar": {name: Estimate.from_hits(values) for name, values in sugar.items()}}
    for run in ("paper", "structure", "contrastive"):
        differences = {name: values - sugar[name] for name, values in mean_hits(f"sugar-{run}").items()}
        columns[f"{run} - Sugar"] = {name: Estimate.from_hits(values) for name, values in differences.items()}
    print(report_table(columns))


if __name__ == "__main__":
    main()
