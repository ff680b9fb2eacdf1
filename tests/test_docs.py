"""The site, the tutorial, the Space, the citation, and the types of what is public."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from huggingface_hub import SpaceCardData

import hf_sugar


ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "examples" / "tutorial.ipynb"


class Page(HTMLParser):
    """What a page links to, and the names that links to it can end with."""

    def __init__(self, file: Path):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("href", "src") and value]
        self.anchors |= {value for name, value in attributes if name == "id"}


@pytest.mark.extras
@pytest.mark.timeout(600)
def test_site(tmp_path):
    pytest.importorskip("mkdocstrings", reason="the site needs mkdocs-material and mkdocstrings[python]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    pages = {file: Page(file) for file in tmp_path.rglob("*.html")}
    broken = []
    for file, page in pages.items():
        for link in page.links:
            if file.name != "404.html" and not re.match(r"[a-z]+:|//", link):
                path, _, anchor = unquote(link).partition("#")
                target = (file.parent / path).resolve() if path else file
                if not target.exists() or (anchor and anchor not in pages[target].anchors | {"__top"}):
                    broken.append((file.name, link))
    assert not broken
    assert not any("arithmatex" in file.read_text() for file in pages)  # every formula is MathML
    documented = set().union(*(page.anchors for page in pages.values()))
    for name in set(hf_sugar.__all__) - {"__version__"}:
        described = getattr(hf_sugar, name)
        assert f"{described.__module__}.{described.__qualname__}" in documented
    assert {file.with_suffix(".html").name for file in (ROOT / "docs").glob("*.md")} <= {file.name for file in pages}


def test_the_tutorial_is_stored_without_outputs():
    cells = json.loads(TUTORIAL.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.extras
@pytest.mark.timeout(900)
def test_tutorial(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="the tutorial needs nbclient and ipykernel")
    import nbformat

    notebook = nbformat.read(TUTORIAL, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})
    outputs = {
        cell["source"]: {kind: value for output in cell["outputs"] for kind, value in output.get("data", {}).items()}
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    }
    shown = {source.splitlines()[-1]: found for source, found in outputs.items()}
    assert sum("image/png" in found for found in shown.values()) >= 5
    assert "large-red-circle.png" in shown['search("one large red circle")']["text/plain"]
    assert shown['search(folder / "small-blue-triangle.png")']["text/plain"].startswith("['small-blue-triangle.png'")
    answers = eval(shown["answers"]["text/plain"])
    assert len(answers) == 4 and answers[0] == "one large blue circle"


def test_space_is_described():
    text = (ROOT / "examples" / "space" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    card = SpaceCardData(**front)
    assert card.sdk == "gradio" and (ROOT / "examples" / "space" / card.app_file).exists()
    pinned = re.search(r"^gradio==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert card.sdk_version == pinned and len(front["short_description"]) <= 60
    read = set(
        re.findall(r'environ.get\("(SUGAR_(?:MODEL|DATA))"', (ROOT / "examples" / "space" / "app.py").read_text())
    )
    assert read == set(re.findall("`(SUGAR_.*?)`", text))


@pytest.mark.extras
def test_space(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SUGAR_STEPS", "2")
    spec = importlib.util.spec_from_file_location("space", ROOT / "examples" / "space" / "app.py")
    spec.loader.exec_module(space := importlib.util.module_from_spec(spec))
    page = space.make_page()
    assert {"search", "ask"} <= {each.api_name for each in page.fns.values()}
    assert (tmp_path / "tiny-sugar" / "config.json").exists()


def test_citation():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert found["version"] == hf_sugar.__version__ and found["authors"] == [{"name": "The hf_sugar authors"}]
    paper, bibtex = found["preferred-citation"], (ROOT / "README.md").read_text().split("```bibtex")[1]
    names = " and ".join(f"{each['given-names']} {each['family-names']}" for each in paper["authors"])
    for text in (paper["title"], names, paper["collection-title"], str(paper["year"])):
        assert text in " ".join(bibtex.split())


USE = """
from hf_sugar import {names}
from hf_sugar.evaluation import evaluate_tasks
from hf_sugar.retrieval import Hit, LanceIndex

reveal_type(evaluate_tasks)
reveal_type(LanceIndex)
index: SugarIndex
hits: list[list[Hit]] = index.search(["a red circle"], k=5)
model: SugarForConditionalGeneration = SugarForConditionalGeneration.from_pretrained("my-sugar")
embed = SugarEmbedder(model, SugarProcessor.from_pretrained("my-sugar"))
dim: int = embed.dim
answers: list[str] = SugarGenerator(model, embed.processor)([])
rag = SugarRAG(model, embed.processor, index, k=1)
"""


@pytest.mark.extras
def test_types(tmp_path):
    """A program that uses the public names passes mypy, each name is a class or function of ours, and misuse is found."""
    pytest.importorskip("mypy", reason="types are checked by mypy")
    names = sorted(set(hf_sugar.__all__) - {"__version__"})
    program = USE.format(names=", ".join(names)) + "".join(f"reveal_type({name})\n" for name in names)
    (tmp_path / "use.py").write_text(program)
    (tmp_path / "misuse.py").write_text(program.replace("k=5", "k='five'"))
    said = {}
    for name in "use", "misuse":
        command = [
            sys.executable,
            "-m",
            "mypy",
            "--config-file",
            str(ROOT / "pyproject.toml"),
            f"{tmp_path / name}.py",
        ]
        environment = {**os.environ, "MYPYPATH": str(ROOT / "src"), "MYPY_CACHE_DIR": str(tmp_path / "cache")}
        said[name] = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert "Success: no issues found" in said["use"], said["use"]
    revealed = re.findall('Revealed type is "(.*)"', said["use"])
    assert len(revealed) == len(names) + 2 and "Any" not in revealed
    assert said["misuse"].count("error:") == 1 and 'expected "int"' in said["misuse"]


def test_types_are_shipped_with_the_package():
    assert (Path(hf_sugar.__file__).parent / "py.typed").exists()
    source = Path(hf_sugar.__file__).read_text()
    typed = re.findall(r"^    from \.(\w+)(?:\.\w+)? import (\w+) as \2$", source, re.MULTILINE)
    assert {name: module for module, name in typed} == hf_sugar._MODULE_OF
