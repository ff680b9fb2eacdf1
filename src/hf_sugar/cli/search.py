import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .embed import ModelArguments


if TYPE_CHECKING:
    from hf_sugar.retrieval import Hit, SugarIndex


@dataclass
class SearchArguments:
    """Settings of `hf-sugar search`."""

    query: list[str] | None = field(
        default=None, metadata={"help": "Texts and image files; together they are one query, in this order."}
    )
    index: str = field(default="index", metadata={"help": "Directory of the index."})
    k: int = field(default=5, metadata={"help": "Hits to show."})
    memory_map: bool = field(default=False, metadata={"help": "Leave the embeddings on the disk."})
    json: bool = field(default=False, metadata={"help": "Print one JSON object a line."})


def text_or_file(part: str) -> str | Path:
    """A `Path` for what ends like an image file, else the text."""
    from hf_sugar.models.rows_sugar import IMAGE_SUFFIXES

    if not part.lower().endswith(IMAGE_SUFFIXES):
        return part
    if not Path(part).is_file():
        raise FileNotFoundError(f"The image file {part!r} does not exist.")
    return Path(part)


def text_of(row: dict[str, Any]) -> str:
    """What a row says, in one line."""
    contents = [message["content"] for message in row["messages"]]
    return " | ".join(
        content if isinstance(content, str) else " ".join(part.get("text") or "[image]" for part in content)
        for content in contents
    ).replace("\n", " ")


def name_of(hit: "Hit") -> str:
    """What a hit is called: the id or the path of its document, else its number."""
    return next((str(hit.metadata[key]) for key in ("id", "path") if key in hit.metadata), f"#{hit.index}")


def search(model: ModelArguments, args: SearchArguments) -> "tuple[SugarIndex, list[Hit]]":
    """
    Search an index.

    Args:
        model ([`ModelArguments`]), args ([`SearchArguments`]):
            Settings.

    Returns:
        `tuple[SugarIndex, list[Hit]]`: the index and the hits, best first.
    """
    if not args.query:
        raise ValueError("`query` is not set: give a text, an image file, or several of them.")
    from hf_sugar.retrieval import SugarIndex

    query = [text_or_file(part) for part in args.query]
    index = SugarIndex.load(args.index, embed=model.load(), memory_map=args.memory_map)
    return index, index.search([query], args.k)[0]


def main(model: ModelArguments, args: SearchArguments) -> None:
    index, hits = search(model, args)
    for rank, hit in enumerate(hits, 1):
        text = text_of(index.documents[hit.index])
        if args.json:
            print(json.dumps({"rank": rank, **vars(hit), "text": text}, ensure_ascii=False))
        else:
            where = "" if hit.slice is None else f" up to slice {hit.slice}"
            print(f"{rank:3}  {hit.score:.4f}  {name_of(hit)}{where}  {text[:160]}")
