from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedConfig

from hf_sugar.export import export_sentence_transformers
from hf_sugar.files import replacing
from hf_sugar.models import SugarConfig, SugarForConditionalGeneration, SugarProcessor


FORMATS = ("sentence-transformers", "backbone")


@dataclass
class ExportArguments:
    """Settings of `hf-sugar export`."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Full checkpoint or adapter repository."})
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Directory to write to, which must not exist, or be empty.", "aliases": ["--output"]},
    )
    format: str = field(
        default="sentence-transformers",
        metadata={
            "help": "What is to load the result: sentence-transformers, or the backbone's own class (no retrieval projector).",
            "choices": list(FORMATS),
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a checkpoint on the Hub."})
    dtype: str = field(
        default="auto", metadata={"help": "Precision to load and write in; that of the checkpoint by default."}
    )


def export(args: ExportArguments) -> Path:
    """
    Write a checkpoint for another program; adapters are merged into it.

    Args:
        args ([`ExportArguments`]):
            Which checkpoint, and how.

    Returns:
        `Path`: the directory, complete.
    """
    if args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is not set: name the checkpoint to export.")
    if args.output_dir is None:
        raise ValueError("`output_dir` is not set: name the directory to write to.")
    if args.format not in FORMATS:
        raise ValueError(f"`format` is {args.format!r}. Use one of {', '.join(FORMATS)}.")
    output = Path(args.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`output_dir` {output} exists and is not empty. Remove it, or name another directory.")
    config, _ = PreTrainedConfig.get_config_dict(args.model_name_or_path, revision=args.revision)
    if args.format == "sentence-transformers" and config.get("model_type") != SugarConfig.model_type:
        raise ValueError(
            f"{args.model_name_or_path} holds no Sugar model but a {config.get('model_type')!r}, which has no retrieval "
            "projector to export. Train it first (`hf-sugar train`)."
        )

    model = SugarForConditionalGeneration.from_pretrained(
        args.model_name_or_path, revision=args.revision, dtype=args.dtype
    ).eval()
    processor = SugarProcessor.from_pretrained(args.model_name_or_path, revision=args.revision)
    if args.format == "backbone":
        with replacing(output) as directory:
            model.export_backbone(directory, merge=True, processor=processor)
    else:
        export_sentence_transformers(model, processor, output)
    return output


def main(args: ExportArguments) -> None:
    output = export(args)
    print(f"Wrote {output}.")
