"""
The position curve of WebQA on the rendered world: yes-or-no questions whose one useful picture stands at index 1 to 6.

    make demo
    python benchmarks/position_curve.py

The world is written in WebQA's published layout and measured by `hf-sugar evaluate`, as the data set itself would be.
"""

import argparse
import base64
import io
import json
import random
from pathlib import Path

import yaml

from hf_sugar.cli.main import main as hf_sugar
from hf_sugar.world.scenes import Scene, article, scenes


def write(folder: Path, questions: int, seed: int):
    """Half of the questions are to be answered with yes; the other five pictures never show what is asked for."""
    rng = random.Random(seed)
    every = scenes("test")
    folder.mkdir(parents=True, exist_ok=True)
    records, lines, offsets = {}, [], []

    def fact(scene: Scene) -> dict:
        picture = io.BytesIO()
        scene.render(rng).save(picture, "PNG")
        offsets.append(sum(map(len, lines[-1:])) + (offsets[-1] if offsets else 0))
        lines.append(f"{len(lines)}\t{base64.b64encode(picture.getvalue()).decode()}\n")
        return {"image_id": len(lines) - 1, "caption": scene.caption}

    while len(records) < questions:
        noun = rng.choice(rng.choice(every).things).noun
        yes = len(records) % 2 == 0
        has = {there: [s for s in every if any(t.noun == noun for t in s.things) == there] for there in (True, False)}
        useful, others = rng.choice(has[yes]), rng.sample(has[False], 6)
        records[f"world{len(records)}"] = {
            "Q": f"Is there {article(noun)}?",
            "A": ["Yes." if yes else "No."],
            "split": "val",
            "Qcate": "YesNo",
            "img_posFacts": [fact(useful)],
            "img_negFacts": [fact(scene) for scene in [s for s in others if s is not useful][:5]],
        }
    (folder / "WebQA_train_val.json").write_text(json.dumps(records))
    (folder / "imgs.tsv").write_text("".join(lines))
    (folder / "imgs.lineidx").write_text("".join(f"{offset}\n" for offset in offsets))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="runs/demo/sugar")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/position_curve"))
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.output_dir / "webqa", args.questions, args.seed)
    settings = args.output_dir / "evaluate.yaml"
    settings.write_text(yaml.safe_dump({"benchmarks": {"webqa": {"path": str(args.output_dir / "webqa")}}}))
    model = ["--model_name_or_path", args.model_name_or_path]
    hf_sugar(["evaluate", "--config", str(settings), "--output_dir", str(args.output_dir), *model])
    print((args.output_dir / "report.md").read_text())


if __name__ == "__main__":
    main()
