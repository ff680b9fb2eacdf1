import argparse
import importlib
import sys

from hf_sugar import __version__


# A command's module is imported when the command runs, so that `hf-sugar --help` answers at once.
COMMANDS = {
    "demo": "train on the embedded world (or on your own data) with and without the structure loss, compare, report",
    "check": "read a dataset and say what training would meet",
    "prepare": "compute the teacher embeddings of a dataset, once",
    "train": "train Sugar on a LLaVA checkpoint",
    "embed": "embeddings of a dataset or of files, into a safetensors file",
    "index": "build a search index of a dataset or of files, go on with one, or add to one",
    "search": "search an index by text, image or both",
    "chat": "talk with a model, with or without an index",
    "app": "search and ask in the browser",
    "evaluate": "retrieval and generation metrics of a checkpoint",
    "export": "write a checkpoint for sentence-transformers, or the plain backbone",
    "push": "publish a checkpoint or an adapter on the Hub, with a model card",
}


def main(argv: list[str] | None = None) -> int | None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="hf-sugar",
        description="One multimodal LLM that answers and retrieves.",
        epilog="`hf-sugar COMMAND --help` lists the settings of a command; all of them can also be read from a YAML "
        "file: `hf-sugar COMMAND --config FILE`.",
    )
    parser.add_argument("--version", action="version", version=f"hf-sugar {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    command = parser.parse_args(argv[:1]).command
    return importlib.import_module(f"hf_sugar.cli.{command}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
