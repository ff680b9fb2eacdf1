"""Rows, settings and trainers of tiny runs, in one process and in two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import tiny
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig

from hf_sugar import SugarTrainer, SugarTrainingConfig


FEATURES = Features(
    {
        "messages": [{"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}],
        "images": List(Image()),
        "loss_on": Value("string"),
        "id": Value("string"),
    }
)
COMMON = dict(
    per_device_train_batch_size=4,
    per_device_eval_batch_size=4,
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    report_to=[],
    save_strategy="no",
    logging_steps=1,
    disable_tqdm=True,
    seed=7,
    max_steps=4,
    learning_rate=1e-2,
)
# the paper's loss and labels, and this library's first way of training captions alone
PAPER = dict(discriminative_loss="structure", label_calibration="none", flip_captions=True)


def image_part():
    return {"type": "image", "text": None}


def text_part(text):
    return {"type": "text", "text": text}


def conversation(i):
    user = {"role": "user", "content": [image_part(), text_part(f"what is this {i % 3}?")]}
    return [user, {"role": "assistant", "content": [text_part(f"a red circle {i}")]}]


def caption(i):
    return [{"role": "user", "content": [image_part(), text_part(f"a blue square {i}")]}]


def story(i):
    parts = [p for k in range(2 + i % 2) for p in (text_part(f"step {k} of {i}"), image_part())]
    return [{"role": "user", "content": parts}]


def rows(makers, n=12):
    data = []
    for i in range(n):
        make = makers[i % len(makers)]
        messages = make(i)
        count = sum(part["type"] == "image" for message in messages for part in message["content"])
        loss_on = {"caption": "captions", "story": "text"}.get(make.__name__, "answers")
        images = [tiny.image(10 * i + k) for k in range(count)]
        data.append({"messages": messages, "images": images, "loss_on": loss_on, "id": f"row-{i}"})
    return Dataset.from_list(data, features=FEATURES)


def config(path, teachers=None, **kwargs):
    return SugarTrainingConfig(output_dir=str(path), **{**COMMON, "retrieval_dim": 16, "teachers": teachers, **kwargs})


def trainer(model, args, data=(conversation,), lora=False, **kwargs):
    """Of a dataset, or of twelve rows of these kinds."""
    data = rows(data) if isinstance(data, tuple) else data
    peft_config = LoraConfig(r=4) if lora else None
    return SugarTrainer(model, args, train_dataset=data, **{"peft_config": peft_config, **kwargs})


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, {module}
torch.set_num_threads(1)
found = {module}.{function}(*json.loads(sys.argv[2]))
if torch.distributed.get_rank() == 0:
    print("RESULT", json.dumps(found))
"""


def two_processes(directory, module, function, *arguments, **environment):
    """The command and the environment of two processes that call a function of a test file."""
    (directory / "worker.py").write_text(WORKER.format(module=module, function=function))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(directory / "worker.py"), str(Path(__file__).parent), json.dumps(arguments)]
    return command, {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}


def in_two_processes(*args, **kwargs):
    """What the function gives in the first of them."""
    command, environment = two_processes(*args, **kwargs)
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, result.stderr[-6000:]
    return json.loads(lines[0].removeprefix("RESULT"))
