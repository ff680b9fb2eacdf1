"""Training in several processes that divide the model among them: FSDP2, here on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from peft import LoraConfig
from test_trainer import backbone, caption, config, conversation, history, rows, story, teachers, text_part

from hf_sugar import SugarForConditionalGeneration, SugarTrainer


__all__ = ["backbone", "teachers"]  # fixtures

CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate"


def shard_on_the_cpu():
    """accelerate (seen in 1.15) takes FSDP settings of processes with accelerators alone: let them say that they have some."""
    start = PartialState.__init__

    def with_accelerator(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = with_accelerator


def words(i):
    user = {"role": "user", "content": [text_part(f"how many sides has shape {i}?")]}
    return [user, {"role": "assistant", "content": [text_part(f"it has {i}")]}]


KEYS = ("loss", "generative_loss", "structure_loss", "contrastive_loss", "grad_norm")
RUNS = {
    # in each batch the second process has no image, and nothing beside its rows
    "full": {"makers": (caption, story, words, words), "eval_strategy": "steps", "eval_steps": 4},
    # matrices of two batches; the images of the second process stand beside its rows too
    "lora": {
        "makers": (caption, conversation, story, story),
        "lora": True,
        "gradient_checkpointing": True,
        "matrix": 8,
    },
}


def run(path, backbone, teachers, processes, makers, lora=False, matrix=None, resume=False, **settings):
    """What 5 steps give, with the same rows in the same global batches."""
    if matrix:
        settings |= {"matrix_batch_size": matrix // processes, "gradient_accumulation_steps": 2}
    common = {"per_device_train_batch_size": 4 // processes, "positions_per_sample": 99, "contrastive_mask_above": 2}
    common |= {"optim": "sgd", "train_sampling_strategy": "sequential", "save_strategy": "steps", "save_steps": 3}
    trainer = SugarTrainer(
        backbone,
        config(path, teachers, **{**common, "max_steps": 5, **settings}),
        train_dataset=rows(makers, 16),
        eval_dataset=rows((conversation, caption), 6),
        peft_config=LoraConfig(r=4) if lora else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    evaluated = [f"eval_{key}" for key in (*KEYS[:4], "image_to_text_recall@1")]
    return type(trainer.model).__name__, {key: history(trainer, key) for key in (*KEYS, *evaluated)}


def weights(path):
    """Of what was saved, as anyone loads it."""
    model = SugarForConditionalGeneration.from_pretrained(path)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_scale as t
t.torch.set_num_threads(1)
t.shard_on_the_cpu()
path, backbone, teachers, how = sys.argv[2], sys.argv[3], *map(json.loads, sys.argv[4:6])
found = t.run(path, backbone, teachers, 2, **t.RUNS[how.pop("run")], **how)
if t.torch.distributed.get_rank() == 0:
    print("RESULT", json.dumps(found))
"""


def processes(directory, environment, path, backbone, teachers, **how):
    """The command that starts two, and its environment."""
    (directory / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += [directory / "worker.py", Path(__file__).parent, path, backbone, json.dumps(teachers), json.dumps(how)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    return list(map(str, launch)), {**environment, "ACCELERATE_MIXED_PRECISION": "no"}


def in_two_processes(*args, **how):
    command, environment = processes(*args, **how)
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, result.stderr[-6000:]
    return json.loads(lines[0].removeprefix("RESULT"))


def launched_by(name):
    """What `accelerate launch` with a configuration of examples/accelerate/ tells the processes."""
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "train.py"])
    args, *_ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = []
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


@pytest.mark.parametrize("name", ["full", pytest.param("lora", marks=pytest.mark.extras)])
def test_fsdp2(backbone, teachers, tmp_path, name):
    """As one process with the same global batch, whatever the rows of a process are: losses, norms of gradients, an evaluation
    and the weights, which are saved whole; and a run goes on from its sharded checkpoint."""
    _, one = run(tmp_path / "one", backbone, teachers, 1, **RUNS[name])
    two = tmp_path / "two"
    launch = partial(in_two_processes, tmp_path, launched_by("fsdp2"), two, backbone, teachers, run=name)
    for found in (launch(), launch(resume=str(two / "checkpoint-3"))) if name == "lora" else (launch(),):
        kind, values = found
        assert kind.startswith("FSDP")
        assert min(one["contrastive_loss"]) > 0
        for key in one:
            assert values[key] == pytest.approx(one[key], abs=1e-5, rel=1e-5), key
        expected = weights(tmp_path / "one")
        for parameter, value in weights(two).items():
            torch.testing.assert_close(value, expected[parameter], atol=1e-5, rtol=1e-5, msg=parameter)
        assert (two / "checkpoint-3" / "pytorch_model_fsdp_0").is_dir()


@pytest.mark.extras
def test_killed_under_fsdp2(backbone, teachers, tmp_path):
    """Killed three times, a run ends with the weights of one that never was."""
    how = {"run": "full", "max_steps": 8, "save_steps": 1, "eval_strategy": "no"}
    launch = partial(processes, tmp_path, launched_by("fsdp2"))
    for step in (2, 4, 6):
        command, environment = launch(tmp_path / "killed", backbone, teachers, **how, resume=step > 2)
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        state = tmp_path / "killed" / f"checkpoint-{step}" / "trainer_state.json"
        end = time.monotonic() + 300
        while not state.exists() and time.monotonic() < end:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert state.exists()
    for path, resume in (("killed", True), ("whole", False)):
        in_two_processes(tmp_path, launched_by("fsdp2"), tmp_path / path, backbone, teachers, **how, resume=resume)
    expected = weights(tmp_path / "whole")
    for parameter, value in weights(tmp_path / "killed").items():
        assert torch.equal(value, expected[parameter]), parameter


def test_launch_configurations():
    """Each as `accelerate launch` understands it."""
    for name, count in (("fsdp2", "8"), ("multi_node", "16")):
        environment = launched_by(name)
        assert environment["FSDP_VERSION"] == "2" and environment["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
        assert f"num_processes: {count}" in (CONFIGS / f"{name}.yaml").read_text()
    for stage in ("2", "3"):
        environment = launched_by(f"zero{stage}")
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"
