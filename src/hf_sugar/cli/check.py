from dataclasses import dataclass, field

from hf_sugar.data import Problem, check_dataset, load_data

from .arguments import DataArguments


@dataclass
class CheckArguments:
    """Settings of `hf-sugar check`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint whose processor counts the tokens of each sample."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest sequence allowed, image tokens included. By default what the checkpoint takes."},
    )
    split: str = field(default="train", metadata={"help": "Split of datasets that have several."})


def main(data: DataArguments, args: CheckArguments) -> int:
    if data.train_data is None:
        raise ValueError("`train_data` is not set: name the data to check.")
    processor, max_length = None, args.max_length
    if args.model_name_or_path is not None:
        from hf_sugar.models import SugarConfig, SugarProcessor  # with torch, which the check does without otherwise

        processor = SugarProcessor.from_pretrained(args.model_name_or_path)
        if max_length is None:
            config = SugarConfig.from_pretrained(args.model_name_or_path)
            max_length = config.get_text_config().max_position_embeddings
    # every row once: a mixture by weights repeats those of small sources
    sources = [
        {**source, "weight": None} if isinstance(source, dict) else source
        for source in (data.train_data if isinstance(data.train_data, list) else [data.train_data])
    ]
    bad_rows: list[Problem] = []
    try:
        # every bad row is of interest here, not the first alone
        dataset = load_data(sources, args.split, on_bad_row="skip", image_root=data.image_root, bad_rows=bad_rows)
    except ValueError as error:
        if not bad_rows:
            raise
        print(error)  # no row is good
        return 1
    report = check_dataset(dataset, processor, max_length, bad_rows=bad_rows)
    print(report)
    return 0 if report.ok else 1
