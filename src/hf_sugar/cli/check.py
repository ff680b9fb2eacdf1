from dataclasses import dataclass, field

from hf_sugar.data import check_dataset, load_data
from hf_sugar.models import SugarProcessor

from .arguments import DataArguments, parse


@dataclass
class CheckArguments:
    """
    Settings of `hf-sugar check`.

    Parameters:
        model_name_or_path (`str`, *optional*):
            Checkpoint whose processor counts the tokens of each sample.
        max_length (`int`, *optional*):
            Longest sequence allowed, image tokens included.
        split (`str`, *optional*, defaults to `"train"`):
            Split of datasets that have several.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint whose processor counts the tokens of each sample."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Longest sequence allowed, image tokens included."})
    split: str = field(default="train", metadata={"help": "Split of datasets that have several."})


def main(argv: list[str]) -> int:
    data, args = parse(
        "check", (DataArguments, CheckArguments), argv, "Read a dataset and say what training would meet."
    )
    if data.train_data is None:
        raise ValueError("`train_data` is not set: name the data to check.")
    processor = None
    if args.model_name_or_path is not None:
        processor = SugarProcessor.from_pretrained(args.model_name_or_path)
    dataset = load_data(data.train_data, args.split, on_bad_row=data.on_bad_row)
    report = check_dataset(dataset, processor, args.max_length)
    print(report)
    return 0 if report.ok else 1
