import argparse
import importlib
import logging
import sys
import traceback
from dataclasses import replace

from hf_sugar import __version__

from .arguments import Command, parse


_DATA, _MODEL = "hf_sugar.cli.arguments:DataArguments", "hf_sugar.cli.embed:ModelArguments"
_EVALUATION = "hf_sugar.evaluation.tasks:EvaluationData"
_TRAINING = {
    "Data": "hf_sugar.cli.arguments:StreamedDataArguments",
    "Training": "hf_sugar.training.config:SugarTrainingConfig",
    "Model, LoRA and quantization": "hf_sugar.cli.train:ModelArguments",
    "Evaluation": _EVALUATION,
    "Action": "hf_sugar.cli.train:ActionArguments",
}

# A command's module is imported once its settings are known to be right.
COMMANDS = {
    "demo": Command(
        "train on the embedded world (or on your own data) with and without the structure loss, compare, report",
        {"Settings": "hf_sugar.cli.demo:DemoArguments", "Data": _DATA, "Evaluation": _EVALUATION},
    ),
    "check": Command(
        "read a dataset and say what training would meet",
        {"Data": _DATA, "Settings": "hf_sugar.cli.check:CheckArguments"},
        positional=("train_data",),
    ),
    "prepare": Command(
        "compute the teacher embeddings of a dataset, once",
        {"Data": "hf_sugar.cli.arguments:StreamedDataArguments", "Settings": "hf_sugar.cli.prepare:PrepareArguments"},
        positional=("train_data",),
        passes_over=tuple(_TRAINING.values()),
    ),
    "train": Command(
        "train Sugar on a LLaVA checkpoint: supervised fine-tuning with the structure loss",
        _TRAINING,
        positional=("model_name_or_path", "train_data"),
    ),
    "embed": Command(
        "embeddings of a dataset or of files, into a safetensors file",
        {
            "Model": _MODEL,
            "What is embedded": "hf_sugar.cli.embed:CorpusArguments",
            "Settings": "hf_sugar.cli.embed:EmbedArguments",
        },
        positional=("model_name_or_path", "data"),
    ),
    "index": Command(
        "build a search index of a dataset or of files, go on with one that was interrupted, or add to one",
        {
            "Model": _MODEL,
            "What is embedded": "hf_sugar.cli.embed:CorpusArguments",
            "Settings": "hf_sugar.cli.index:IndexArguments",
        },
        positional=("model_name_or_path", "data"),
    ),
    "search": Command(
        "search an index by text, image or both",
        {"Model": _MODEL, "Settings": "hf_sugar.cli.search:SearchArguments"},
        positional=("model_name_or_path", "query"),
    ),
    "mine": Command(
        "hard negatives for a dataset: what a model finds in an index and its teachers call something else",
        {"Model": _MODEL, "Settings": "hf_sugar.cli.mine:MineArguments"},
        positional=("model_name_or_path", "data"),
    ),
    "chat": Command(
        "talk with a model, with or without an index",
        {"Model": _MODEL, "Settings": "hf_sugar.cli.chat:ChatArguments"},
        positional=("model_name_or_path",),
    ),
    "app": Command(
        "search and ask in the browser",
        {"Model": _MODEL, "Settings": "hf_sugar.cli.app:AppArguments"},
        positional=("model_name_or_path",),
    ),
    "evaluate": Command(
        "retrieval and generation metrics of a checkpoint",
        {"Settings": "hf_sugar.cli.evaluate:EvaluateArguments", "Evaluation": _EVALUATION},
        positional=("model_name_or_path",),
    ),
    "export": Command(
        "write a checkpoint for sentence-transformers, or the plain backbone",
        {"Settings": "hf_sugar.cli.export:ExportArguments"},
        positional=("model_name_or_path",),
    ),
    "push": Command(
        "publish a checkpoint or an adapter on the Hub, with a model card",
        {"Settings": "hf_sugar.cli.push:PushArguments"},
        positional=("checkpoint_dir",),
    ),
}


def main(argv: list[str]) -> int | None:
    """
    Run one command; errors are raised.

    Args:
        argv (`list[str]`):
            The command and its arguments.
    """
    parser = argparse.ArgumentParser(
        prog="hf-sugar",
        description="One multimodal LLM that answers and retrieves.",
        epilog="`hf-sugar COMMAND --help` lists the settings of a command; all of them can also be read from a YAML "
        "file: `hf-sugar COMMAND --config FILE`.",
    )
    parser.add_argument("--version", action="version", version=f"hf-sugar {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.description, add_help=False)
    name = parser.parse_args(argv[:1]).command
    command = COMMANDS[name]
    if name == "train" and {"--estimate-memory", "--estimate_memory"} & set(argv):
        command = replace(
            command, settings=command.settings | {"Training": "hf_sugar.cli.train:EstimatedTrainingConfig"}
        )
    settings = parse(name, command, argv[1:])
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("hf_sugar").setLevel(logging.INFO)
    return importlib.import_module(f"hf_sugar.cli.{name}").main(*settings)


def console() -> int | None:
    """`hf-sugar` in the terminal: a mistake is one line and exit status 2; `--debug` shows where it was raised."""
    argv = sys.argv[1:]
    # with a value it is a setting of transformers
    debug = any(a == "--debug" and (b is None or b.startswith("-")) for a, b in zip(argv, [*argv[1:], None]))
    if debug:
        argv.remove("--debug")
    try:
        return main(argv)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        expected = isinstance(error, ValueError | TypeError | OSError | ImportError | NotImplementedError)
        message = str(error) if expected and str(error) else f"{type(error).__name__}: {error} (--debug shows where)"
        print(f"error: {message}", file=sys.stderr)
        return 2 if expected else 1


if __name__ == "__main__":
    sys.exit(console())
