from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .embed import ModelArguments


if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class MineArguments:
    """Settings of `hf-sugar mine`."""

    data: list[str] | None = field(
        default=None,
        metadata={"help": "Rows to mine for: paths or Hub ids, or in YAML mappings with path, format, image_root."},
    )
    split: str = field(default="train", metadata={"help": "Split of datasets that have several."})
    on_bad_row: str = field(
        default="error",
        metadata={"help": "What to do with a malformed row: 'error' or 'skip'.", "choices": ["error", "skip"]},
    )
    index: str = field(default="index", metadata={"help": "Directory of the index of candidates."})
    output: str | None = field(default=None, metadata={"help": "Directory that the dataset is written to."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what is in `output`."})
    teachers: dict | str | None = field(
        default=None,
        metadata={
            "help": "Frozen encoders: a mapping (in YAML or JSON) of image, text and cross, or 'tiny' for those in this package."
        },
    )
    num_negatives: int = field(default=4, metadata={"help": "Most negatives of a row."})
    num_candidates: int = field(default=50, metadata={"help": "Hits that they are chosen from."})
    margin: float = field(
        default=0.05,
        metadata={
            "help": "How far from the right answer the teachers have to call a negative: 0 is equal, 1 is the mean of such pairs."
        },
    )


def mine(model: ModelArguments, args: MineArguments) -> "Dataset":
    """
    Add hard negatives to a dataset and write it, to be trained on: see [`~retrieval.mine_negatives`].

    Args:
        model ([`ModelArguments`]), args ([`MineArguments`]):
            Settings.

    Returns:
        [`~datasets.Dataset`]: what was written.
    """
    if args.data is None or args.output is None:
        raise ValueError("`data` or `output` is not set: name the rows to mine for, and the directory to write to.")
    output = Path(args.output)
    if output.exists() and not args.overwrite:
        raise ValueError(
            f"`output` {output} is there already. Name another directory, or set `overwrite` to replace it."
        )

    from hf_sugar import SugarIndex, TripleEncoder
    from hf_sugar.data import load_data
    from hf_sugar.distributed import distributed_state
    from hf_sugar.files import replacing
    from hf_sugar.retrieval import mine_negatives

    rows = load_data(args.data, args.split, on_bad_row=args.on_bad_row)
    encoder = TripleEncoder.from_teachers(args.teachers, device=distributed_state().device)
    index = SugarIndex.load(args.index, embed=model.load())
    settings = {name: getattr(args, name) for name in ("num_negatives", "num_candidates", "margin")}
    mined = mine_negatives(rows, index, encoder, **settings, progress=True)
    with replacing(output) as path:
        mined.save_to_disk(path)
    return mined


def main(model: ModelArguments, args: MineArguments) -> None:
    print(f"{len(mine(model, args))} rows with negatives -> {args.output}")
