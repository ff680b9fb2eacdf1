import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedConfig

from hf_sugar.distributed import distributed_state
from hf_sugar.evaluation import EvaluationData, load_benchmarks, load_tasks, plot_curves, write_report
from hf_sugar.evaluation.tasks import run_tasks
from hf_sugar.hub.card import RUN_FILE
from hf_sugar.inference import SugarEmbedder, SugarGenerator
from hf_sugar.models import SugarConfig, SugarForConditionalGeneration, SugarProcessor


@dataclass
class EvaluateArguments:
    """Settings of `hf-sugar evaluate`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Full checkpoint, adapter repository or plain backbone."}
    )
    output_dir: str = field(default="runs/evaluate", metadata={"help": "Where report.json and report.md are written."})
    split: str = field(default="test", metadata={"help": "Split of datasets that have several."})
    dtype: str = field(default="auto", metadata={"help": "Precision of the model."})
    batch_size: int = field(default=32, metadata={"help": "Items in one forward pass."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest generated answer."})
    untrained: bool = field(
        default=False,
        metadata={
            "help": "Compare pooled hidden states, without the retrieval projector. Always so for a plain backbone, or a model trained with `structure_weight` 0."
        },
    )
    on_bad_row: str = field(
        default="error",
        metadata={"help": "What to do with a malformed row: 'error' or 'skip'.", "choices": ["error", "skip"]},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the report that is in `output_dir`."})
    benchmarks: dict | None = field(
        default=None,
        metadata={
            "help": "In YAML: where the files of published benchmarks are, by their names, see examples/paper_table.yaml."
        },
    )
    tasks: list[str] | None = field(
        default=None, metadata={"help": "Names of the benchmarks to run; by default all that `benchmarks` has."}
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
        `dict`: results as [`~evaluation.evaluate_tasks`] gives them.
    """
    if args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is not set: name the checkpoint to evaluate.")
    if not (data.any() or args.benchmarks or args.tasks):
        raise ValueError(
            "No data: set at least one of image_text_data, interleaved_data, generation_data, winoground_data, benchmarks."
        )
    output_dir = Path(args.output_dir)
    if (output_dir / "report.json").exists() and not args.overwrite:
        raise ValueError(
            f"`output_dir` {output_dir} holds a report already. Name another directory, or set `overwrite` to replace it."
        )
    # what is wrong with the data shows before the model is loaded
    benchmarks = load_benchmarks(args.benchmarks or {}, args.tasks)
    tasks = load_tasks(data, args.split, args.on_bad_row)
    notes = []
    if reason := untrained_projector(args.model_name_or_path):
        args.untrained = True
        notes.append(f"The retrieval projector is not trained ({reason}): pooled hidden states are compared instead.")
    elif args.untrained:
        notes.append("Pooled hidden states are compared, without the retrieval projector.")

    model = SugarForConditionalGeneration.from_pretrained(args.model_name_or_path, dtype=args.dtype)
    model.to(distributed_state().device)
    processor = SugarProcessor.from_pretrained(args.model_name_or_path)
    embed = SugarEmbedder(model, processor, args.batch_size, project=not args.untrained, progress=True)
    generate = SugarGenerator(model, processor, args.batch_size, args.max_new_tokens, progress=True)
    results = run_tasks(tasks, embed, generate)
    paper: dict[str, float] = {}
    pictures = []
    title = Path(args.model_name_or_path).name

    def report() -> str:
        runs = {**({"paper (7B)": paper} if paper else {}), title: results}
        settings = {**vars(args), **vars(data)}
        return write_report(output_dir, f"Evaluation of {title}", runs, settings, notes, pictures)

    table = report()
    for name, benchmark in benchmarks.items():
        print(f"{name} ...")
        found = benchmark.run(embed, generate)
        results |= {f"{name}/{metric}": value for metric, value in found.items()}
        paper |= {f"{name}/{metric}": value for metric, value in benchmark.paper.items()}
        if benchmark.axis:
            plot_curves(found, output_dir / f"{name}.png", benchmark.axis, benchmark.paper)
            pictures.append((f"{name}.png", f"{name}: results by {benchmark.axis}, with 95% intervals."))
        table = report()  # each may take hours: what is done is kept if the next one fails
    print(table)
    return results


def untrained_projector(name_or_path: str) -> str | None:
    """Why the retrieval projector of a checkpoint is known to be random, if it is."""
    config, _ = PreTrainedConfig.get_config_dict(name_or_path)
    if config.get("model_type") != SugarConfig.model_type:
        return f"{Path(name_or_path).name} is a plain {config.get('model_type')!r} model"
    run = Path(name_or_path) / RUN_FILE
    if run.is_file() and json.loads(run.read_text(encoding="utf-8"))["settings"].get("structure_weight") == 0:
        return "it was trained with `structure_weight` 0"
    return None


def main(args: EvaluateArguments, data: EvaluationData) -> None:
    evaluate(args, data)
