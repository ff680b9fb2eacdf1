"""Compute the teacher embeddings of a dataset, and mean and spread of its labels, once."""

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from hf_sugar.data import load_data, row_name, row_slices
from hf_sugar.data.images import undecoded
from hf_sugar.distributed import distributed_state
from hf_sugar.files import replacing
from hf_sugar.teachers import TripleEncoder, add_teacher_embeddings
from hf_sugar.training import SugarCollator
from hf_sugar.training.config import LabelSettings
from hf_sugar.training.labels import label_statistics

from .arguments import StreamedDataArguments, setting


logger = logging.getLogger(__name__)


@dataclass
class PrepareArguments(LabelSettings):
    teachers: dict | str | None = setting("Frozen encoders: {image: ..., text: ..., cross: ...}, or 'tiny'.", None)
    teacher_cache_dir: str = setting("Where the embeddings are kept.", "teacher_cache")
    dataset_dir: str | None = setting("Where rows and embeddings are written as a dataset, to be streamed.", None)
    split: str = setting("Split of datasets that have several.", "train")
    seed: int = setting("Seed of the mixture of several sources, and of a training.", 42)


def prepare(data: StreamedDataArguments, args: PrepareArguments) -> Counter:
    """Embed the slices of `data.train_data` and `data.eval_data` with the teachers, divided over the processes of `accelerate
    launch -m hf_sugar.cli.main prepare`. Returns how many `rows` there were, `skipped` ones, and slices `encoded` anew."""
    if args.dataset_dir and data.streaming:
        raise ValueError("`dataset_dir` cannot be written from a stream: leave `streaming` off.")
    state = distributed_state()
    encoder = TripleEncoder.from_teachers(args.teachers, device=state.device)
    counts = Counter(rows=0, skipped=0, encoded=0)
    reading = {"seed": args.seed, **{key: vars(data)[key] for key in ("on_bad_row", "streaming", "image_root")}}
    for name, source, split in (("train", data.train_data, args.split), ("validation", data.eval_data, "validation")):
        if source is None:
            continue
        rows = _usable(load_data(source, split, **reading), data.on_bad_row == "skip", counts)
        rows = add_teacher_embeddings(rows, encoder, args.teacher_cache_dir, counts=counts)
        if state.is_main_process:
            if args.dataset_dir:
                with replacing(Path(args.dataset_dir) / name) as path:
                    rows.save_to_disk(path)
            if name == "train":
                counted = counts.copy()  # a stream is read, and counted, once more
                collator = SugarCollator(
                    None, teachers=encoder.record, singles=args.singles_per_sample, seed=args.seed
                )
                total = counts["rows"] - counts["skipped"]
                label_statistics(rows, collator, args, encoder.split, args.teacher_cache_dir, store_rows=total)
                counts = counted
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    state.print(f"{said} -> {args.dataset_dir or args.teacher_cache_dir}")
    return counts


def _usable(rows: Dataset | IterableDataset, skip: bool, counts: Counter) -> Dataset | IterableDataset:
    """The rows, counted; with `skip` those whose images can be opened."""

    def usable(row, index):
        counts["rows"] += 1
        try:
            if skip:
                row_slices(row, row_name(row, index))
        except ValueError as error:
            counts["skipped"] += 1
            if counts["skipped"] <= 5:
                logger.warning("Skipped: %s", error)
            return False
        return True

    rows = undecoded(rows)
    if isinstance(rows, IterableDataset):
        return rows.filter(usable, with_indices=True)
    if not skip:
        counts["rows"] += len(rows)
        return rows
    return rows.select([index for index, row in enumerate(tqdm(rows, desc="opening images")) if usable(row, index)])
