"""Talk with a model, with or without an index."""

import sys
from dataclasses import dataclass

from hf_sugar.data import load_image
from hf_sugar.distributed import distributed_state
from hf_sugar.retrieval import SugarRAG

from .arguments import setting
from .checkpoint import ModelArguments
from .search import name_of, text_of, text_or_file


HELP = "/image FILE adds an image to the next question, /clear begins anew, /quit ends."


@dataclass
class ChatArguments:
    index: str | None = setting("Index whose answered questions are put before each question.", None)
    k: int = setting("Examples for each question.", 1)
    rerank: int | None = setting(
        "Hits that the model looks at again to choose the examples; for questions with a picture it needs a `rerank_prompt`.",
        None,
    )
    max_new_tokens: int = setting("Longest answer.", 256)


def chat(model: ModelArguments, args: ChatArguments) -> None:
    """Answer the lines of the standard input on the standard output; all else goes to the standard error."""
    if args.index is None and args.rerank is not None:
        raise ValueError("`rerank` needs an `index` to choose examples from: leave it out, or set one.")
    index = None if args.index is None else model.load_index(args.index, args.k)
    loaded = model.load(distributed_state().device) if index is None else (index.embed.model, index.embed.processor)
    rag = SugarRAG(*loaded, index, args.k, args.max_new_tokens, rerank=args.rerank)
    if sys.stdin.isatty():
        print(HELP, file=sys.stderr)
    messages, images, waiting = [], [], []
    for line in map(str.strip, sys.stdin):
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
