"""The example of emoji drawings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_sugar.cli.main import main
from hf_sugar.data import check_dataset, load_data
from hf_sugar.data.images import undecoded
from hf_sugar.evaluation import image_text_pairs


pytestmark = pytest.mark.extras
EMOJI = Path(__file__).parent.parent / "examples" / "emoji"


def test_files():
    """Every drawing is in one split, and every concept of the test split is known as the other vendor draws it."""
    seen, names = {}, {}
    for split, expected in {"train": (2774, 2774, 913), "test": (396, 396, 128)}.items():
        files = [EMOJI / name.format(split) for name in ("captions_{}.jsonl", "llava_{}.json", "mmc4_{}.jsonl")]
        rows = [load_data(str(file)) for file in files]
        assert tuple(map(len, rows)) == expected
        seen[split] = {image["path"] for row in undecoded(load_data(files)) for image in row["images"]}
        names[split] = image_text_pairs(rows[0])[1]
        assert image_text_pairs(rows[1])[1] == names[split]
    report = check_dataset(load_data(files))
    assert report.ok and report.duplicates == report.text_only == 0
    assert sorted(seen["train"] | seen["test"]) == sorted(str(path) for path in (EMOJI / "images").iterdir())
    assert not seen["train"] & seen["test"]
    assert len(set(names["test"])) == 396 and set(names["test"]) < set(names["train"])
    assert len({Path(path).read_bytes() for path in seen["train"] | seen["test"]}) == 2774 + 396


def test_the_example_runs(tmp_path):
    """What `make demo-emoji` and the example's README say, with a step or two of each training on a few drawings."""
    data, runs = tmp_path / "emoji", tmp_path / "runs"
    data.mkdir()
    (data / "images").symlink_to(EMOJI / "images")
    for file in EMOJI.glob("*_t*.json*"):
        lines = file.read_text().splitlines()[:41]
        text = "\n".join(lines) + "\n"
        (data / file.name).write_text(text if file.suffix == ".jsonl" else text.rstrip(",\n") + "\n]\n")
    config = (EMOJI / "demo.yaml").read_text().replace("examples/emoji", str(data)).replace("runs/emoji", str(runs))
    config = yaml.safe_load(config)
    config["training"] |= {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(config))

    def run(script, *arguments):
        command = [sys.executable, EMOJI / script, "--data", data, *arguments]
        return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout

    steps = [f"--{name}_steps=2" for name in ("clip", "dinov2", "bert", "llava")]
    run("train_checkpoints.py", "--output_dir", runs / "checkpoints", *steps)
    main(["demo", "--config", str(tmp_path / "demo.yaml"), "--ablations", "true"])
    table = run("compare.py", "--runs", runs, "--seeds", 0)
    [line] = [line for line in table.splitlines() if line.startswith("| image to text R@10")]
    report = json.loads((runs / "report.json").read_text())["runs"]
    columns = [report[name] for name in ("Sugar", "Sugar, paper", "Sugar, structure", "Sugar, contrastive")]
    sugar, *others = [column["test/image_to_text_recall@10"]["value"] for column in columns]
    shown = [float(cell.split()[0]) for cell in line.split("|")[2:-1]]
    assert shown == pytest.approx([sugar, *(other - sugar for other in others)], abs=0.051)
