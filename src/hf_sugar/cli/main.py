import importlib
import logging
import sys
import traceback

from hf_sugar import __version__

from .parsing import Parser, description, parse


# The commands, each a module beside this one, with the settings that may be given without their flags.
COMMANDS = {
    "demo": (),
    "check": ("train_data",),
    "prepare": ("train_data",),
    "train": ("model_name_or_path", "train_data"),
    "embed": ("model_name_or_path", "data"),
    "index": ("model_name_or_path", "data"),
    "search": ("model_name_or_path", "query"),
    "mine": ("model_name_or_path", "data"),
    "chat": ("model_name_or_path",),
    "serve": ("model_name_or_path",),
    "app": ("model_name_or_path",),
    "evaluate": ("model_name_or_path",),
    "export": ("model_name_or_path",),
    "push": ("checkpoint_dir",),
}


def main(argv: list[str]) -> int | None:
    """Run one command, `argv[0]`, with its arguments; errors are raised."""
    parser = Parser(
        "hf-sugar",
        description="One multimodal LLM that answers and retrieves.",
        epilog="`hf-sugar COMMAND --help` lists settings, which can also be read from YAML: `hf-sugar COMMAND --config FILE`.",
    )
    parser.add_argument("--version", action="version", version=f"hf-sugar {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        commands.add_parser(name, help=description(name), add_help=False)
    name = parser.parse_args(argv[:1]).command
    settings = parse(name, COMMANDS[name], argv[1:])
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("hf_sugar").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # the error says it again
    result = getattr(importlib.import_module(f"hf_sugar.cli.{name}"), name)(*settings)
    return result if name == "check" else None


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
        # of the Hub's client, httpx or httpx2
        if "TransportError" in [kind.__name__ for kind in type(error).__mro__]:
            expected, error = True, ConnectionError(f"The Hub cannot be reached: {error}")
        message = str(error) if expected and str(error) else f"{type(error).__name__}: {error} (--debug shows where)"
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return 2 if expected else 1


if __name__ == "__main__":
    sys.exit(console())
