import doctest
import importlib
import subprocess
import sys
import time

import pytest

import hf_sugar


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


def test_reading_data_needs_no_torch():
    result = run("import sys, hf_sugar.data; print([m for m in ('torch', 'transformers') if m in sys.modules])")
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
