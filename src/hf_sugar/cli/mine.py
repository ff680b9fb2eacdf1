"""Hard negatives for a dataset: what a model finds in an index and its teachers call something else."""

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from hf_sugar.data import load_data
from hf_sugar.distributed import distributed_state
from hf_sugar.files import replacing
from hf_sugar.retrieval import RERANK_PROMPT, mine_negatives, rerank_rows
from hf_sugar.teachers import TripleEncoder

from .arguments import setting
from .checkpoint import ModelArguments


@dataclass
class MineArguments:
    data: list[str] = setting("Rows to mine for: paths, Hub ids, or mappings as {path: a.json, image_root: b}.")
    output: str = setting("Directory that the dataset is written to.")
    index: str = setting("Directory of the index of candidates.", "index")
    split: str = setting("Split of datasets that have several.", "train")
    on_bad_row: str = setting("What to do with a malformed row.", "error", choices=["error", "skip"])
    overwrite: bool = setting("Replace what is in `output`.", False)
    teachers: dict | str | None = setting("Frozen encoders: {image: ..., text: ..., cross: ...}, or 'tiny'.", None)
    rerank_rows: str | None = setting(
        "Directory for rows that teach reranking, of each right answer and the first negatives.", None
    )
    num_negatives: int = setting("Most negatives of a row.", 4)
    num_candidates: int = setting("Hits that they are chosen from.", 50)
    margin: float = setting(
        "How far from what is right the teachers have to call a negative: 0 is equal, 1 is the mean of such pairs.",
        0.05,
    )


def mine(model: ModelArguments, args: MineArguments) -> Dataset:
    """Add hard negatives to a dataset and write it, to be trained on: see [`~retrieval.mine_negatives`]."""
    outputs = [Path(path) for path in (args.output, args.rerank_rows) if path is not None]
    if len({output.absolute() for output in outputs}) < len(outputs):
        raise ValueError(f"`rerank_rows` is {args.rerank_rows}, and so is `output`. Name another directory.")
    for output in outputs:
        if output.exists() and not args.overwrite:
            raise ValueError(f"{output} is there already. Name another directory, or set `overwrite` to replace it.")
    rows = load_data(args.data, args.split, on_bad_row=args.on_bad_row)
    encoder = TripleEncoder.from_teachers(args.teachers, device=distributed_state().device)
    index = model.load_index(args.index)
    settings = {name: getattr(args, name) for name in ("num_negatives", "num_candidates", "margin")}
    mined = mine_negatives(rows, index, encoder, **settings, progress=True)
    datasets = [(mined, "rows with negatives")]
    if args.rerank_rows is not None:
        prompt = index.embed.model.config.rerank_prompt or RERANK_PROMPT
        datasets.append((rerank_rows(mined, prompt), "rows that teach reranking"))
    for output, (dataset, what) in zip(outputs, datasets, strict=True):
        with replacing(output) as path:
            dataset.save_to_disk(path)
        print(f"{len(dataset)} {what} -> {output}")
    return mined
