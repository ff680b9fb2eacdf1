import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .embed import ModelArguments
from .search import name_of, text_of, text_or_file


if TYPE_CHECKING:
    from hf_sugar.retrieval import SugarRAG


HELP = "/image FILE adds an image to the next question, /clear begins anew, /quit ends."


@dataclass
class ChatArguments:
    """Settings of `hf-sugar chat`."""

    index: str | None = field(
        default=None, metadata={"help": "Index whose answered questions are put before each question."}
    )
    k: int = field(default=1, metadata={"help": "Examples for each question."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer."})


def chat(rag: "SugarRAG", lines: Iterable[str]) -> None:
    """
    Talk with a model in the terminal. Answers go to the standard output, all else to the standard error.

    Args:
        rag ([`SugarRAG`]):
            What answers.
        lines (`Iterable[str]`):
            What the user types.
    """
    from hf_sugar.data import load_image

    messages, images, waiting = [], [], []
    for line in map(str.strip, lines):
        if line == "/quit":
            break
        if line == "/clear":
            messages, images, waiting = [], [], []
        elif line.startswith("/image "):
            try:
                waiting.append(load_image(text_or_file(line.removeprefix("/image ").strip()), "/image"))
            except (FileNotFoundError, ValueError) as error:
                print(error, file=sys.stderr)
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line:
            content = [{"type": "image", "text": None} for _ in waiting] + [{"type": "text", "text": line}]
            asked = [*messages, {"role": "user", "content": content}]
            try:
                prompt = rag.prompt({"messages": asked, "images": [*images, *waiting]})
            except ValueError as error:
                print(error, file=sys.stderr)
                continue
            answer = ""
            for piece in rag.stream(prompt):
                print(piece, end="", flush=True)
                answer += piece
            print()
            for number, hit in enumerate(prompt.citations, 1):
                text = text_of(rag.index.documents[hit.index])
                print(f"[{number}] {hit.score:.4f} {name_of(hit)}  {text[:160]}", file=sys.stderr)
            if prompt.note:
                print(prompt.note, file=sys.stderr)
            images, waiting = [*images, *waiting], []
            # an empty turn cannot be rendered again
            reply = {"role": "assistant", "content": [{"type": "text", "text": answer.strip() or "..."}]}
            messages = [*asked, reply]


def main(model: ModelArguments, args: ChatArguments) -> None:
    from hf_sugar.retrieval import SugarIndex, SugarRAG

    embed = model.load()
    index = None if args.index is None else SugarIndex.load(args.index, embed=embed)
    if sys.stdin.isatty():
        print(HELP, file=sys.stderr)
    chat(SugarRAG(embed.model, embed.processor, index, args.k, args.max_new_tokens), sys.stdin)
