import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import hf_sugar


LAZY = "trl", "datasets", "peft"
ROOMS = [f"hf_sugar.{path.stem}" for path in Path(hf_sugar.__file__).parent.iterdir()]


@pytest.mark.parametrize(
    "imports, absent",
    [
        ("import hf_sugar", ("torch", "transformers", "numpy", *LAZY)),
        # these files travel to Hub repositories, where nothing else of the package is
        ("import hf_sugar.models", (*(room for room in ROOMS if room != "hf_sugar.models"), *LAZY)),
        ("import hf_sugar.data", ("torch", "transformers")),
        (
            "from hf_sugar import SugarTrainer, SugarGenerator; from hf_sugar.retrieval import SugarRAG",
            ("faiss", "lancedb", "gradio", "matplotlib"),
        ),
    ],
)
def test_importing_is_light(imports, absent):
    code = f"import sys; {imports}; print([name for name in {absent} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
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
