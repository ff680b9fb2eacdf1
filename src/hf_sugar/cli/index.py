from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from .embed import CorpusArguments, ModelArguments


if TYPE_CHECKING:
    from hf_sugar.retrieval import SugarIndex


@dataclass
class IndexArguments:
    """Settings of `hf-sugar index`."""

    index: str = field(default="index", metadata={"help": "Directory of the index."})
    add: bool = field(default=False, metadata={"help": "Add to the index that is there; by default it is replaced."})
    factory: str = field(
        default="Flat", metadata={"help": "FAISS factory string: Flat (exact), HNSW32, 'IVF1024,PQ32', ..."}
    )
    search_options: str | None = field(
        default=None, metadata={"help": "FAISS search parameters: nprobe=16, efSearch=64, ..."}
    )
    shard_size: int = field(default=1024, metadata={"help": "Documents embedded and written at a time."})


def index(model: ModelArguments, corpus: CorpusArguments, args: IndexArguments) -> "SugarIndex":
    """
    Build an index, go on with one that was interrupted (the same call), or add to one.

    Args:
        model ([`ModelArguments`]), corpus ([`CorpusArguments`]), args ([`IndexArguments`]):
            Settings. What is added is indexed by the settings of the index.

    Returns:
        [`SugarIndex`]

    Raises:
        `ValueError`: as in [`SugarIndex.build`], or if a setting is not that of the index that is added to.
    """
    from hf_sugar.retrieval import SugarIndex

    items = corpus.items()
    how = {"shard_size": args.shard_size, "on_bad_row": corpus.on_bad_row, "progress": True}
    settings = {
        "by": corpus.by,
        "every_slice": corpus.every_slice,
        "factory": args.factory,
        "search_options": args.search_options,
    }
    if not args.add:
        return SugarIndex.build(items, model.load(), **settings, **how, directory=Path(args.index))
    found = SugarIndex.load(args.index, embed=model.load())
    defaults = {f.name: f.default for f in (*fields(corpus), *fields(args))}
    for name, value in settings.items():
        if value not in (defaults[name], getattr(found, name)):
            raise ValueError(
                f"`{name}` is {value!r}, but the index in {args.index} was built with {getattr(found, name)!r}. Leave it "
                "out, or build the index anew without `add`."
            )
    found.add(items, **how)
    found.save(args.index)
    return found


def main(model: ModelArguments, corpus: CorpusArguments, args: IndexArguments) -> None:
    print(f"{len(index(model, corpus, args))} documents -> {args.index}")
