import doctest
import importlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_trainer
import tiny

import hf_sugar


README = (Path(__file__).parents[1] / "README.md").read_text()


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_import_is_light():
    heavy = "torch", "transformers", "trl", "datasets", "numpy"
    result = run(f"import sys, hf_sugar; print([name for name in {heavy!r} if name in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("name", ["alignment.kernel", "evaluation.metrics", "training.loss", "world.dataset"])
def test_examples_print_what_they_say(name):
    """Of the docstrings that need no checkpoint."""
    module = importlib.import_module(f"hf_sugar.{name}")
    parser = doctest.DocTestParser()
    runner = doctest.DocTestRunner()
    for item in doctest.DocTestFinder().find(module):
        runner.run(parser.get_doctest(item.docstring.replace("```", ""), item.globs, item.name, item.filename, 0))
    assert runner.summarize().attempted and not runner.failures


def test_every_promised_name_is_there():
    promised = {
        "SugarConfig",
        "SugarForConditionalGeneration",
        "SugarProcessor",
        "SugarTrainer",
        "SugarTrainingConfig",
        "StructureLoss",
        "global_alignment_kernel",
        "TripleEncoder",
        "SugarIndex",
    }
    assert promised <= set(dir(hf_sugar))
    for name in promised:
        assert getattr(hf_sugar, name).__name__ == name


def test_models_need_only_torch_and_transformers():
    """These files travel to Hub repositories, where nothing else of the package is."""
    result = run(
        "import sys, hf_sugar.models; print([m for m in sys.modules if m.startswith('hf_sugar.') and "
        "not m.startswith('hf_sugar.models')] + [m for m in ('trl', 'datasets', 'peft') if m in sys.modules])"
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_help_answers_within_a_second():
    times = []
    for _ in range(3):
        start = time.monotonic()
        result = subprocess.run([sys.executable, "-m", "hf_sugar.cli.main", "--help"], capture_output=True, text=True)
        times.append(time.monotonic() - start)
        assert result.returncode == 0
        assert all(command in result.stdout for command in ("demo", "check", "prepare", "train", "evaluate"))
    assert min(times) < 1


@pytest.mark.parametrize("quantized", [False, True], ids=["LoRA", "QLoRA"])
def test_what_the_readme_shows_runs(quantized, tmp_path, monkeypatch, capsys):
    """Train, load, embed, search, generate, load with the Auto classes: with a tiny backbone, and from a directory."""
    if quantized:
        pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny.llava(hidden_size=64, vision_hidden_size=64).save_pretrained("llava")
    tiny.processor().save_pretrained("llava")
    tiny.image().save("photo.jpg")
    rows = test_trainer.rows([test_trainer.conversation])
    rows.to_parquet("rows.parquet")
    settings = {**test_trainer.COMMON, "retrieval_dim": 16, "teachers": tiny.teachers(tmp_path / "teachers")}
    names = {"rows": rows, "images": ["photo.jpg", tiny.image(1)], "settings": settings}

    def run(opening: str, **replaced: str):
        [block] = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if opening in b]
        for old, new in {"llava-hf/llava-1.5-7b-hf": "llava", "me/my-sugar": "my-sugar", **replaced}.items():
            block = block.replace(old, new)
        exec(block, names)

    run("from datasets import load_dataset", **{"structure_weight=0.3": "structure_weight=0.3, **settings"})
    if quantized:
        shutil.rmtree("my-sugar")
        run("load_in_4bit=True", **{"load_in_4bit=True": "load_in_4bit=True, **settings"})
        names["trainer"].save_model()
    run("processor.embed_inputs(")
    assert names["embeddings"].shape == (3, 16) and len(names["index"]) == 2
    assert capsys.readouterr().out.strip()
    run("registers the Auto classes")
    assert isinstance(names["model"], hf_sugar.SugarForConditionalGeneration)
