"""Every snippet of README.md and docs/*.md, as it stands: Python is run, a command line is parsed or run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest
import tiny
from huggingface_hub import HfApi
from rows import karpathy, llava, write

import hf_sugar
from hf_sugar.cli import main as cli


ROOT = Path(__file__).parents[1]
EXTRAS = set(metadata("hf_sugar").get_all("Provides-Extra"))
TEXT = {"capture_output": True, "text": True, "check": True}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "model_cards" / "README.md", *(ROOT / "examples").rglob("*.md")]
# packages that `make test` does not install, a client without its server, a family of backbones that needs torchvision, and a dataset that is pushed
NOT_RUN = "sentence_transformers|mteb|openai|Qwen|llava-with-teachers"


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Line number and text of each block of a language."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def run(page: Path, names: dict):
    """Run the Python of a page in order, in one namespace. A traceback shows the line of the page."""
    for line, block in blocks(page, "python"):
        if not re.search(NOT_RUN, block):
            exec(compile("\n" * line + block, str(page), "exec"), names)


def command_lines() -> list[tuple[str, str]]:
    """Where and what: of fenced shell blocks, and of indented lines and comments of YAML that call `hf-sugar`."""
    found = []
    for page in (*TEXTS, *(ROOT / "examples").rglob("*.yaml")):
        lines = [line for _, block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
        called = "# +(hf-sugar|accelerate launch) " if page.suffix == ".yaml" else "    hf-sugar "
        lines += [line.lstrip("# ") for line in page.read_text().splitlines() if re.match(called, line)]
        found += [(str(page.relative_to(ROOT)), line.strip()) for line in lines if line.strip()]
    return found


@pytest.fixture
def parse(monkeypatch):
    """Reads the settings of `hf-sugar` without running the command."""

    def parse(argv: list[str]):
        monkeypatch.setattr(f"hf_sugar.cli.{argv[0]}.{argv[0]}", lambda *settings: None)
        cli.main(argv)

    return parse


@pytest.mark.parametrize("page,line", command_lines())
def test_a_command_line_is_understood(page, line, parse, monkeypatch):
    monkeypatch.chdir(ROOT)
    subprocess.run(["bash", "-n", "-c", line], check=True)
    for command in re.split("&&", line):
        words = shlex.split(command, comments=True)
        if words[0] == "accelerate":
            assert Path(words[words.index("--config_file") + 1]).exists()
            script = next(word for word in words if word.endswith((".py", ".main")))
            assert script == "hf_sugar.cli.main" or Path(script).exists()
        elif words[0] == "hf-sugar":
            if "..." not in words:
                parse(words[1:])
        elif words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
        elif words[0] == "python":
            assert words[1] == "-m" or Path(words[1]).exists() or (ROOT / page).with_name(words[1]).exists()
        elif words[:2] == ["pip", "install"]:
            for named in re.findall(r"hf_sugar\[([\w,-]+)\]", command):
                assert set(named.split(",")) <= EXTRAS
        else:
            assert words[0] in ("cp", "lmms-eval", "curl", "vllm"), f"{page}: who checks {line!r}?"


def test_the_table_of_extras_is_complete():
    install = PAGES[0].read_text().split("## Install\n")[1].split("\n## ")[0]
    named = [
        name for row in re.findall(r"^\| (`.*?) \|", install, re.MULTILINE) for name in re.findall("`(.+?)`", row)
    ]
    assert sorted(named) == sorted(EXTRAS)


def test_nothing_is_installed_from_a_registry_that_does_not_have_it():
    sources = [path for path in (ROOT / "src").rglob("*.*") if path.suffix in (".py", ".md")]
    configs = list((ROOT / "examples").rglob("*.yaml"))
    wrong = [
        (path, line)
        for path in TEXTS + sources + configs
        for line in path.read_text().splitlines()
        if re.search(r"pip install [\"']?hf[_-]sugar(?! @)", line)
    ]
    assert not wrong


@pytest.fixture
def workplace(hub, tmp_path, monkeypatch):
    """A working directory with the files that the snippets name, and a Hub with tiny models under the names in them."""
    monkeypatch.chdir(tmp_path)
    tiny.llava(hidden_size=64, vision_hidden_size=64).save_pretrained("made/llava")
    tiny.processor().save_pretrained("made/llava")
    teachers = tiny.teachers(Path("made"))
    for name, folder in {
        "llava-hf/llava-1.5-7b-hf": "made/llava",
        "facebook/dinov2-base": teachers["image"],
        "BAAI/bge-base-en-v1.5": teachers["text"],
        "openai/clip-vit-large-patch14": teachers["cross"],
    }.items():
        HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
    shutil.rmtree("made")
    Path("coco/photos").mkdir(parents=True)
    Path("photos").symlink_to("coco/photos")
    for i in range(4):
        tiny.image(i).save(f"photos/{i}.jpg")
    for name in "llava.json", "llava_v1_5_mix665k.json":
        write(Path(name), [llava(f"photos/{i}.jpg", gpt=f"a red circle {i}") for i in range(4)])
    captions = [[f"a blue square {i} {k}" for k in range(5)] for i in range(4)]
    images = [karpathy(f"photos/{i}.jpg", "test", sentences, cocoid=i) for i, sentences in enumerate(captions)]
    write(Path("dataset_coco.json"), {"images": images})
    tiny.image().save("photo.jpg")
    return tmp_path


def test_python_and_commands(workplace, capsys):
    """Of the README: train, train in 4 bits, embed, search, generate, push, load. Then of the other pages, with its model."""
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    names = {}
    run(PAGES[0], names)
    assert names["embeddings"].shape == (3, 768)
    assert len(names["index"]) == 4 and len(names["hits"][0]) == 4
    assert isinstance(names["model"], hf_sugar.SugarForConditionalGeneration)
    names |= {"dataset": names["load_data"]("llava.json"), "image": tiny.image()}
    names["quantization"] = names["trainer"].model.config.quantization_config
    for page in PAGES[1:]:
        run(page, names)
    capsys.readouterr()
    for _, block in blocks(PAGES[0], "bash"):
        for line in block.splitlines():
            if re.match("hf-sugar (check|index|search|push) ", line):
                assert not cli.main(shlex.split(line, comments=True)[1:]), line
    assert "a red circle" in capsys.readouterr().out  # of what the search finds


@pytest.mark.extras
def test_sentence_transformers(workplace):
    pytest.importorskip("sentence_transformers")
    model = hf_sugar.SugarForConditionalGeneration.from_pretrained("llava-hf/llava-1.5-7b-hf")
    model.config.random_projector = False
    model.save_pretrained("my-sugar")
    hf_sugar.SugarProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf").save_pretrained("my-sugar")
    [line] = re.findall("`hf-sugar (export my-sugar .*?)`", PAGES[0].read_text())
    cli.main(shlex.split(line))
    [block] = [block for _, block in blocks(PAGES[0], "python") if "SentenceTransformer" in block]
    names = {}
    exec(block, names)
    assert names["embeddings"].shape == (2, 768)


@pytest.mark.parametrize("number", (0, pytest.param(2, marks=pytest.mark.extras)))
def test_install_line(number, tmp_path):
    """Each line of Install beside a clone, without dependencies: every file of the package is there."""
    subprocess.run(["git", "clone", "-q", ROOT.as_uri(), tmp_path / "hf_sugar"], check=True)
    line = blocks(PAGES[0], "bash")[0][1].splitlines()[number]
    settings = {"PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1", "PIP_TARGET": "installed"}
    environment = {**os.environ, **settings, "ADDRESS": f"file://localhost{ROOT}"}
    line = line.replace("pip install", f"{shlex.quote(sys.executable)} -m pip install")
    subprocess.run(["bash", "-c", line], check=True, cwd=tmp_path, env=environment, timeout=120)
    package = tmp_path / "installed" / "hf_sugar"
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=tmp_path / "hf_sugar" / "src" / "hf_sugar", **TEXT
    ).stdout.split()
    assert set(tracked) <= {str(path.relative_to(package)) for path in package.rglob("*")}


def test_workarounds_are_where_their_page_says():
    page = (ROOT / "docs" / "compatibility.md").read_text().split("## Workarounds")[1]
    for file, name in re.findall(r"^\| `([\w/]+\.py)`(?:, `(\w+)`)?", page, re.MULTILINE):
        assert name in (ROOT / "src" / "hf_sugar" / file).read_text()
