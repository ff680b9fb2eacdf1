"""Compute the teacher embeddings of a dataset, and mean and spread of its labels, once."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hf_sugar.data import load_data
from hf_sugar.data.checks import readable_rows
from hf_sugar.data.images import undecoded
from hf_sugar.distributed import distributed_state
from hf_sugar.files import replacing
from hf_sugar.teachers import TripleEncoder, add_teacher_embeddings
from hf_sugar.training import SugarCollator
from hf_sugar.training.config import LabelSettings
from hf_sugar.training.labels import label_statistics

from .arguments import StreamedDataArguments, setting


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
        rows = undecoded(load_data(source, split, **reading))
        if data.on_bad_row == "skip":
            rows = readable_rows(rows, counts)
        elif data.streaming:
            rows = readable_rows(rows, counts, lambda *_: None)  # counts them
        else:
            counts["rows"] += len(rows)
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
