"""Search an index by text, image or both."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_sugar.models.rows_sugar import IMAGE_SUFFIXES
from hf_sugar.retrieval import Hit

from .arguments import setting
from .checkpoint import ModelArguments


@dataclass
class SearchArguments:
    query: list[str] = setting("Texts and image files; together they are one query, in this order.")
    index: str = setting("Directory of the index.", "index")
    k: int = setting("Hits to show.", 5)
    rerank: int | None = setting("First hits that the model looks at again, of which `k` are shown.", None)
    late: bool = setting("Compare every slice with every slice (MaxSim), in an index of every slice.", False)
    memory_map: bool = setting("Leave the embeddings on the disk.", False)
    json: bool = setting("Print one JSON object a line.", False)


def text_or_file(part: str) -> str | Path:
    """A `Path` for what ends like an image file, else the text."""
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


def name_of(hit: Hit) -> str:
    """What a hit is called: the id or the path of its document, else its number."""
    return next((str(hit.metadata[key]) for key in ("id", "path") if key in hit.metadata), f"#{hit.index}")


def search(model: ModelArguments, args: SearchArguments) -> list[Hit]:
    """Print and return what an index has for a query, best first."""
    query = [text_or_file(part) for part in args.query]
    index = model.load_index(args.index, args.k, args.memory_map)
    [hits] = index.search([query], args.k, late=args.late, rerank=args.rerank)
    for rank, hit in enumerate(hits, 1):
        text = text_of(index.documents[hit.index])
        if args.json:
            print(json.dumps({"rank": rank, **vars(hit), "text": text}, ensure_ascii=False))
        else:
            where = "" if hit.slice is None else f" up to slice {hit.slice}"
            print(f"{rank:3}  {hit.score:.4f}  {name_of(hit)}{where}  {text[:160]}")
    return hits
