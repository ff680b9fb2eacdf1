"""Build a search index of a dataset or of files, go on with one that was interrupted, or add to one."""

from dataclasses import dataclass, fields
from pathlib import Path

from hf_sugar.distributed import distributed_state
from hf_sugar.retrieval import SugarIndex

from .arguments import setting
from .checkpoint import ModelArguments
from .embed import CorpusArguments


@dataclass
class IndexArguments:
    index: str = setting("Directory of the index.", "index")
    merge: list[str] | None = setting("Directories of indexes, of which this one is made; nothing is embedded.", None)
    add: bool = setting("Add to the index that is there, by its settings; by default it is replaced.", False)
    factory: str | None = setting(
        "FAISS factory string: Flat (exact, the default), SQ8 (8 bits a dimension), RaBitQ (1), HNSW32, ... With `merge`, "
        "what is left out of this and the next two is that of the first index.",
        None,
    )
    search_options: str | None = setting("FAISS search parameters: nprobe=16, efSearch=64, ...", None)
    rescore_multiplier: int | None = setting(
        "Candidates of each hit that are compared exactly, by default 4; 0 for FAISS alone.", None
    )
    shard_size: int = setting("Documents embedded and written at a time.", 1024)


def index(model: ModelArguments, corpus: CorpusArguments, args: IndexArguments) -> SugarIndex:
    """Build an index, go on with one that was interrupted (the same call), add to one, or put several together."""
    names = ("factory", "search_options", "rescore_multiplier")
    settings = {name: vars(args)[name] for name in names if vars(args)[name] is not None}
    given = [f.name for f in fields(corpus) if getattr(corpus, f.name) != f.default]
    if args.merge:
        idle = ("batch_size", "max_batch_tokens", "truncate_dim", "add", "shard_size")
        both = [(each, f) for each in (model, args) for f in fields(each)]
        given += [f.name for each, f in both if f.name in idle and getattr(each, f.name) != f.default]
        if given:
            raise ValueError(f"With `merge` nothing is embedded: leave out {', '.join(given)}.")
        found = SugarIndex.merge(args.merge, args.index, **settings)
        print(f"{len(found)} documents -> {args.index}")
        return found
    items = corpus.items()
    how = {"shard_size": args.shard_size, "on_bad_row": corpus.on_bad_row, "progress": True}
    settings |= {name: vars(corpus)[name] for name in ("by", "every_slice") if name in given}
    if args.add:
        found = model.load_index(args.index)
        for name, value in settings.items():
            if value != getattr(found, name):
                raise ValueError(
                    f"`{name}` is {value!r}, but the index in {args.index} was built with {getattr(found, name)!r}. Leave it out."
                )
        found.add(items, **how)
        found.save(args.index)
    else:
        found = SugarIndex.build(items, model.embedder(), **settings, **how, directory=Path(args.index))
    if distributed_state().is_main_process:  # the others need no FAISS index
        print(f"{len(found)} documents -> {args.index}")
        searched, exact, recall = found.measure().values()
        sizes = f"{searched / 1e6:,.2f} MB are searched (embeddings: {exact / 1e6:,.2f} MB)"
        print(f"{found.dim} dimensions; {sizes}; recall@10 against exact search, of a sample: {recall:.1f}%")
    return found
