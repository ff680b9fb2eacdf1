"""What several commands share: how their settings are read, and which data they take. Nothing here imports torch, so
that `--help` and a mistyped flag are answered at once."""

import argparse
import ast
import difflib
import importlib
import importlib.util
import itertools
import os
import re
import textwrap
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml


# Where base classes of settings are defined. Their files are read, not imported.
MODULES = {
    "SFTConfig": "trl.trainer.sft_config",
    "_BaseConfig": "trl.trainer.base_config",
    "TrainingArguments": "transformers.training_args",
    "ModelConfig": "trl.trainer.model_config",
    "SugarTrainingConfig": "hf_sugar.training.config",
}
# Settings of TRL and transformers that most runs set, so that `--help` lists them with ours.
COMMON = (
    "model_name_or_path",
    "model_revision",
    "dtype",
    "attn_implementation",
    "use_peft",
    "lora_dropout",
    "lora_target_modules",
    "use_dora",
    "load_in_4bit",
    "load_in_8bit",
    "output_dir",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "bf16",
    "use_cpu",
    "seed",
    "logging_steps",
    "eval_strategy",
    "save_steps",
    "resume_from_checkpoint",
    "report_to",
    "push_to_hub",
    "hub_model_id",
)


@dataclass
class DataArguments:
    """Data to train on."""

    train_data: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to train on: paths or Hub ids, or in YAML mappings with path, format, image_root, weight."
        },
    )
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "What to evaluate the losses on during training."}
    )
    image_root: str | None = field(
        default=None, metadata={"help": "Folder that image paths are relative to, instead of that of each file."}
    )
    on_bad_row: str = field(
        default="error",
        metadata={"help": "What to do with a malformed row: 'error' or 'skip'.", "choices": ["error", "skip"]},
    )


@dataclass
class StreamedDataArguments(DataArguments):
    """[`DataArguments`], of which the training data may be streamed."""

    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training data while they are used instead of loading them first."},
    )


@dataclass(frozen=True)
class Command:
    """
    A command of `hf-sugar`.

    Args:
        description (`str`):
            What it does.
        settings (`dict[str, str]`):
            Dataclasses of its settings as `"module:Class"`, by the heading that `--help` gives them. The command's `main`
            is called with one instance of each.
        positional (`tuple[str, ...]`, *optional*):
            Settings that may be given first, without their flags. One that is a list takes all that is left.
        passes_over (`tuple[str, ...]`, *optional*):
            Dataclasses of another command, whose YAML file will do as well: settings of that command alone are passed over.
    """

    description: str
    settings: dict[str, str]
    positional: tuple[str, ...] = ()
    passes_over: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """A field of a dataclass as its source says it."""

    name: str
    type: str
    default: Any
    help: str
    choices: tuple[str, ...] | None
    aliases: tuple[str, ...]
    ours: bool  # not of TRL or transformers

    @property
    def listed(self) -> bool:
        """Whether `--help` lists it, not `--help-all` alone."""
        return self.ours or self.name in COMMON

    @property
    def takes_list(self) -> bool:
        return "list[" in self.type

    @property
    def flags(self) -> list[str]:
        return list(dict.fromkeys([f"--{self.name}", f"--{self.name.replace('_', '-')}", *self.aliases]))

    def convert(self, value: str) -> Any:
        """The value that a text stands for."""
        if self.takes_list and value.startswith("{"):  # a source of data with more than its path
            try:
                return yaml.safe_load(value)
            except yaml.YAMLError:
                raise ValueError(f"must be a mapping as {{path: data.json, weight: 1}}, got {value!r}") from None
        names = set(re.split(r"[\s|\[\],]+", self.type)) - {"None", "list", ""}
        if "dict" in names:
            try:
                mapping = yaml.safe_load(value)
            except yaml.YAMLError:
                mapping = None
            if not isinstance(mapping, dict) and "str" not in names - {"dict"}:
                raise ValueError(f"must be a mapping in YAML or JSON, as {{name: value}}, got {value!r}")
            return mapping if isinstance(mapping, dict) else value
        if names == {"bool"}:
            if value.lower() not in ("true", "false", "1", "0", "yes", "no"):
                raise ValueError(f"must be true or false, got {value!r}")
            return value.lower() in ("true", "1", "yes")
        if names == {"int"} or names == {"float"}:
            try:
                return (int if names == {"int"} else float)(value)
            except ValueError:
                raise ValueError(
                    f"must be {'an integer' if names == {'int'} else 'a number'}, got {value!r}"
                ) from None
        if self.choices and value not in self.choices:
            raise ValueError(f"must be one of {', '.join(map(str, self.choices))}, got {value!r}")
        return value


@lru_cache
def class_settings(reference: str) -> dict[str, Setting]:
    """
    The fields of a dataclass and of its bases, from their source.

    Args:
        reference (`str`):
            `"module:Class"`.

    Returns:
        `dict[str, Setting]`: by name, those of the class itself first.
    """
    module, name = reference.split(":")
    package, *path = module.split(".")
    [root] = importlib.util.find_spec(package).submodule_search_locations
    tree = ast.parse(Path(root, *path).with_suffix(".py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    node = classes[name]
    settings = {}
    hidden = next((_literal(item.value) for item in tree.body if ast.unparse(item).startswith("_WITHOUT_EFFECT")), ())
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or item.target.id.startswith("_"):
            continue
        annotation = ast.unparse(item.annotation)
        if annotation.startswith(("ClassVar", "InitVar")):
            continue
        arguments = {k.arg: k.value for k in item.value.keywords} if isinstance(item.value, ast.Call) else {}
        metadata = {}
        if isinstance(arguments.get("metadata"), ast.Dict):
            metadata = {k.value: _literal(v) for k, v in zip(arguments["metadata"].keys, arguments["metadata"].values)}
        default = arguments.get("default") if isinstance(item.value, ast.Call) else item.value
        settings[item.target.id] = Setting(
            item.target.id,
            annotation,
            _literal(default),
            " ".join((metadata.get("help") or _literal(arguments.get("help")) or "").replace("%%", "%").split()),
            tuple(metadata["choices"]) if metadata.get("choices") else None,
            tuple(metadata.get("aliases") or _literal(arguments.get("aliases")) or ()),
            package == "hf_sugar",
        )
    for base in map(ast.unparse, node.bases):
        inherited = class_settings(f"{module if base in classes else MODULES[base]}:{base}")
        settings |= {key: value for key, value in inherited.items() if key not in settings and key not in hidden}
    return settings


def _literal(node: ast.AST | None) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message} (`{self.prog} --help` lists the settings)")


class UsageError(ValueError):
    """What was typed is not a setting of the command, or not a value of the setting."""


def parse(name: str, command: Command, argv: list[str]) -> list[Any]:
    """
    Settings of a command from its arguments and, with `--config FILE`, from YAML, where arguments win.

    Args:
        name (`str`), command ([`Command`]):
            The command.
        argv (`list[str]`):
            What follows its name.

    Returns:
        `list`: an instance of each of the command's dataclasses.

    Raises:
        `UsageError`: naming the setting, with the most similar one where there is none of that name.
    """
    settings = {
        key: value for reference in command.settings.values() for key, value in class_settings(reference).items()
    }
    leading = list(itertools.takewhile(lambda argument: not argument.startswith("-"), argv))
    argv = argv[len(leading) :]
    for key in command.positional:
        count = len(leading) if settings[key].takes_list else min(1, len(leading))
        argv = ([f"--{key}", *leading[:count]] if count else []) + argv
        leading = leading[count:]
    if leading:
        raise UsageError(f"{leading[0]!r}: what is it? Give it with its flag; `hf-sugar {name} --help` lists them.")
    parser = _Parser(f"hf-sugar {name}", add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--help-all", "--help_all", action="store_true")
    parser.add_argument("--config")
    for setting in settings.values():
        if {part.strip() for part in setting.type.split("|")} <= {"bool", "None"}:
            parser.add_argument(*setting.flags, dest=setting.name, nargs="?", const="true")
            parser.add_argument(
                *(flag.replace("--", "--no_", 1) for flag in setting.flags[:1]),
                dest=setting.name,
                action="store_const",
                const="false",
            )
        else:
            nargs = "+" if setting.takes_list else None
            parser.add_argument(*setting.flags, dest=setting.name, nargs=nargs)
    given, unknown = parser.parse_known_args(argv)
    values = vars(given)
    if "help" in values or "help_all" in values:
        print(help_text(name, command, everything="help_all" in values))
        raise SystemExit(0)
    if unknown:
        raise UsageError(f"`{unknown[0]}`: {_no_such(unknown[0].lstrip('-').split('=')[0], settings, name)}")
    config = values.pop("config", None)
    values = {key: _converted(settings[key], value, f"--{key}") for key, value in values.items()}
    if config is not None:
        others = {key for reference in command.passes_over for key in class_settings(reference)}
        values = _read_yaml(config, settings, name, others) | values
    result = []
    for reference in command.settings.values():
        module, class_name = reference.split(":")
        cls = getattr(importlib.import_module(module), class_name)
        result.append(cls(**{key: values[key] for key in class_settings(reference) if key in values}))
    return result


def _read_yaml(file: str, settings: dict[str, Setting], name: str, others: set[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"`--config {file}` cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"`--config {file}` is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"`--config {file}` must hold settings, as `name: value`, a line each.")
    os.environ.update({key: str(value) for key, value in (values.pop("env", None) or {}).items()})
    for key in list(values):
        if key not in settings:
            if key not in others:
                raise UsageError(f"{file}, `{key}`: {_no_such(str(key), settings, name)}")
            del values[key]
    return {key: _converted(settings[key], value, f"{file}, `{key}`") for key, value in values.items()}


def _converted(setting: Setting, value: Any, where: str) -> Any:
    try:
        if isinstance(value, list) and setting.takes_list:
            return [setting.convert(item) if isinstance(item, str) else item for item in value]
        return setting.convert(value) if isinstance(value, str) else value
    except ValueError as error:
        raise UsageError(f"{where}: {error}.") from None


def _no_such(key: str, settings: dict[str, Setting], command: str) -> str:
    similar = difflib.get_close_matches(key.replace("-", "_"), settings, n=1, cutoff=0.6)
    hint = f" Did you mean `{similar[0]}`?" if similar else f" `hf-sugar {command} --help` lists them."
    return f"there is no such setting.{hint}"


def help_text(name: str, command: Command, everything: bool = False) -> str:
    """What `hf-sugar NAME --help` prints; settings of TRL and transformers only with `everything`."""
    settings = {
        key: value for reference in command.settings.values() for key, value in class_settings(reference).items()
    }
    first = "".join(f" [{key.upper()}{' ...' if settings[key].takes_list else ''}]" for key in command.positional)
    lines = [f"usage: hf-sugar {name}{first} [--SETTING VALUE ...] [--config FILE]", "", f"{command.description}"]
    hidden = 0
    for title, reference in command.settings.items():
        lines += ["", f"{title}:"]
        for setting in class_settings(reference).values():
            if not (setting.listed or everything):
                hidden += 1
                continue
            default = "" if setting.default in (None, False, "") else f" [{setting.default}]"
            choices = f" {{{','.join(map(str, setting.choices))}}}" if setting.choices else ""
            label = f"  --{setting.name}{choices}"
            # of what is not ours the first sentence is enough
            said = setting.help if setting.ours or everything else setting.help.split(". ")[0]
            text = textwrap.wrap(f"{said}{default}", 118 - 30) or [""]
            if len(label) < 29:
                text[0] = f"{label:30}{text[0]}"
            else:
                lines.append(label)
                text[0] = " " * 30 + text[0]
            lines += [text[0], *(" " * 30 + line for line in text[1:])]
    lines += ["", "--config FILE reads any of these from YAML; arguments override it. --debug shows tracebacks."]
    if hidden:
        lines.append(f"--help-all also lists {hidden} settings of TRL and transformers, all of which can be given.")
    return "\n".join(lines)
