"""Train on the embedded world (or on your own data) with and without the discriminative loss, compare, report."""

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig

from hf_sugar.data import load_data
from hf_sugar.distributed import distributed_state
from hf_sugar.evaluation import (
    Estimate,
    EvaluationData,
    best_hits,
    chance,
    evaluate_tasks,
    kernel_settings,
    label_ceilings,
    load_benchmarks,
    load_tasks,
    plot_curves,
    write_pictures,
    write_report,
)
from hf_sugar.evaluation.tasks import named_sources
from hf_sugar.inference import SugarEmbedder, SugarGenerator
from hf_sugar.models import SugarForConditionalGeneration, SugarProcessor
from hf_sugar.teachers import TripleEncoder
from hf_sugar.training import SugarTrainer, SugarTrainingConfig
from hf_sugar.world import DESCRIBE, checkpoint, world_teachers, write_world

from .arguments import DataArguments, setting


# What the demo does unless it is told otherwise: the rendered world, and checkpoints small enough for a laptop.
WORLD_TRAINING = {
    "max_steps": 800,
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,
    "warmup_steps": 50,
    "positions_per_sample": 4,
    "singles_per_sample": 4,
    "retrieval_dim": 128,
    "retrieval_hidden_size": 1024,
    "gradient_checkpointing": False,
    "bf16": False,
    "dataloader_num_workers": 1,
    "train_sampling_strategy": "group_by_length",
    "logging_steps": 10,
    "report_to": [],
    "save_strategy": "no",
}
# The paper's loss and labels to the letter, beside the defaults; captions are trained alone by turning rows round.
PAPER = {"discriminative_loss": "structure", "label_calibration": "none", "flip_captions": True}
# The paper adapts the query and value projections of a 7B model. Four layers of width 128 need all of theirs.
WORLD_LORA = {"r": 64, "lora_alpha": 128, "target_modules": "all-linear"}

INTRODUCTION = """{rows} rows, {steps} steps, seed {seeds}, {minutes:.0f} minutes in all on `{device}`; `report.json` has the rest.

| column | what it is |
|---|---|
| chance | random similarities |
| labels | the teachers' labels in the place of a model: what the structure loss alone can teach |
| untouched | `{model}`, whose hidden states are compared (the last one, or their mean): it has no trained projector |
| SFT | the generative loss alone, on the same rows for as many steps; hidden states again |
| Sugar | the discriminative loss besides, as the library does by default |"""
NEXT = """## What to do next

Labels near chance: these teachers do not know the data, choose others. Sugar far below its labels: train longer, or on more
rows. Answers worse than after SFT: lower `structure_weight`. To use what was trained, and to train on your own data:

```bash
hf-sugar index  --model_name_or_path {trained} --data {data} --index {index}
hf-sugar search --model_name_or_path {trained} --index {index} --query {query}
hf-sugar chat   --model_name_or_path {trained} --index {index}
hf-sugar train  --model_name_or_path llava-hf/llava-1.5-7b-hf --train_data my_data.json --output_dir my-sugar
```"""


@dataclass
class DemoArguments:
    """Settings of `hf-sugar demo`: one comparison of an untouched checkpoint, supervised fine-tuning and Sugar."""

    output_dir: str = setting("Where data, checkpoints and report are written.", "runs/demo")
    model_name_or_path: str | None = setting("Checkpoint to train. Defaults to the tiny LLaVA of the world.", None)
    teachers: dict | str | None = setting(
        "Frozen encoders: image, text and cross. Defaults to the tiny ones of the world.", None
    )
    training: dict | None = setting("Fields of SugarTrainingConfig, the same for all runs.", None)
    lora: dict | None = setting("Fields of peft.LoraConfig.", None)
    benchmarks: dict | None = setting(
        "What Sugar is measured on besides, as in `hf-sugar evaluate`. On the world, the gain of retrieval on its facts.",
        None,
    )
    seeds: list[int] | None = setting(
        "Seeds to repeat all runs with, 0 by default; figures are means over them.", None
    )
    ablations: bool = setting("Train with the paper's loss and labels, and each of the two losses alone, too.", False)
    title: str = setting("Heading of the report.", "Sugar on the rendered world")
    note: str | None = setting("A paragraph for the report.", None)


def demo(args: DemoArguments, data: DataArguments, evaluation: EvaluationData) -> dict[str, dict[str, Any]]:
    """Run the comparison, on the rendered world (written into `output_dir`) where `data` has no `train_data`. Returns the
    results of each column of the table."""
    started = time.monotonic()
    output_dir = Path(args.output_dir)
    if (output_dir / "report.md").exists():
        print(f"the report in {output_dir} will be replaced")
    settings, seeds = {**WORLD_TRAINING, **(args.training or {})}, args.seeds or [0]
    lora = {**WORLD_LORA, **(args.lora or {})}
    config = SugarTrainingConfig(str(output_dir), **settings)
    LoraConfig(**lora)  # what it refuses, before any work
    model_path = args.model_name_or_path or str(checkpoint("llava"))
    teachers = args.teachers or world_teachers()
    if data.train_data is None:
        print("rendering the world")
        args.benchmarks = {**render_world(output_dir / "world", data, evaluation), **(args.benchmarks or {})}
    benchmarks = load_benchmarks(args.benchmarks or {})
    reading = {"on_bad_row": data.on_bad_row, "image_root": data.image_root}
    train_dataset = load_data(data.train_data, **reading)
    eval_dataset = None if data.eval_data is None else load_data(data.eval_data, "validation", **reading)
    processor = SugarProcessor.from_pretrained(model_path)
    device = distributed_state().device
    encoder = TripleEncoder.from_teachers(teachers, device=device)

    compared, several = {"Sugar": {}}, len(seeds) > 1
    if args.ablations:
        alone = {f"Sugar, {loss}": {"discriminative_loss": loss} for loss in ("structure", "contrastive")}
        compared = {"Sugar, paper": PAPER, **alone, "Sugar": {}}  # what is shown in pictures is trained last

    def training(run: str, seed: int, **changes) -> tuple:
        directory = run.lower().replace(", ", "-") + (f"-{seed}" if several else "")
        wanted = {"teacher_cache_dir": str(output_dir / "teacher_cache"), **settings, **changes}
        wanted |= {"output_dir": str(output_dir / directory), "teachers": teachers, "seed": seed}
        return run + (f", seed {seed}" if several else ""), model_path, wanted, lora, train_dataset, eval_dataset

    measured, logs = {}, {}
    with _second_process(output_dir / "second_process.log") as call:
        untouched = call(_untouched, model_path, evaluation)
        baselines = [call(_fine_tuned, evaluation, *training("SFT", seed, structure_weight=0.0)) for seed in seeds]
        print("chance and the labels")
        tasks = load_tasks(evaluation)
        labels = label_ceilings(tasks, encoder, **kernel_settings(vars(config)))
        for seed in seeds:
            for run, changes in compared.items():
                trainer = _train(*training(run, seed, **changes))
                logs[run] = trainer.state.log_history
                trained = trainer.model.eval()
                embed = SugarEmbedder(trained, processor, progress=True)
                generate = SugarGenerator(trained, processor, progress=True)
                results = evaluate_tasks(evaluation, embed, generate)
                for name, benchmark in benchmarks.items():
                    results |= {f"{name}/{metric}": value for metric, value in benchmark.run(embed, generate).items()}
                measured.setdefault(run, []).append(results)
        columns = {"chance": [chance(tasks)], "labels": [labels]}
        columns |= {f"untouched ({pooling})": [results] for pooling, results in untouched().items()}
        for baseline in baselines:
            by_pooling, log, hits = baseline()
            for pooling, results in by_pooling.items():
                columns.setdefault(f"SFT ({pooling})", []).append(results)
        logs, found = {"SFT": log, **logs}, {"SFT": hits, "Sugar": best_hits(embed, evaluation)}

    print("the report")
    pictures = write_pictures(output_dir, evaluation, embed, encoder, logs, found, delta=trainer.args.delta)
    columns |= measured
    if any("@" in name for name in results):
        curves = {name: results[-1] for name, results in columns.items() if not name.endswith("(mean)")}
        plot_curves(curves, output_dir / "recall.png")
        pictures.append(("recall.png", "Recall at k with 95% intervals, where there are several seeds of the last."))
    seconds = round(time.monotonic() - started)
    runs = {name: _mean(results) for name, results in columns.items()}
    made = {
        "trained": trainer.args.output_dir,
        "data": str(next(iter(named_sources(evaluation.image_text_data).values()), "photos")),
        "index": str(output_dir / "index"),
        "query": found["Sugar"][0]["query"] if found["Sugar"] else "what to look for",
    }
    used = {"model": model_path, "teachers": teachers, "training": settings, "lora": lora, "seeds": seeds}
    used |= {"train_rows": len(train_dataset), "seconds": seconds}
    introduction = INTRODUCTION.format(
        rows=len(train_dataset),
        steps=trainer.state.global_step,
        seeds=", ".join(map(str, seeds)) + " (means, with the value of each)" * several,
        minutes=seconds / 60,
        device=device,
        model=Path(model_path).name,
    )
    after = NEXT.format(**{name: shlex.quote(value) for name, value in made.items()})
    notes = [args.note] if args.note else []
    table = write_report(output_dir, args.title, runs, used, notes, pictures, introduction, after)
    print(f"\n{table}\n\n{seconds} s. Report, plots and checkpoints: {output_dir / 'report.md'}")
    return runs


def render_world(directory: Path, data: DataArguments, evaluation: EvaluationData) -> dict[str, dict[str, str]]:
    """Write the world, set `train_data`, `eval_data` and all of `evaluation` to its files, and return the settings of
    [`~evaluation.load_benchmarks`] for its facts."""
    held_out = {"test": 320, "test_unseen": 320}
    sizes = {
        "captions": {"train": 4800, "validation": 200, **held_out},
        "conversations": {"train": 3500, "test": 1000, "test_unseen": 640},
        "stories": {"train": 500, "test": 100},
        "facts": {"train": 800, "test": 300},
        "winoground": {"test": 300},
    }
    files = write_world(directory, sizes)
    data.train_data = [str(files[kind]["train"]) for kind in ("captions", "conversations", "stories", "facts")]
    data.eval_data = [str(files["captions"]["validation"])]
    evaluation.image_text_data = {split: str(files["captions"][split]) for split in held_out}
    evaluation.interleaved_data = [str(files["stories"]["test"])]
    evaluation.winoground_data = str(files["winoground"]["test"])

    # descriptions and questions are measured apart
    evaluation.generation_data = {}
    for split in held_out:
        rows = load_data(str(files["conversations"][split]))
        describes = [row["messages"][0]["content"][1]["text"] == DESCRIBE for row in rows.select_columns("messages")]
        for name, wanted in (("descriptions", True), ("questions", False)):
            path = directory / "conversations" / f"{split}_{name}.parquet"
            rows.select([i for i, value in enumerate(describes) if value == wanted]).to_parquet(path)
            evaluation.generation_data[name if split == "test" else f"{split}_{name}"] = str(path)

    # the knowledge base holds the first question about a scene and its answer; the second is asked
    facts = load_data(str(files["facts"]["test"]))
    sources = {}
    for place, name in enumerate(("knowledge", "questions")):
        rows = [
            {
                **row,
                "messages": row["messages"][2 * place :][:2],
                "images": [row["images"][place]],
                "id": f"{name}:{n}",
            }
            for n, row in enumerate(facts)
        ]
        sources[name] = str(directory / "facts" / f"{name}.parquet")
        Dataset.from_list(rows, features=facts.features).to_parquet(sources[name])
    return {"rag": sources}


@contextmanager
def _second_process(log: Path) -> Iterator[Callable[..., Callable[[], Any]]]:
    """Gives a function that takes a call and returns one that gives its result. Small models do not fill the cores of a CPU:
    there the calls are made meanwhile, one after another, by a process that has half of the threads and writes what it prints
    to a file. Elsewhere each is made when its result is asked for."""
    threads, state = torch.get_num_threads(), distributed_state()
    if state.device.type != "cpu" or state.num_processes > 1 or threads == 1:
        yield partial
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    start = (log, threads // 2)
    pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_start_second_process, initargs=start)
    torch.set_num_threads(threads - threads // 2)
    print(f"the untouched checkpoint and SFT in a second process, which writes to {log}")
    try:
        yield lambda function, *args: pool.submit(function, *args).result
    except BaseException:
        for process in active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown()
        torch.set_num_threads(threads)


def _start_second_process(log: Path, threads: int) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    with open(log, "w") as stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
        os.dup2(stream.fileno(), sys.stderr.fileno())


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def _train(
    name: str, model_path: str, settings: dict[str, Any], lora: dict[str, Any], train_dataset, eval_dataset
) -> SugarTrainer:
    print(f"training {name}", flush=True)
    trainer = SugarTrainer(
        model=model_path,
        args=SugarTrainingConfig(**settings),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=LoraConfig(**lora),
    )
    trainer.train()
    trainer.save_model()
    return trainer


def _fine_tuned(evaluation: EvaluationData, *training) -> tuple[dict[str, Any], list[dict[str, float]], list]:
    """Of supervised fine-tuning: results by pooling, the log, and what it finds."""
    trainer = _train(*training)
    processor = trainer.processing_class
    hits = best_hits(SugarEmbedder(trainer.model.eval(), processor, project=False), evaluation)
    return _untrained(trainer.model, processor, evaluation), trainer.state.log_history, hits


def _untouched(model_path: str, evaluation: EvaluationData) -> dict[str, dict[str, Any]]:
    print("the untouched checkpoint", flush=True)
    model = SugarForConditionalGeneration.from_pretrained(model_path, dtype=torch.float32)
    processor = SugarProcessor.from_pretrained(model_path)
    return _untrained(model.to(distributed_state().device), processor, evaluation)


def _untrained(model, processor, evaluation: EvaluationData) -> dict[str, dict[str, Any]]:
    """Results of the hidden states of a model whose projector has not been trained, pooled in two ways."""
    last = SugarEmbedder(model, processor, project=False, progress=True)
    mean = SugarEmbedder(model, processor, project=False, pooling="mean", progress=True)
    retrieval = EvaluationData(
        evaluation.image_text_data, evaluation.interleaved_data, None, evaluation.winoground_data
    )
    return {
        "last": evaluate_tasks(evaluation, last, SugarGenerator(model, processor, progress=True)),
        "mean": evaluate_tasks(retrieval, mean),
    }


def _mean(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Results over seeds: those of the only seed, or the mean with the value of each."""
    if len(results) == 1:
        return results[0]
    mean = {}
    for name, value in results[0].items():
        if not isinstance(value, Estimate):
            mean[name] = value
        else:
            values = [result[name].value for result in results]
            mean[name] = f"{np.mean(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})"
    return mean
