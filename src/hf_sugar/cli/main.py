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
    "evaluate": "retrieval and generation metrics of a checkpoint",
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
