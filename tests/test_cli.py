import dataclasses
import importlib
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time

import pytest
import tiny
import torch
import yaml
from huggingface_hub import HfApi
from PIL import Image
from rows import llava, mmc4, write
from tiny_runs import caption, conversation, rows, story

from hf_sugar import SugarForConditionalGeneration, SugarTrainingConfig
from hf_sugar.cli.demo import _second_process
from hf_sugar.cli.main import COMMANDS, console, main
from hf_sugar.cli.parsing import UsageError, command_settings, parse
from hf_sugar.cli.train import ModelArguments, estimate
from hf_sugar.evaluation import EvaluationData, label_ceilings, load_tasks, to_dict
from hf_sugar.teachers import TripleEncoder
from hf_sugar.training.config import _WITHOUT_EFFECT


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    tiny.llava().save_pretrained(path / "llava")
    tiny.processor().save_pretrained(path / "llava")
    (path / "images").mkdir()
    images = [f"images/{i}.png" for i in range(12)]
    for i, image in enumerate(images):
        tiny.image(i).save(path / image)
    write(path / "llava.json", [llava(image, gpt=f"a red circle {i}") for i, image in enumerate(images)])
    pages = [["a page.", f"a star {i}.", f"a square {i}."] for i in range(12)]
    shown = [((image, 1), (following, 2)) for image, following in zip(images, images[1:] + images[:1])]
    write(path / "mmc4.jsonl", list(map(mmc4, pages, shown)))
    settings = {
        "model_name_or_path": str(path / "llava"),
        "use_peft": True,
        "lora_r": 4,
        "train_data": [{"path": str(path / "llava.json")}, {"path": str(path / "mmc4.jsonl")}],
        "eval_data": [{"path": str(path / "llava.json")}],
        "teachers": tiny.teachers(path / "teachers"),
        "teacher_cache_dir": str(path / "cache"),
        "delta": 2.0,
        "output_dir": str(path / "out"),
        "retrieval_dim": 16,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "image_text_data": {"test": str(path / "llava.json")},
        "interleaved_data": str(path / "mmc4.jsonl"),
        "generation_data": str(path / "llava.json"),
    }
    (path / "train.yaml").write_text(yaml.safe_dump(settings))
    return path


def test_prepare_train_evaluate(place, capsys):
    """Raw files in two layouts, mixed, to a report, by the commands alone."""
    keys = ("train_data", "eval_data", "teachers", "teacher_cache_dir", "delta")
    settings = yaml.safe_load((place / "train.yaml").read_text())
    (place / "prepare.yaml").write_text(yaml.safe_dump({key: settings[key] for key in keys}))
    main(["prepare", "--config", str(place / "prepare.yaml")])
    assert "0 skipped" in capsys.readouterr().out
    files = list((place / "cache").glob("shard-*"))
    stamps = {file: file.stat().st_mtime_ns for file in files}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_sugar.training.labels.measure_labels", None)  # `prepare` has
        main(["train", "--config", str(place / "train.yaml"), "--max_steps", "3"])
    assert "image to text R@1" in capsys.readouterr().out
    # training finds all shards
    assert set((place / "cache").glob("shard-*")) == stamps.keys()
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    report = json.loads((place / "out" / "report.json").read_text())
    assert report["runs"]["trained"]["test/image_to_text_recall@1"]["n"] == 12
    assert report["runs"]["trained"]["context_recall@1"]["n"] > 0
    assert (place / "out" / "losses.png").stat().st_size > 1000
    assert (place / "out" / "adapter" / "adapter_model.safetensors").exists()

    evaluation = {key: settings[key] for key in ("image_text_data", "interleaved_data", "generation_data", "teachers")}
    (place / "evaluate.yaml").write_text(yaml.safe_dump(evaluation))
    arguments = ["--model_name_or_path", str(place / "out"), "--output_dir", str(place / "evaluated")]
    main(["evaluate", "--config", str(place / "evaluate.yaml"), *arguments])
    again = json.loads((place / "evaluated" / "report.json").read_text())
    assert "default kernel" not in " ".join(again["notes"])
    # what was saved is what was trained, and the labels are those that it was trained with
    assert [*report["runs"]] == ["chance", "labels", "trained"]
    assert again["runs"] == {name.replace("trained", "out"): results for name, results in report["runs"].items()}
    assert again["runs"]["chance"]["test/image_to_text_recall@1"] == pytest.approx(100 / 12)
    tasks = load_tasks(EvaluationData(interleaved_data=settings["interleaved_data"]))
    encoder = TripleEncoder.from_teachers(settings["teachers"], device="cpu")
    with_default, trained_with = (to_dict(label_ceilings(tasks, encoder, delta=delta)) for delta in (1.0, 2.0))
    assert with_default != trained_with and trained_with.items() <= again["runs"]["labels"].items()


def test_streamed_training(place, tmp_path, capsys):
    """What `prepare` read as a stream, training reads as a stream, with no teacher loaded."""
    settings = yaml.safe_load((place / "train.yaml").read_text())
    prepare = {key: settings[key] for key in ("train_data", "eval_data", "teachers", "delta")} | {"streaming": True}
    train = settings | prepare | {"output_dir": str(tmp_path / "out"), "logging_steps": 1}
    del train["interleaved_data"], train["generation_data"]
    for name, mapping in (("prepare", prepare), ("train", train)):
        mapping["teacher_cache_dir"] = str(tmp_path / "cache")
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(mapping))
    with pytest.raises(ValueError, match="a streaming dataset is not read before it is used. Run `hf-sugar prepare`"):
        main(["train", "--config", str(tmp_path / "train.yaml"), "--eval_strategy", "no"])
    main(["prepare", "--config", str(tmp_path / "prepare.yaml")])
    assert "36 rows" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_sugar.teachers.checkpoint.AutoModel", None)
        patch.setattr("hf_sugar.training.labels.measure_labels", None)
        main(["train", "--config", str(tmp_path / "train.yaml"), "--save_strategy", "steps", "--save_steps", "2"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [*report["runs"]] == ["chance", "trained"] and "labels reach is not measured: cannot load" in report[
        "notes"
    ][0]
    [state] = (tmp_path / "out").rglob("trainer_state.json")
    losses = [entry["structure_loss"] for entry in json.loads(state.read_text())["log_history"][:2]]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)


def test_memory_is_that_of_the_projector_that_will_be_made(place, tmp_path):
    """A plain backbone gets one of the size that the settings ask for; that of a Sugar model is there."""
    sugar = SugarForConditionalGeneration.from_pretrained(place / "llava", retrieval_dim=8)
    sugar.save_pretrained(tmp_path / "sugar")
    hidden = sugar.config.get_text_config().hidden_size

    def trained(name, dim):
        args = SugarTrainingConfig(str(tmp_path), retrieval_dim=dim, use_cpu=True)
        return estimate(args, ModelArguments(model_name_or_path=str(name), use_peft=True)).trained

    assert trained(place / "llava", 32) - trained(place / "llava", 16) == 16 * hidden
    assert trained(tmp_path / "sugar", 32) == trained(tmp_path / "sugar", 16) == trained(place / "llava", 8)


@pytest.mark.extras
def test_prepare_in_two_processes(place, tmp_path):
    write(tmp_path / "rows.json", [llava(None, f"say {i}", f"it is {i}") for i in range(1100)])
    teachers = yaml.safe_load((place / "train.yaml").read_text())["teachers"]
    command = ["prepare", "--train_data", str(tmp_path / "rows.json"), "--teachers", json.dumps(teachers)]
    main([*command, "--teacher_cache_dir", str(tmp_path / "one")])

    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "hf_sugar.cli.main"]
    done = subprocess.run(
        [sys.executable, *launch, *command, "--teacher_cache_dir", str(tmp_path / "two")],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.count("2200 encoded") == 1
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / n).glob("shard-*")} for n in ("one", "two"))
    assert one == two and len(one) > 2


def run(*argv: str) -> subprocess.CompletedProcess:
    """`hf-sugar` in a process of its own, with the CPU seconds that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "hf_sugar.cli.main", *argv], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    done.seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done


def test_help_is_answered_at_once():
    done = run("--help")
    assert done.returncode == 0 and done.seconds < 1 and all(f" {command} " in done.stdout for command in COMMANDS)
    done = run("train", "--help")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.seconds < 1 and len(lines) < 120 and max(map(len, lines)) < 120
    for name in ("structure_weight", "train_data", "lora_r", "output_dir", "image_text_data"):
        assert f"--{name}" in done.stdout
    assert "packing" not in done.stdout and "adam_beta1" not in done.stdout
    everything = run("train", "--help-all").stdout
    assert "--adam_beta1" in everything and "--loss_type" in everything
    assert "packing" not in everything and "label_smoothing" not in everything  # refused, so not offered


@pytest.mark.parametrize("command", COMMANDS)
def test_settings_read_from_the_source_are_those_of_the_classes(command):
    module = importlib.import_module(f"hf_sugar.cli.{command}")
    for name, read in command_settings(command).items():
        fields = [field for field in dataclasses.fields(getattr(module, name)) if field.init]
        assert set(read) == {field.name for field in fields} - (set(_WITHOUT_EFFECT) if command == "train" else set())
        for field in fields:
            if field.name in read and isinstance(field.default, str | int | float):
                assert read[field.name].default in (field.default, None), field.name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("search --qery x", "`--qery`: there is no such setting. Did you mean `query`?"),
        ("train --lerning-rate 1", "Did you mean `learning_rate`?"),
        ("train --learning_rate high", "`learning_rate` is 'high'; it must be a number."),
        ("train --bf16=maybe", "`bf16` is 'maybe'; it must be true or false."),
        ("train --label_kernel dtw", "`label_kernel` is 'dtw'; it must be one of gak, mean."),
        ("demo --lora 8", "`lora` is '8'; it must be a mapping, as {name: value}."),
        ("index --config nowhere.yaml", "`--config nowhere.yaml` cannot be read as YAML: [Errno 2] No such file"),
        ("train --model_name_or_path", "expected one argument"),
        ("chat my-sugar b", "'b': what is it"),
        ("train", "`model_name_or_path` is not set"),
        ("prepare", "`train_data` is not set"),
        ("push my-sugar", "`repo_id` is not set: Where to, for example me/my-sugar."),
        ("brew", "invalid choice: 'brew'"),
    ],
)
def test_mistyped(argv, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        main(argv.split())


def test_mistakes_in_yaml(tmp_path):
    file = tmp_path / "train.yaml"
    for text, message in (
        ("struct_weight: 1", f"{file}, `struct_weight`: there is no such setting. Did you mean `structure_weight`?"),
        ("max_steps: many", f"{file}, `max_steps` is 'many'; it must be an integer."),
        ("padding_free: 3", f"{file}, `padding_free` is '3'; it must be true or false."),
        ("- a", "must hold settings"),
        ("a: [", "cannot be read as YAML"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=re.escape(message)):
            main(["train", "--config", str(file)])


def read(*argv: str) -> list:
    return parse(argv[0], COMMANDS[argv[0]], list(argv[1:]))


def test_values_of_yaml_and_of_arguments(tmp_path):
    (tmp_path / "a.yaml").write_text("train_data: [{path: a.json, weight: 1}]\nlearning_rate: 1e-4\nstreaming: true\n")
    argv = ["--config", str(tmp_path / "a.yaml"), "--learning-rate", "2e-4", "--no_bf16", "--output_dir", "x"]
    data, args, *_ = read("train", "my-llava", *argv, "--teachers", "{cross: clip}")
    assert data.train_data == [{"path": "a.json", "weight": 1}] and data.streaming is True
    assert args.learning_rate == 2e-4 and args.bf16 is False and args.teachers == {"cross": "clip"}
    corpus = read("index", "my-sugar", "{path: a.json, image_root: b}", "c.json", "--files", "d")[1]
    assert corpus.data == [{"path": "a.json", "image_root": "b"}, "c.json"]
    with pytest.raises(UsageError, match="`data` is .*; it must be a mapping"):
        read("index", "my-sugar", "{path: [", "--files", "d")


def test_environment_of_yaml(tmp_path, monkeypatch):
    """As TRL's command line takes it."""
    monkeypatch.setenv("SUGAR_VARIABLE", "0")
    for env, outcome in (("{SUGAR_VARIABLE: 1}", "1"), ("[SUGAR_VARIABLE]", UsageError)):
        (tmp_path / "a.yaml").write_text(f"env: {env}\n")
        argv = ("train", "my-llava", "a.json", "--output_dir", "x", "--use_cpu", "--config", str(tmp_path / "a.yaml"))
        if outcome is UsageError:
            with pytest.raises(UsageError, match="`env` .* must be a mapping"):
                read(*argv)
        else:
            read(*argv)
            assert os.environ["SUGAR_VARIABLE"] == outcome


def test_arguments_without_flags():
    data, args, model, _ = read("train", "--estimate-memory", "my-llava", "--use_cpu", "yes", "a.json", "b.json")
    assert model.model_name_or_path == "my-llava" and data.train_data == ["a.json", "b.json"] and args.estimate_memory
    model, args = read("search", "--json", "--memory_map=false", "--index", "i", "my-sugar", "a circle")
    assert model.model_name_or_path == "my-sugar" and args.query == ["a circle"] and args.json and not args.memory_map


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("check nowhere.json", ""),
        ("search --query x --qery y", ""),
        ("chat org/nowhere", "The model 'org/nowhere' cannot be loaded."),
    ],
)
def test_a_mistake_is_one_line(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf-sugar", *argv.split()])
    assert console() == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"error: {message}") and len(said.err.splitlines()) == 1
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--debug"])
    assert console() == 2 and "Traceback" in capsys.readouterr().err


def test_without_network(hub, monkeypatch, capsys):
    def push_checkpoint(*args, **kwargs):
        HfApi("http://127.0.0.1:9").create_repo("me/sugar", token="a")

    monkeypatch.setattr("hf_sugar.cli.push.push_checkpoint", push_checkpoint)
    monkeypatch.setattr(sys, "argv", ["hf-sugar", "push", "sugar", "--repo_id", "me/sugar"])
    assert console() == 2 and capsys.readouterr().err.startswith("error: The Hub cannot be reached")


def test_what_is_wrong_is_said_before_the_model_is_loaded(place, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_sugar.SugarForConditionalGeneration.from_pretrained", None)
    for name, run in (("sft", "{}"), ("cut", '{"settings": {"struct')):
        (tmp_path / name).mkdir()
        config = {"model_type": "sugar", "random_projector": name == "sft"}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "sugar_run.json").write_text(run)
    data, llava = str(place / "llava.json"), str(place / "llava")
    of_images = f"{{image: {tiny.encoder('dinov2', tmp_path / 'dinov2')}}}"
    trained = ["--teachers", "tiny", "--output_dir", str(tmp_path / "unused")]
    for message, argv in {
        "`k` is 0": ["search", llava, "x", "--k", "0"],
        "nosuch/index.json does not exist": ["search", llava, "x", "--index", "nosuch"],
        "other/index.json does not exist": ["chat", llava, "--index", "other"],
        "`teachers` is 'tinny'": ["train", llava, data, "--teachers", "tinny", "--output_dir", "unused"],
        "`train_data` is not set": ["train", llava, "--output_dir", "unused"],
        "No data": ["evaluate", llava],
        "every source a `weight`": ["check", data, f"{{path: {data}, weight: 2}}"],
        "`split` is of datasets": ["embed", llava, "--files", str(place / "images"), "--split", "test"],
        "leave out batch_size, shard_size": ["index", llava, "--merge", "a", "--batch_size", "2", "--shard_size", "3"],
        "`batch_size` is 0": ["index", llava, data, "--batch_size", "0"],
        "`teachers` are named": ["evaluate", llava, "--generation_data", data, "--teachers", "tiny"],
        "slices.0. is a text, which the only teacher": [
            "evaluate",
            llava,
            "--image_text_data",
            data,
            "--teachers",
            of_images,
        ],
        "`max_new_tokens` is 0": ["evaluate", llava, "--generation_data", data, "--max_new_tokens", "0"],
        "`revision`: .*llava is a directory": ["search", llava, "x", "--revision", "v2"],
        "`rerank` needs an `index`": ["chat", llava, "--rerank", "2"],
        "`rerank_rows` is mined, and so": ["mine", llava, data, "--output", "mined", "--rerank_rows", "mined"],
        "nowhere.json does not exist": ["train", llava, data, "--generation_data", "nowhere.json", *trained],
        "not trained .llava is a plain 'llava' model": ["embed", llava, data, "--output", str(tmp_path / "e")],
        "not trained .`random_projector` is true in its config.json": ["index", str(tmp_path / "sft"), data],
        "cut/sugar_run.json is not valid JSON": [
            "evaluate",
            str(tmp_path / "cut"),
            *("--image_text_data", data, "--teachers", "tiny"),
        ],
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            main(argv)


def test_demo_on_own_data(place, capsys, monkeypatch):
    for name, maker in (("conversations", conversation), ("captions", caption), ("stories", story)):
        rows([maker], 12).to_parquet(place / f"{name}.parquet")
    settings = {
        "output_dir": str(place / "demo"),
        "model_name_or_path": str(place / "llava"),
        "teachers": tiny.teachers(place / "teachers"),
        "train_data": [str(place / f"{name}.parquet") for name in ("conversations", "captions", "stories")],
        "image_text_data": {"test": str(place / "captions.parquet")},
        "interleaved_data": str(place / "stories.parquet"),
        "generation_data": {"test": str(place / "conversations.parquet")},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "retrieval_dim": 16, "use_cpu": True},
        "lora": {"r": 4},
    }
    (place / "demo.yaml").write_text(yaml.safe_dump(settings))
    main(["demo", "--config", str(place / "demo.yaml")])
    report = json.loads((place / "demo" / "report.json").read_text())
    columns = ["chance", "labels", "untouched (last)", "untouched (mean)", "SFT (last)", "SFT (mean)", "Sugar"]
    assert list(report["runs"]) == columns
    assert "test/exact_match" in report["runs"]["Sugar"] and "test/exact_match" in report["runs"]["untouched (last)"]
    for name in ("losses", "similarities", "alignment", "gallery", "recall"):
        with Image.open(place / "demo" / f"{name}.png") as picture:
            assert min(picture.size) > 100
    printed = capsys.readouterr().out.split("\nthe report\n")[1]
    assert "report.md" in printed and max(map(len, printed.splitlines()[:20])) <= 100
    text = (place / "demo" / "report.md").read_text()
    assert "36 rows, 2 steps, seed 0, " in text and "| test: image to text R@1 | 8.3 |" in text
    assert not re.search(r"\w_recall|exact_match|nan", text)
    for command in re.search("```bash\n(.*)```", text, re.DOTALL)[1].splitlines():
        words = shlex.split(command)
        monkeypatch.setattr(f"hf_sugar.cli.{words[1]}.{words[1]}", lambda *settings: None)
        main(words[1:])


def test_baselines_of_the_demo_run_in_a_second_process(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", (threads := []).append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    log = tmp_path / "new" / "log"
    with _second_process(log) as call:
        process, printed, failed = call(os.getpid), call(print, "seen"), call(int, "three")
        assert threads == [2]
        assert process() != os.getpid() and printed() is None
        with pytest.raises(ValueError, match="'three'"):
            failed()
    assert threads == [2, 4] and log.read_text() == "seen\n"
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), _second_process(log) as call:  # what it is at is not waited for
        call(time.sleep, 300)
        raise KeyboardInterrupt
    assert time.monotonic() - started < 60
    with pytest.raises(OSError), _second_process(tmp_path):
        pass

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with _second_process(log) as call:
        assert call(os.getpid)() == os.getpid()


@pytest.mark.extras
def test_the_second_process_ends_with_the_first(tmp_path):
    """Which is killed."""
    code = (
        "import os, pathlib, time; from hf_sugar.cli.demo import _second_process\n"
        "with _second_process(pathlib.Path('log')) as call:\n"
        "    print(call(int, '3')(), call(time.sleep, 600), flush=True), os.kill(os.getpid(), 9)"
    )
    settings = {"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "2"}, "timeout": 300}
    # waits until no process of it is left
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **settings)
    assert "3 <" in done.stdout, done.stderr
