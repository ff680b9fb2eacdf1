"""Training in several processes that divide the model among them: FSDP2, here on the CPU."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import tiny_backbones
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, gather_object
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.numpy import load_file
from tiny_runs import (
    caption,
    config,
    conversation,
    history,
    in_two_processes,
    rows,
    story,
    text_part,
    trainer,
    two_processes,
)
from trl.trainer.utils import add_fused_lm_head

from hf_sugar import SugarConfig, SugarForConditionalGeneration, SugarProcessor
from hf_sugar.cli.embed import EmbedArguments, embed
from hf_sugar.cli.main import main
from hf_sugar.memory import estimate_memory
from hf_sugar.retrieval import LanceIndex, SugarIndex
from hf_sugar.training import SugarCollator
from hf_sugar.training.discriminative import discriminative_rows
from hf_sugar.training.heads import add_structure_head


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
    "full": {"makers": (caption, story, words, words)},
    # matrices of two batches; the images of the second process stand beside its rows too
    "lora": {
        "makers": (caption, conversation, story, story),
        "lora": True,
        "gradient_checkpointing": True,
        "matrix": 8,
    },
}
RUNS["qlora"] = {**RUNS["lora"], "load_in_4bit": True}


def run(path, backbone, teachers, processes, makers, lora=False, matrix=None, resume=False, **settings):
    """What 5 steps give, with the same rows in the same global batches."""
    if matrix:
        settings |= {"matrix_batch_size": matrix // processes, "gradient_accumulation_steps": 2}
    common = {"per_device_train_batch_size": 4 // processes, "positions_per_sample": 99, "contrastive_mask_above": 2}
    common |= {"optim": "sgd", "train_sampling_strategy": "sequential", "save_strategy": "steps", "save_steps": 3}
    common |= {"eval_strategy": "steps", "eval_steps": 4}
    args = config(path, teachers, **{**common, "max_steps": 5, **settings})
    run = trainer(backbone, args, rows(makers, 16), lora, eval_dataset=rows((conversation, caption), 6))
    run.train(resume_from_checkpoint=resume)
    run.save_model()
    evaluated = ["eval_generative_loss", "eval_image_to_text_recall@1", "eval_text_to_image_recall@1"]
    return type(run.model).__name__, {key: history(run, key) for key in (*KEYS, *evaluated)}


def weights(path):
    """Of what was saved, as anyone loads it; but not of the projector that an adapter's stands for, which is made new."""
    model = SugarForConditionalGeneration.from_pretrained(path)
    return {name: x.detach() for name, x in model.named_parameters() if "original_module" not in name}


def sharded(name, path, backbone, teachers, settings):
    shard_on_the_cpu()
    return run(path, backbone, teachers, 2, **RUNS[name], **settings)


def divided_by_deepspeed(name, path, backbone, teachers, settings):
    """transformers (seen in 5.24) sends a run on the CPU past DeepSpeed: it is told that there is an accelerator."""
    import deepspeed

    torch.accelerator.is_available = lambda: True
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which needs a compiler
    settings |= {"use_cpu": False, "ddp_backend": "gloo", "dataloader_pin_memory": False}
    return run(path, backbone, teachers, 2, **RUNS[name], **settings)


def run_by_tokens(path, backbone, teachers, resume):
    """Tokens of the batches of an epoch in each process, and the losses of two epochs."""
    settings = {"padding_free": True, "max_batch_tokens": 100, "num_train_epochs": 2, "max_steps": -1}
    args = config(path, teachers, **settings, save_strategy="steps", save_steps=8)
    run = trainer(backbone, args, rows((conversation, caption, story), 48))
    tokens = [[int(batch["attention_mask"].sum()) for batch in run.get_train_dataloader()]]
    run.train(resume_from_checkpoint=resume)
    return gather_object(tokens), history(run, "loss")


def launched_by(name):
    """What `accelerate launch` with a configuration of examples/accelerate/ tells the processes."""
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "train.py"])
    args, *_ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = []
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


def in_full_precision():
    return {**launched_by("fsdp2"), "ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize(
    "name", ["full", *(pytest.param(name, marks=pytest.mark.extras) for name in ("lora", "qlora"))]
)
def test_fsdp2(backbone, teachers, tmp_path, name):
    """As one process with the same global batch, whatever the rows of a process are: losses, norms of gradients, an evaluation
    and the weights, which are saved whole; and a run goes on from its sharded checkpoint. Gradients of bfloat16 adapters are
    rounded before they are put together."""
    near = {"abs": 1e-3, "rel": 3e-3} if name == "qlora" else {"abs": 1e-5, "rel": 1e-5}
    _, one = run(tmp_path / "one", backbone, teachers, 1, **RUNS[name])
    two = tmp_path / "two"
    for resume in (False,) if name == "full" else (False, str(two / "checkpoint-3")):
        arguments = ("sharded", name, str(two), backbone, teachers, {"resume": resume})
        kind, values = in_two_processes(tmp_path, "test_scale", *arguments, **in_full_precision())
        assert kind.startswith("FSDP")
        assert min(one["contrastive_loss"]) > 0
        for key in one:
            assert values[key] == pytest.approx(one[key], **near), key
        expected = weights(tmp_path / "one")
        for parameter, value in weights(two).items():
            assert torch.allclose(value, expected[parameter], atol=near["abs"], rtol=near["rel"]), parameter
        assert (two / "checkpoint-3" / "pytorch_model_fsdp_0").is_dir()


@pytest.mark.extras
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("name", ["full", "lora"])
def test_deepspeed(backbone, teachers, tmp_path, stage, name):
    """As one process, and so is a run that is resumed. The projector is there before: ZeRO-3 would draw another one."""
    pytest.importorskip("deepspeed")
    model, processor = (
        SugarForConditionalGeneration.from_pretrained(backbone),
        SugarProcessor.from_pretrained(backbone),
    )
    backbone = str(tmp_path / "model")
    model.save_pretrained(backbone)
    processor.save_pretrained(backbone)
    _, one = run(tmp_path / "one", backbone, teachers, 1, **RUNS[name])
    two, expected = tmp_path / "two", weights(tmp_path / "one")
    environment = {**launched_by(stage), "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "false"}
    for resume in (False, str(two / "checkpoint-3")):
        arguments = ("divided_by_deepspeed", name, str(two), backbone, teachers, {"resume": resume})
        kind, values = in_two_processes(tmp_path, "test_scale", *arguments, **environment, DS_ACCELERATOR="cpu")
        for key in one:
            assert values[key] == pytest.approx(one[key], abs=1e-5, rel=1e-5), key
        for parameter, value in weights(two).items():
            torch.testing.assert_close(value, expected[parameter], atol=1e-5, rtol=1e-5, msg=parameter)


@pytest.mark.extras
def test_batches_by_tokens_in_two_processes(backbone, teachers, tmp_path):
    """None waits for another: their batches have about as many tokens at every step; and a run goes on exactly."""
    arguments = tmp_path, "test_scale", "run_by_tokens", str(tmp_path / "tokens"), backbone, teachers
    tokens, losses = in_two_processes(*arguments, False)
    tokens = np.array(tokens)
    assert tokens.shape == (2, len(losses) // 2) and len(losses) > 8
    waiting = 1 - tokens.mean() / tokens.max(axis=0).mean()
    assert waiting < 0.05, tokens
    assert in_two_processes(*arguments, str(tmp_path / "tokens" / "checkpoint-8"))[1] == losses


@pytest.mark.extras
def test_killed_under_fsdp2(backbone, teachers, tmp_path):
    """Killed three times, a run ends with the weights of one that never was."""
    settings = {"max_steps": 8, "save_steps": 1, "eval_strategy": "no"}

    def arguments(path, resume):
        how = {**settings, "resume": resume}
        return tmp_path, "test_scale", "sharded", "full", str(tmp_path / path), backbone, teachers, how

    for step in (2, 4, 6):
        command, environment = two_processes(*arguments("killed", step > 2), **in_full_precision())
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        state = tmp_path / "killed" / f"checkpoint-{step}" / "trainer_state.json"
        end = time.monotonic() + 300
        while not state.exists() and time.monotonic() < end:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert state.exists()
    for path, resume in (("killed", True), ("whole", False)):
        in_two_processes(*arguments(path, resume), **in_full_precision())
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


@pytest.mark.parametrize("family", tiny_backbones.EVERY_FAMILY)
def test_blank_image(family):
    """Of a blank image nothing is used, but that the vision tower was called: all of it has gradients, of zero."""
    vlm, processor = tiny_backbones.build(family)
    model = SugarForConditionalGeneration.from_vlm(vlm.train(), retrieval_dim=8)
    add_fused_lm_head(model, outputs=("log_probs",))
    add_structure_head(model)
    collator = SugarCollator(
        SugarProcessor.from_processor(processor), embed_slices=lambda slices: torch.ones(len(slices), 4), singles=1
    )
    examples = [{"messages": words(i), "images": []} for i in range(2)]
    columns = ("teacher_embeddings", "slice_modality", "single_slices")

    def forward(fill_up):
        batch = replace(collator, fill_up=fill_up)(examples)
        rows = [batch.pop(name) for name in columns]
        output = model(**batch, fused_lm_head=True)
        return output.loss, discriminative_rows(output.embeddings, output.single_embeddings, *rows)

    (loss, found), (expected_loss, expected) = forward(True), forward(False)
    torch.testing.assert_close(loss, expected_loss)
    for values, wanted in zip(found, expected):
        torch.testing.assert_close(values, wanted)
    (loss + found[0].sum() + found[3].sum()).backward()
    tower = vlm.get_encoder(modality="image")
    gradients = [parameter.grad for parameter in tower.parameters() if parameter.grad is not None]
    assert gradients and not any(gradient.any() for gradient in gradients)
    model.zero_grad()
    image = [{"messages": caption(0), "images": [tiny.image(0)], "loss_on": "captions"}]
    batch = collator(image)
    model(**{k: v for k, v in batch.items() if k not in columns}, fused_lm_head=True).embeddings.sum().backward()
    assert len(gradients) == sum(parameter.grad is not None for parameter in tower.parameters())


TEXTS = [f"{'abc'[n % 3] * (n + 1)}" for n in range(11)]


def letters(texts):
    vectors = np.array([[text.count(letter) + 0.1 * len(text) for letter in "abc"] for text in texts], np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_parts_of_an_index(tmp_path):
    """Put together, they are the index of all documents."""
    names = [str(tmp_path / name) for name in ("first", "second")]
    for name, texts in zip(names, (TEXTS[:4], TEXTS[4:])):
        SugarIndex.build(texts, letters, fingerprint="m", directory=name, shard_size=3)
    SugarIndex.merge(names, tmp_path / "all", factory="HNSW4", rescore_multiplier=9)
    merged, whole = (
        SugarIndex.load(tmp_path / "all", fingerprint="m"),
        SugarIndex.build(TEXTS, letters, fingerprint="m"),
    )
    np.testing.assert_array_equal(merged.embeddings, whole.embeddings)
    assert merged.metadata == whole.metadata and (merged.factory, merged.rescore_multiplier) == ("HNSW4", 9)
    for n in range(len(TEXTS)):
        assert merged[n] == whole[n]
    command = ["index", "model", "--merge", str(tmp_path / "all"), names[0], "--index", str(tmp_path / "more")]
    main([*command, "--search_options", "efSearch=8"])  # the other settings are those of the first
    more = SugarIndex.load(tmp_path / "more", fingerprint="m")
    assert (more.factory, more.search_options, more.rescore_multiplier) == ("HNSW4", "efSearch=8", 9)
    assert (len(more), SugarIndex.merge([tmp_path / "more"], tmp_path / "flat", "Flat").search_options) == (15, None)
    with pytest.raises(ValueError, match="nothing is embedded: leave out files, by, truncate_dim"):
        main([*command, "--files", "a", "--by", "texts", "--truncate_dim", "2"])
    SugarIndex.build(TEXTS, letters, fingerprint="n", directory=tmp_path / "odd")
    with pytest.raises(ValueError, match="odd.* was built with another model"):
        SugarIndex.merge([*names, tmp_path / "odd"], tmp_path / "other")
    SugarIndex.build(TEXTS, letters, fingerprint="m", by="document", directory=tmp_path / "odd")
    with pytest.raises(ValueError, match="odd was built with other settings than .*first"):
        SugarIndex.merge([names[0], tmp_path / "odd"], tmp_path / "other")


def test_shares_of_embeddings(tmp_path, monkeypatch):
    """The files of several processes, one after the other, are that of one."""
    model, kept = SimpleNamespace(embedder=lambda: letters), []
    texts = [TEXTS[0], " ", *TEXTS[1:9], " ", *TEXTS[9:]]
    corpus = SimpleNamespace(items=lambda: texts, by="auto", every_slice=False, on_bad_row="skip")
    monkeypatch.setattr(letters, "fingerprint", "m", raising=False)
    embed(model, corpus, EmbedArguments(str(tmp_path / "one.safetensors")))
    monkeypatch.setattr("hf_sugar.cli.embed.gather_object", lambda found: kept.extend(found) or kept)
    for rank in range(3):
        state = SimpleNamespace(num_processes=3, process_index=rank)
        monkeypatch.setattr("hf_sugar.cli.embed.distributed_state", lambda state=state: state)
        embed(model, corpus, EmbedArguments(str(tmp_path / "all.safetensors")))
    files = sorted(tmp_path.glob("all-*.safetensors"))
    assert [file.name for file in files] == [f"all-0000{n}-of-00003.safetensors" for n in range(3)]
    for name, values in load_file(tmp_path / "one.safetensors").items():
        np.testing.assert_array_equal(np.concatenate([load_file(file)[name] for file in files]), values)
    corpus.items = lambda: TEXTS[:2]
    with pytest.raises(ValueError, match="2 items for 3 processes"):
        embed(model, corpus, EmbedArguments(str(tmp_path / "all.safetensors")))


@pytest.mark.extras
def test_lance_takes_the_address_of_an_object_store(tmp_path):
    """Through the code of object stores, on a local path."""
    pytest.importorskip("lancedb")
    index = LanceIndex(f"file://{tmp_path}/database", letters, "m", storage_options={"timeout": "60s"})
    index.add(TEXTS, shard_size=3)
    index.add(TEXTS[:5])  # again
    again = LanceIndex(str(tmp_path / "database"), letters, "m")
    assert len(again) == len(TEXTS)
    assert again.search(["aaaa"], k=1)[0][0].metadata["text"].startswith("a")


@pytest.mark.parametrize(
    "sharding,weights,gradients,copy",
    [("fsdp2", 4 / 8, 4 / 8, 0), ("zero2", 2, 2 / 8, 4 / 8), ("zero3", 2 / 8, 2 / 8, 4 / 8)],
)
def test_estimate_divides(backbone, tmp_path, sharding, weights, gradients, copy):
    """Bytes a parameter of full weights in mixed precision, on each of 8 GPUs."""
    args = config(tmp_path, max_length=64, optim="adamw_torch")
    args.bf16 = True
    settings = SugarConfig.from_pretrained(backbone, retrieval_dim=16)
    found = estimate_memory(settings, args, dtype=torch.bfloat16, processes=8, sharding=sharding)
    parts, count = found.parts, found.trained
    assert parts["trained weights (adapters, projector)"] == int(weights * count)
    assert parts["gradients"] == int(gradients * count)
    assert parts["optimizer states (adamw_torch)"] == 8 * count // 8
    assert parts.get("float32 copy of what is trained", 0) == int(copy * count)
    assert ("weights gathered from all processes" in parts) == (sharding != "zero2")
    assert "each of 8 GPU(s)" in found.table() and "| 192 GB | yes |" in found.table()
    args.freeze_vision_tower = True
    less = estimate_memory(settings, args, dtype=torch.bfloat16, processes=8, sharding=sharding)
    tower = tiny.llava().model.vision_tower.num_parameters()
    assert less.trained == count - tower


def test_frozen_vision_tower(make):
    trainer = make(rows([caption], 4), freeze_vision_tower=True)
    frozen = {name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad}
    assert frozen and all("vision_tower" in name for name in frozen)
    assert len(frozen) == len(list(trainer.model.vlm.model.vision_tower.parameters()))


@pytest.mark.extras
def test_gpu_script_runs_dry(tmp_path):
    """Not that it is fast: every part runs and finds no wrong value."""
    script = CONFIGS.parents[1] / "benchmarks" / "gpu.py"
    command = [sys.executable, str(script), "--dry", "--output", str(tmp_path / "gpu.json")]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert result.returncode == 0 and not found["failed"], result.stderr[-3000:]
    assert len(found["found"]) > 20 and not any(row["wrong"] for row in found["found"])


def test_gpu_script_goes_on(tmp_path, monkeypatch, capsys):
    """A part that fails and a value that is wrong are in the table and in the exit status, and the other parts run."""
    monkeypatch.syspath_prepend(CONFIGS.parents[1] / "benchmarks")
    gpu = importlib.import_module("gpu")

    class Bench(gpu.Bench):
        def __init__(self, directory, dry):
            self.found = []

    def part(name, error=None, wrong=False):
        def run(bench):
            if error:
                raise error
            bench.add(name, 1.5, "ms", wrong)

        return run

    monkeypatch.setattr(gpu, "Bench", Bench)
    monkeypatch.setattr(gpu.logging, "set_verbosity_error", lambda: None)
    output = str(tmp_path / "gpu.json")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--output", output])
    for parts, line, status in (
        ({"a": part("a", RuntimeError("no memory")), "b": part("b")}, "| a | failed | RuntimeError: no memory |", 1),
        ({"a": part("a", wrong=True), "b": part("b")}, "| a | 1.5 ms | WRONG |", 1),
        ({"a": part("a"), "b": part("b")}, "| a | 1.5 ms |  |", 0),
    ):
        monkeypatch.setattr(gpu, "PARTS", parts)
        assert gpu.main() == status
        printed = capsys.readouterr().out
        assert line in printed and "| b | 1.5 ms |  |" in printed
    assert [row["what"] for row in json.loads(Path(output).read_text())["found"]] == ["a", "b"]
