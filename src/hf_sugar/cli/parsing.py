"""How the settings of a command are read. They are fields of the dataclasses that its function takes, which are read from
their source: nothing here imports torch, so that `--help` and a mistyped flag are answered at once."""

import argparse
import ast
import difflib
import functools
import importlib
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


# Where a class of settings is, if not where it is used.
_MODULES = """
hf_sugar.cli.arguments hf_sugar.cli.checkpoint hf_sugar.cli.embed hf_sugar.training.config hf_sugar.evaluation.tasks
hf_sugar.serving.config trl.trainer.sft_config trl.trainer.base_config trl.trainer.model_config transformers.training_args
""".split()
# Settings of TRL and transformers that most runs set, so that `--help` lists them with ours.
_COMMON = """
model_name_or_path model_revision dtype use_peft lora_dropout lora_target_modules load_in_4bit output_dir num_train_epochs
max_steps per_device_train_batch_size gradient_accumulation_steps gradient_checkpointing bf16 use_cpu seed logging_steps
eval_strategy save_steps resume_from_checkpoint report_to push_to_hub
""".split()
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
# By the type of a setting: what makes a value of a text, and what it must be.
_READERS = {
    "bool": (lambda text: _BOOLEANS[text.lower()], "true or false"),
    "int": (int, "an integer"),
    "float": (float, "a number"),
    "dict": (lambda text: dict(yaml.safe_load(text)), "a mapping, as {name: value}"),
}


class UsageError(ValueError):
    """What was typed is not a setting of the command, or not a value of the setting."""


@dataclass(frozen=True)
class Setting:
    """A field of a dataclass as its source says it."""

    name: str
    type: str
    required: bool
    ours: bool  # not of TRL or transformers
    default: Any = None
    help: str = ""
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def takes_list(self) -> bool:
        return "list[" in self.type

    @property
    def kind(self) -> str:
        """Type of a value; `"str"` where there are several."""
        kinds = set(re.split(r"[\s|\[\],]+", self.type)) - {"None", "list", ""}
        return kinds.pop() if len(kinds) == 1 else "str"

    def convert(self, value: Any, where: str = "") -> Any:
        """What a text on the command line or in YAML stands for; of anything else a number may be a list of one."""
        if isinstance(value, list) and self.takes_list:
            return [self.convert(item, where) for item in value]
        if self.kind == "bool" and isinstance(value, int | float) and value not in (0, 1):
            value = str(value)
        if not isinstance(value, str):
            number = isinstance(value, int | float) and self.kind in ("int", "float")
            return [value] if self.takes_list and number else value
        mapping = value.startswith("{") and (self.takes_list or "dict" in self.type)
        read, what = _READERS.get("dict" if mapping else self.kind, (str, f"one of {', '.join(self.choices)}"))
        try:
            if self.choices and value not in self.choices:
                raise ValueError
            return read(value)
        except (KeyError, TypeError, ValueError, yaml.YAMLError):
            raise UsageError(f"{where}`{self.name}` is {value!r}; it must be {what}.") from None


@functools.lru_cache
def _source(module: str) -> ast.Module:
    package, *path = module.split(".")
    [root] = importlib.util.find_spec(package).submodule_search_locations
    return ast.parse(Path(root, *path).with_suffix(".py").read_text(encoding="utf-8"))


def _definition(module: str, name: str) -> Any:
    return next((node for node in _source(module).body if getattr(node, "name", None) == name), None)


def _literal(node: ast.AST | None) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return None


@functools.lru_cache
def class_settings(module: str, name: str) -> dict[str, Setting]:
    """The fields of a dataclass and of its bases by name, those of the class itself first."""
    module = next(each for each in (module, *_MODULES) if _definition(each, name))
    settings = {}
    for item in _definition(module, name).body:
        if not isinstance(item, ast.AnnAssign) or item.target.id.startswith("_"):
            continue
        annotation = ast.unparse(item.annotation)
        if annotation.startswith(("ClassVar", "InitVar")):
            continue
        said = {"default": _literal(item.value)}
        if isinstance(item.value, ast.Call):  # of `setting`, `field` or `HfArg`
            said = dict(zip(("help", "default"), map(_literal, item.value.args)))
            for keyword in item.value.keywords:
                said[keyword.arg] = _literal(keyword.value)
                if isinstance(keyword.value, ast.Dict):  # metadata
                    said |= {
                        key.value: _literal(value) for key, value in zip(keyword.value.keys, keyword.value.values)
                    }
        required = not {"default", "default_factory"} & said.keys()
        said = {key: said[key] for key in ("default", "help", "choices", "aliases") if said.get(key)}
        settings[item.target.id] = Setting(item.target.id, annotation, required, module.startswith("hf_sugar"), **said)
    nothing = next(
        (_literal(n.value) for n in _source(module).body if ast.unparse(n).startswith("_WITHOUT_EFFECT")), ()
    )
    for base in map(ast.unparse, _definition(module, name).bases):
        inherited = class_settings(module, base)
        settings |= {key: each for key, each in inherited.items() if key not in settings and key not in nothing}
    return settings


def description(command: str) -> str:
    """What a command does."""
    return ast.get_docstring(_source(f"hf_sugar.cli.{command}"))


def command_settings(command: str) -> dict[str, dict[str, Setting]]:
    """The settings of a command by the names of the dataclasses that its function takes, in its order."""
    module = f"hf_sugar.cli.{command}"
    types = [ast.unparse(argument.annotation) for argument in _definition(module, command).args.args]
    return {name: class_settings(module, name) for name in (each.removesuffix(" | None") for each in types)}


def parse(command: str, positional: tuple[str, ...], argv: list[str]) -> list[Any]:
    """An instance of each dataclass that a command's function takes, from its arguments and, with `--config FILE`, from
    YAML, where arguments win. Settings in `positional` may be given without their flags: the first is required, and a
    list takes all that is left. Raises a `UsageError` that names the setting."""
    groups = command_settings(command)
    settings = {key: each for group in groups.values() for key, each in group.items()}
    argv = _spelled_out(argv, {f"--{key}" for key, each in settings.items() if each.kind == "bool"})
    everything = "--help_all" in argv
    usage = "".join(f" [{key.upper()}{' ...' if settings[key].takes_list else ''}]" for key in positional)
    parser = _parser(command, usage, groups, everything)
    given, rest = parser.parse_known_args(["--help"] if everything else argv)
    values = vars(given)
    for word in rest:
        if word.startswith("-"):
            raise UsageError(f"`{word}`: {_no_such(word.lstrip('-').split('=')[0], settings, command)}")
    for key in positional:
        if rest and key not in values:
            values[key], rest = (rest, []) if settings[key].takes_list else (rest[0], rest[1:])
    if rest:
        raise UsageError(f"{rest[0]!r}: what is it? Give it with its flag; `hf-sugar {command} --help` lists them.")
    file = values.pop("config", None)
    values = {key: settings[key].convert(value) for key, value in values.items()}
    if file is not None:
        values = _read_yaml(file, settings, command) | values
    for key, each in settings.items():
        if values.get(key) is None and (each.required or key in positional[:1]):
            raise UsageError(f"`{key}` is not set: {each.help}")
    module = importlib.import_module(f"hf_sugar.cli.{command}")
    return [
        getattr(module, name)(**{key: values[key] for key in group if key in values}) for name, group in groups.items()
    ]


def _spelled_out(argv: list[str], booleans: set[str]) -> list[str]:
    """Arguments with underscores in flags, and a value in each flag of `booleans`, which takes no other from what follows."""
    words: list[str] = []
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            word = f"--{flag[2:].replace('-', '_')}{equals}{value}"
        if words and words[-1] in booleans and word.lower() in _BOOLEANS:
            words[-1] += f"={word}"
        else:
            words.append(word)
    return [f"{word}=true" if word in booleans else word for word in words]


class Parser(argparse.ArgumentParser):
    """Raises its errors."""

    def error(self, message: str):
        raise UsageError(f"{message} (`{self.prog} --help` lists them)")


def _parser(command: str, usage: str, groups: dict[str, dict[str, Setting]], everything: bool) -> Parser:
    parser = Parser(
        f"hf-sugar {command}",
        usage=f"hf-sugar {command}{usage} [--SETTING VALUE ...] [--config FILE]",
        description=description(command),
        epilog="Headings are classes. --help-all lists the settings of TRL and transformers too, --debug shows tracebacks.",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=36, width=119),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="Read settings from YAML; arguments override them.")
    for name, settings in groups.items():
        group = parser.add_argument_group(name)
        for each in settings.values():
            # of what is not ours the first sentence is enough
            text = each.help if each.ours or everything else each.help.split(". ")[0]
            text += f" [{each.default}]" if each.default else ""
            group.add_argument(
                f"--{each.name}",
                *each.aliases,
                nargs="+" if each.takes_list else None,
                metavar=f"{{{','.join(each.choices)}}}" if each.choices else each.kind.upper(),
                help=text if each.ours or everything or each.name in _COMMON else argparse.SUPPRESS,
            )
            if each.kind == "bool":
                no = {"dest": each.name, "action": "store_const", "const": "false", "help": argparse.SUPPRESS}
                group.add_argument(f"--no_{each.name}", **no)
    return parser


def _read_yaml(file: str, settings: dict[str, Setting], command: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"`--config {file}` cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"`--config {file}` must hold settings, as `name: value`, a line each.")
    if not isinstance(env := values.pop("env", None) or {}, dict):
        raise UsageError(f"`env` of `--config {file}` is {env!r}; it must be a mapping, as {{NAME: value}}.")
    os.environ.update({key: str(value) for key, value in env.items()})
    if command == "prepare":  # the file of a training will do
        others = {key for group in command_settings("train").values() for key in group}
        values = {key: value for key, value in values.items() if key in settings or key not in others}
    for key in values.keys() - settings.keys():
        raise UsageError(f"{file}, `{key}`: {_no_such(str(key), settings, command)}")
    return {key: settings[key].convert(value, f"{file}, ") for key, value in values.items()}


def _no_such(key: str, settings: dict[str, Setting], command: str) -> str:
    similar = difflib.get_close_matches(key, settings, n=1)
    hint = f"Did you mean `{similar[0]}`?" if similar else f"`hf-sugar {command} --help` lists them."
    return f"there is no such setting. {hint}"
