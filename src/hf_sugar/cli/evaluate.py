from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState

from hf_sugar.evaluation import embedder, generator
from hf_sugar.evaluation.report import EvaluationData, evaluate_tasks, write_report
from hf_sugar.models import SugarForConditionalGeneration, SugarProcessor

from .arguments import parse


@dataclass
class EvaluateArguments:
    """
    Settings of `hf-sugar evaluate`.

    Parameters:
        model_name_or_path (`str`):
            Full checkpoint, adapter repository or plain backbone.
        output_dir (`str`, *optional*, defaults to `"runs/evaluate"`):
            Where `report.json` and `report.md` are written.
        split (`str`, *optional*, defaults to `"test"`):
            Split of datasets that have several.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision of the model.
        batch_size (`int`, *optional*, defaults to `32`):
            Items in one forward pass.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest generated answer.
        untrained (`bool`, *optional*, defaults to `False`):
            Whether to leave out the retrieval projector and compare pooled hidden states: for a plain backbone.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Full checkpoint, adapter repository or plain backbone."}
    )
    output_dir: str = field(default="runs/evaluate", metadata={"help": "Where the report is written."})
    split: str = field(default="test", metadata={"help": "Split of datasets that have several."})
    dtype: str = field(default="auto", metadata={"help": "Precision of the model."})
    batch_size: int = field(default=32, metadata={"help": "Items in one forward pass."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest generated answer."})
    untrained: bool = field(
        default=False, metadata={"help": "Compare pooled hidden states, without the retrieval projector."}
    )


def evaluate(args: EvaluateArguments, data: EvaluationData) -> dict:
    """
    Measure a checkpoint and write a report.

    Args:
        args ([`EvaluateArguments`]):
            Which checkpoint, and how.
        data ([`EvaluationData`]):
            On what.

    Returns:
        `dict`: results as [`~evaluation.report.evaluate_tasks`] gives them.
    """
    if args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is not set: name the checkpoint to evaluate.")
    if not data.any():
        raise ValueError(
            "No data: set at least one of image_text_data, interleaved_data, generation_data, winoground_data."
        )
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = SugarForConditionalGeneration.from_pretrained(args.model_name_or_path, dtype=dtype)
    model.to(PartialState().device)
    processor = SugarProcessor.from_pretrained(args.model_name_or_path)
    results = evaluate_tasks(
        data,
        embedder(model, processor, args.batch_size, project=not args.untrained, progress=True),
        generator(model, processor, args.batch_size, args.max_new_tokens, progress=True),
        args.split,
    )
    name = Path(args.model_name_or_path).name
    print(write_report(args.output_dir, f"Evaluation of {name}", {name: results}, {**vars(args), **vars(data)}))
    return results


def main(argv: list[str]) -> None:
    args, data = parse("evaluate", (EvaluateArguments, EvaluationData), argv, "Measure retrieval and generation.")
    evaluate(args, data)
