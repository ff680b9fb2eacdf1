"""Retrieval and generation metrics of a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_sugar.distributed import distributed_state
from hf_sugar.evaluation import (
    EvaluationData,
    chance,
    kernel_settings,
    label_ceilings,
    load_benchmarks,
    load_tasks,
    plot_curves,
    write_report,
)
from hf_sugar.evaluation.tasks import Task, run_tasks
from hf_sugar.inference import SugarEmbedder, SugarGenerator
from hf_sugar.teachers import TripleEncoder

from .arguments import setting
from .checkpoint import ModelArguments


@dataclass
class EvaluateArguments(ModelArguments):
    output_dir: str = setting("Where report.json and report.md are written.", "runs/evaluate")
    split: str = setting("Split of datasets that have several.", "test")
    max_new_tokens: int = setting("Longest generated answer.", 64)
    untrained: bool = setting(
        "Compare pooled hidden states, not embeddings. Always so for a model without a trained projector.", False
    )
    on_bad_row: str = setting("What to do with a malformed row.", "error", choices=["error", "skip"])
    overwrite: bool = setting("Replace the report that is in `output_dir`.", False)
    benchmarks: dict | None = setting("Files of published benchmarks by name, see examples/paper_table.yaml.", None)
    tasks: list[str] | None = setting("Benchmarks to run; by default all that `benchmarks` has.", None)
    teachers: dict | str | None = setting(
        "Teachers whose labels are measured beside the model, as it was trained: {image: ..., text: ..., cross: ...}, "
        "'default' or 'tiny'.",
        None,
    )


def evaluate(args: EvaluateArguments, data: EvaluationData) -> dict[str, Any]:
    """Measure a checkpoint and write a report. Returns results as [`~evaluation.evaluate_tasks`] does."""
    if not (data.any() or args.benchmarks or args.tasks):
        raise ValueError(
            "No data: set at least one of image_text_data, interleaved_data, generation_data, winoground_data, benchmarks."
        )
    output_dir = Path(args.output_dir)
    if (output_dir / "report.json").exists() and not args.overwrite:
        raise ValueError(f"{output_dir} holds a report already. Name another directory, or set `overwrite`.")
    output_dir.mkdir(parents=True, exist_ok=True)
    # what is wrong with the data shows before the model is loaded
    benchmarks = load_benchmarks(args.benchmarks or {}, args.tasks)
    tasks = load_tasks(data, args.split, args.on_bad_row)
    of_embeddings = [Task(b.field, f"{name}/", b.run, []) for name, b in benchmarks.items() if b.field]
    bounded = [*tasks, *of_embeddings]
    ceilings = {"chance": chance(bounded)}
    if args.teachers and not ceilings["chance"].keys() - {"notes"}:
        raise ValueError("`teachers` are named, but nothing is searched for that they have labels of. Leave them out.")
    notes, reason = [], args.untrained_projector()
    if reason:
        notes = [f"The retrieval projector is not trained ({reason}): pooled hidden states are compared instead."]
    elif args.untrained:
        notes = ["Pooled hidden states are compared, without the retrieval projector."]
    if args.teachers:  # which may refuse the data too
        print("the labels ...")
        encoder = TripleEncoder.from_teachers(args.teachers, device=distributed_state().device)
        training = args.training_settings()
        ceilings["labels"] = label_ceilings(bounded, encoder, **kernel_settings(training))
        if not training:
            said = "The labels have the default kernel: how the model was trained is not known."
            ceilings["labels"].setdefault("notes", []).append(said)
        encoder.unload()

    loaded = (*args.load(distributed_state().device), args.batch_size)
    lengths = {"max_batch_tokens": args.max_batch_tokens, "truncate_dim": args.truncate_dim}
    embed = SugarEmbedder(*loaded, project=not notes, progress=True, **lengths)
    generate = SugarGenerator(*loaded, args.max_new_tokens, progress=True)
    results = run_tasks(tasks, embed, generate)
    paper: dict[str, float] = {}
    pictures = []
    title = Path(args.model_name_or_path).name

    def report() -> str:
        runs = {**ceilings, **({"paper (7B)": paper} if paper else {}), title: results}
        settings = {**vars(args), "untrained": bool(notes), **vars(data)}
        return write_report(output_dir, f"Evaluation of {title}", runs, settings, notes, pictures)

    table = report()
    for name, benchmark in benchmarks.items():
        print(f"{name} ...")
        found = benchmark.run(embed, generate)
        results |= {f"{name}/{metric}": value for metric, value in found.items()}
        paper |= {f"{name}/{metric}": value for metric, value in benchmark.paper.items()}
        if benchmark.axis:
            plot_curves({title: found, "paper (7B)": benchmark.paper}, output_dir / f"{name}.png", benchmark.axis)
            pictures.append((f"{name}.png", f"{name}: results by {benchmark.axis}, with 95% intervals."))
        table = report()  # each may take hours: what is done is kept if the next one fails
    print(table)
    return results
