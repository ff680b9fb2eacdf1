"""What mkdocs.yml needs besides the pages: the start page is README.md, the tutorial its notebook, the reference the public
names of each package, links that leave docs/ are checked and become text, and formulas MathML."""

import importlib
import inspect
import json
import re
from html import unescape
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]
# Pages made of files elsewhere in the repository.
COPIES = {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
NOTEBOOK = "examples/tutorial.ipynb"
PACKAGES = "models data alignment teachers training inference retrieval evaluation export hub world".split()
# Pages in the order of reading; those that are not named here follow the guides.
GUIDES = "data teachers method evaluation retrieval serve short_embeddings export scale memory gpu kernels".split()
PROJECT = "backbones harnesses common_tests compatibility".split()


def on_files(files, config):
    made = {page: (ROOT / source).read_text() for page, source in COPIES.items()}
    made["tutorial.md"] = notebook_page(ROOT / NOTEBOOK)
    made |= {f"api/{package}.md": reference_page(package) for package in PACKAGES}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    written = {file.src_uri for file in files.documentation_pages()} - set(made)
    guides, project = ([f"{page}.md" for page in pages if f"{page}.md" in written] for pages in (GUIDES, PROJECT))
    guides += sorted(written - {*guides, *project})
    config.nav = [
        {"Home": "index.md"},
        {"Tutorial": "tutorial.md"},
        {"Guides": guides},
        {"Reference": [f"api/{package}.md" for package in PACKAGES]},
        {"Project": [*project, "CONTRIBUTING.md", "CHANGELOG.md"]},
    ]
    return files


def notebook_page(path):
    """A notebook as Markdown, without what its cells print."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells)


def reference_page(package):
    """The classes and functions that a package names as public, from their docstrings."""
    module = importlib.import_module(f"hf_sugar.{package}")
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
    ]
    shown = [getattr(module, name) for name in names if not name.startswith("_")]
    shown = [each for each in shown if inspect.isclass(each) or inspect.isfunction(each)]
    lines = [reference(each) for each in shown if each.__module__.startswith("hf_sugar")]
    return "\n\n".join([f"# hf_sugar.{package}", to_markdown(module.__doc__ or ""), *lines])


def reference(each):
    """What mkdocstrings replaces by the docstring; settings are described by the `help` of their fields."""
    lines = [f"::: {each.__module__}.{each.__name__}", ""]
    settings = {name: field for name, field in getattr(each, "__dataclass_fields__", {}).items() if name in vars(each)}
    if any("help" in field.metadata for field in settings.values()):
        lines += ["| setting | default | |", "|---|---|---|"]
        for name, field in settings.items():
            text = str(field.metadata.get("help", "")).replace("|", "\\|")
            lines.append(f"| `{name}` | `{field.default!r}` | {text} |")
    return "\n".join(lines)


def on_page_markdown(markdown, page, config, files):
    source = COPIES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    if page.file.src_uri == "tutorial.md":
        source = NOTEBOOK
    pages = {(ROOT / path).resolve(): uri for uri, path in (*COPIES.items(), ("tutorial.md", NOTEBOOK))}

    def link(match):
        label, target = match.groups()
        path, at, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        file = (ROOT / source).parent.joinpath(path).resolve()
        if not file.exists():
            raise PluginError(f"{source} links to {target}, which is not there.")
        if file in pages:
            return f"[{label}]({pages[file]}{at}{anchor})"
        if file.is_relative_to(ROOT / "docs"):
            return f"[{label}]({file.relative_to(ROOT / 'docs')}{at}{anchor})"
        return label  # in the repository, not on the site

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [re.sub(r"\[([^\[\]]*)\]\(([^()\s]+)\)", link, text) for text in parts[::2]]
    return "".join(parts)


def on_page_content(html, **kwargs):
    def mathml(match):
        return convert(unescape(match[2]), display="block" if match[1] == "div" else "inline")

    return re.sub(r'<(div|span) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', mathml, html, flags=re.DOTALL)


def to_markdown(text):
    """A docstring as Hugging Face writes them: arguments as a list, and [`~training.SugarTrainer`] as a name."""
    text = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\](?!\()", r"`\1`", text)
    lines, section = [], ""
    for line in text.splitlines():
        if re.fullmatch(r"[A-Z]\w+:", line):
            section = line
            lines += ["", f"**{line[:-1]}**", ""]
            continue
        if line and not line.startswith("    "):
            section = ""
        if section in ("Args:", "Raises:", "Attributes:") and re.match(r" {4}\S", line):
            lines.append("- " + re.sub(r"^([\w, *]+?)(?= \(|:)", r"**\1**", line[4:]))
        else:
            lines.append(line[4:] if section and section != "Example:" else line)
    return "\n".join(lines)


class HuggingFaceDocstrings(griffe.Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
