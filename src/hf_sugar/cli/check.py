"""Read a dataset and say what training would meet."""

from dataclasses import dataclass

from hf_sugar.data import Problem, check_dataset, load_data
from hf_sugar.data.load import source_weights

from .arguments import DataArguments, setting


@dataclass
class CheckArguments:
    model_name_or_path: str | None = setting("Checkpoint whose processor counts the tokens of each sample.", None)
    max_length: int | None = setting("Longest sequence, with image tokens; by default what the model takes.", None)
    split: str = setting("Split of datasets that have several.", "train")


def check(data: DataArguments, args: CheckArguments) -> int:
    """Print what is wrong with a dataset. Returns the exit status, 0 if nothing is."""
    processor, max_length = None, args.max_length
    if args.model_name_or_path is not None:
        from hf_sugar.models import SugarConfig, SugarProcessor  # with torch, which the check does without otherwise

        from .checkpoint import CheckpointArguments

        CheckpointArguments(args.model_name_or_path).stored_config()
        processor = SugarProcessor.from_pretrained(args.model_name_or_path)
        if max_length is None:
            config = SugarConfig.from_pretrained(args.model_name_or_path)
            max_length = config.get_text_config().max_position_embeddings
    source_weights(data.train_data)
    # every row once: a mixture by weights repeats those of small sources
    sources = [{**each, "weight": None} if isinstance(each, dict) else each for each in data.train_data]
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
