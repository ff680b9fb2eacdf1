from dataclasses import dataclass, field

from hf_sugar.data import load_data
from hf_sugar.distributed import distributed_state
from hf_sugar.teachers import TeacherCache, TripleEncoder

from .arguments import StreamedDataArguments


@dataclass
class PrepareArguments:
    """
    Settings of `hf-sugar prepare`.

    Parameters:
        teachers (`dict[str, str]`, *optional*):
            As in [`SugarTrainingConfig`].
        teacher_cache_dir (`str`, *optional*, defaults to `"teacher_cache"`):
            Where the embeddings are written; `hf-sugar train` takes the same setting.
        split (`str`, *optional*, defaults to `"train"`):
            Split of datasets that have several.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the mixture of several sources. With the seed of the training, whose default is the same, training
            meets the blocks of rows that are done and need not open their images again.
    """

    teachers: dict | str | None = field(
        default=None,
        metadata={
            "help": "Frozen encoders: a mapping (in YAML or JSON) of image, text and cross, or 'tiny' for those in this package."
        },
    )
    teacher_cache_dir: str = field(default="teacher_cache", metadata={"help": "Where the embeddings are written."})
    split: str = field(default="train", metadata={"help": "Split of datasets that have several."})
    seed: int = field(default=42, metadata={"help": "Seed of the mixture of several sources, as in training."})


def prepare(data: StreamedDataArguments, args: PrepareArguments) -> dict[str, int]:
    """
    Put the teacher embeddings of `data.train_data` and `data.eval_data` into the cache. Under `accelerate launch -m
    hf_sugar.cli.main prepare` the work is divided over the processes.

    Args:
        data ([`StreamedDataArguments`]):
            The data.
        args ([`PrepareArguments`]):
            The teachers and the place.

    Returns:
        `dict[str, int]`: counts as [`TeacherCache.fill`] gives them, added up.
    """
    sources = [
        (source, split) for source, split in ((data.train_data, args.split), (data.eval_data, "validation")) if source
    ]
    if not sources:
        raise ValueError("`train_data` is not set: name the data to prepare.")
    encoder = TripleEncoder.from_teachers(args.teachers, device=distributed_state().device)
    cache = TeacherCache.for_encoder(args.teacher_cache_dir, encoder)
    total: dict[str, int] = {}
    for source, split in sources:
        rows = load_data(
            source,
            split,
            seed=args.seed,
            on_bad_row=data.on_bad_row,
            streaming=data.streaming,
            image_root=data.image_root,
        )
        counts = cache.fill(rows, encoder, data.on_bad_row)
        total = {name: total.get(name, 0) + count for name, count in counts.items()}
    return total


def main(data: StreamedDataArguments, args: PrepareArguments) -> None:
    counts = prepare(data, args)
    distributed_state().print(
        ", ".join(f"{count} {name}" for name, count in counts.items()), "->", args.teacher_cache_dir
    )
