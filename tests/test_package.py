import doctest
import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import hf_sugar
from hf_sugar.files import replacing


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


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "report.md"
    file.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match="report.md cannot be written .*No space.*make room") as raised:
            with replacing(file) as new:
                new.write_text("new")
    assert raised.value.errno == errno.ENOSPC
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
