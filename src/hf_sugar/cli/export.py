"""Write a checkpoint for sentence-transformers, or the plain backbone."""

from dataclasses import dataclass
from pathlib import Path

from hf_sugar.export import export_sentence_transformers

from .arguments import setting
from .checkpoint import CheckpointArguments


@dataclass(kw_only=True)
class ExportArguments(CheckpointArguments):
    output_dir: str = setting("Directory to write to, which must not exist, or be empty.", aliases=["--output"])
    format: str = setting("For sentence-transformers, or the plain backbone.", "sentence-transformers")
    truncate_dim: int | None = setting("Length to cut embeddings to, for sentence-transformers.", None)


def export(args: ExportArguments) -> Path:
    """Write a checkpoint for another program; adapters are merged into it. Returns the directory, complete."""
    if args.format not in ("sentence-transformers", "backbone"):
        raise ValueError(f"`format` is {args.format!r}; it must be sentence-transformers or backbone.")
    if args.format == "backbone" and args.truncate_dim is not None:
        raise ValueError("`truncate_dim` cuts embeddings, which a plain backbone has none of. Leave it out.")
    output = Path(args.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`output` {output} exists and is not empty. Remove it, or name another directory.")
    if args.format == "sentence-transformers":
        args.require_trained_projector()
    model, processor = args.load()
    if args.format == "backbone":
        model.export_backbone(output, merge=True, processor=processor)
    else:
        export_sentence_transformers(model, processor, output, args.truncate_dim)
    print(f"Wrote {output}.")
    return output
