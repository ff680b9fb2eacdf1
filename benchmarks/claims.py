"""
The claims of the paper, each tested with and without what it is about, on the world of `claims_world.py`.

python benchmarks/claims.py
python benchmarks/claims.py --cells both contrastive --seeds 0 1   # a part of it
python benchmarks/claims.py --cells both SFT labels --seeds 0 --scale 0.02 --output runs/claims_short   # short

A cell is one setting trained with one seed and measured; its figures are written to `cells/` when they are all there, and a
second start goes on with the cells that are missing. A seed draws the weights of projector and adapters, the order of the
batches, the positions, and the test set. Searches are measured by R@1, that of the next image by R@5.

A claim is a difference: of two settings on one task, or of two figures of one setting. Its interval is the 95% interval of
Student's t over the differences of the seeds. The verdict follows from it:

- not testable: with fewer than three seeds; or where both sides are within 3 points of chance, or both above 97%;
- a gain is reproduced if the interval lies above 0, refuted if below, and else no difference is seen;
- what is to be kept is reproduced if the interval lies above -3 points, refuted if it lies below 0, and else undecided;
- what is to be flat is reproduced if the interval lies within 5 points of 0 on both sides, refuted if it does not hold 0, and
  else undecided.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from claims_world import held_out_documents, held_out_stories, in_turns, training_rows, views
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from position_curve import write as write_webqa

from hf_sugar import SugarEmbedder, SugarGenerator, SugarTrainer, SugarTrainingConfig, TripleEncoder
from hf_sugar.cli.demo import WORLD_LORA, WORLD_TRAINING
from hf_sugar.evaluation import (
    exact_match,
    image_text_pairs,
    image_text_retrieval,
    interleaved_retrieval,
    label_ceilings,
    load_benchmarks,
    winoground,
)
from hf_sugar.evaluation.tasks import Task, recall, run_tasks
from hf_sugar.files import replacing
from hf_sugar.teachers import add_teacher_embeddings
from hf_sugar.world import DESCRIBE, checkpoint, load_world, world_teachers


sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_checkpoints"))
from train import save_checkpoint, train_dinov2  # noqa: E402


BATCHES = {"captions": 90, "stories": 32, "conversations": 16, "facts": 12}
BATCH_SIZE = 32
STRUCTURE = {"discriminative_loss": "structure"}
SETTINGS = {
    "both": {},
    "SFT": {"structure_weight": 0},
    "contrastive": {"discriminative_loss": "contrastive"},
    "structure": STRUCTURE,
    "structure, mean kernel": {**STRUCTURE, "label_kernel": "mean"},
    "structure, CLIP alone": {**STRUCTURE, "teachers": "clip"},
    "both, mean kernel": {"label_kernel": "mean"},
    "both, CLIP alone": {"teachers": "clip"},
    "both, last image token": {"image_pooling": "last"},
    "both, no stories": {"without": "stories"},
    "both, no captions": {"without": "captions"},
}
# what the labels themselves say, of the first seed
LABELS = {
    "labels": {},
    "labels, mean kernel": {"label_kernel": "mean"},
    "labels, CLIP alone": {"teachers": "clip"},
}
CHANCE = {"next image": 1.4, "documents": 2.6}  # that of other searches and of answers is below 1
CHANCE |= {"orders": 100 / 6, "winoground": 100 / 6}  # orders: of the right plot
CHANCE |= {"position, first half": 50.0, "position, second half": 50.0, "facts, without": 12.5}
T_975 = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by seeds
GENERATED = ("descriptions", "questions")
RETRIEVED = ("image to text", "text to image", "next image", "documents", "orders")
# claim, kind, with, without, tasks
CLAIMS = [
    ("Retrieval is gained over SFT", "gain", "both", "SFT", RETRIEVED),
    ("Generation is kept", "kept", "both", "SFT", GENERATED),
    ("Structure adds to contrast", "gain", "both", "contrastive", (*RETRIEVED, "winoground")),
    ("GAK helps interleaved retrieval", "gain", "structure", "structure, mean kernel", RETRIEVED[2:]),
    ("GAK helps interleaved retrieval", "gain", "both", "both, mean kernel", RETRIEVED[2:]),
    ("The triple kernel helps Winoground", "gain", "structure", "structure, CLIP alone", ("winoground",)),
    ("The triple kernel helps Winoground", "gain", "both", "both, CLIP alone", ("winoground",)),
    ("Average pooling helps", "gain", "both", "both, last image token", RETRIEVED),
    ("Interleaved rows help image-text retrieval", "gain", "both", "both, no stories", RETRIEVED[:2]),
    ("Caption rows help interleaved retrieval", "gain", "both", "both, no captions", RETRIEVED[2:]),
    ("The position curve is flat", "flat", "both", "both", (("position, first half", "position, second half"),)),
    ("Retrieval helps answers", "gain", "both", "both", (("facts, with retrieval", "facts, without"),)),
]


def image_teacher(directory: Path, scale: float) -> Path:
    """A DINOv2 for which two pictures of one content are alike, trained unless it is there."""
    if not directory.exists():
        images, others = views(round(6000 * scale))
        save_checkpoint(*train_dinov2(images, others=others, steps=round(250 * scale) + 1)[:2], directory)
    return directory


class HeldOut:
    """What a seed is measured on, `scale` of its full size."""

    def __init__(self, folder: Path, seed: int, scale: float):
        def size(count: int) -> int:
            return max(2, round(count * scale))

        images, texts = image_text_pairs(load_world("captions", "test", size(320), seed=seed))
        told, documents = held_out_stories(seed, size(30)), held_out_documents(seed, size(8))
        pairs = load_world("winoground", "test", size(300), seed=seed)
        self.tasks = [
            Task("image_text_data", "", lambda embed, _: image_text_retrieval(embed, images, texts, ks=(1,)), []),
            Task("interleaved_data", "", lambda embed, _: interleaved_retrieval(embed, told, ks=(5,)), []),
            Task("interleaved_data", "", lambda embed, _: recall(embed, documents, ks=(1,)), []),
            Task("winoground_data", "", lambda embed, _: winoground(embed, pairs), []),
        ]
        rows = load_world("conversations", "test", size(400), seed=seed)
        describe = [messages[0]["content"][1]["text"] == DESCRIBE for messages in rows["messages"]]
        self.generated = {
            name: rows.select([n for n, each in enumerate(describe) if each == wanted])
            for name, wanted in zip(GENERATED, (True, False))
        }
        # the first question about a scene and its answer are known, the second is asked
        facts, sources = load_world("facts", "test", size(150), seed=seed), {}
        for place, name in enumerate(("knowledge", "questions")):
            sources[name] = str(folder / f"{name}.parquet")
            Dataset.from_list(
                [
                    {
                        **row,
                        "messages": row["messages"][2 * place :][:2],
                        "images": [row["images"][place]],
                        "id": f"{name}:{n}",
                    }
                    for n, row in enumerate(facts)
                ],
                features=facts.features,
            ).to_parquet(sources[name])
        write_webqa(folder / "webqa", size(60), seed)
        self.benchmarks = load_benchmarks({"rag": sources, "webqa": {"path": str(folder / "webqa")}})

    def retrieval(self, results: dict) -> dict[str, float]:
        names = ("image_to_text_recall@1", "text_to_image_recall@1", "context_unseen_recall@5", "documents_recall@1")
        values = [results[name].value for name in (*names, "orders_recall@1", "group_score")]
        return dict(zip((*RETRIEVED, "winoground"), values))

    def labels(self, encoder: TripleEncoder, **settings) -> dict[str, float]:
        return self.retrieval(label_ceilings(self.tasks, encoder, **settings))

    def measure(self, trainer: SugarTrainer, generated: bool, helped: bool) -> dict[str, float]:
        model, processor = trainer.model.eval(), trainer.processing_class
        embed = SugarEmbedder(model, processor, project=trainer.args.structure_weight > 0)
        generate = SugarGenerator(model, processor)
        figures = self.retrieval(run_tasks(self.tasks, embed, None))
        if generated:
            figures |= {
                name: exact_match(generate, rows)["exact_match"].value for name, rows in self.generated.items()
            }
        if helped:
            rag = self.benchmarks["rag"].run(embed, generate)
            figures["facts, with retrieval"] = rag["exact_match_with_retrieval"].value
            figures["facts, without"] = rag["exact_match_without_retrieval"].value

            def choose(rows) -> list[str]:
                return ["yes" if share > 0.5 else "no" for share in generate.choose(rows, "yes", "no")]

            at = [result.value for result in list(self.benchmarks["webqa"].run(embed, choose).values())[:6]]
            figures["position, first half"], figures["position, second half"] = np.mean(at[:3]), np.mean(at[3:])
            figures |= {f"position {n}": value for n, value in enumerate(at, 1)}
        return figures


def train(rows: Dataset, seed: int, folder: Path, **changes) -> SugarTrainer:
    """One pass over rows whose batches are laid out."""
    settings = {**WORLD_TRAINING, "logging_strategy": "no", "disable_tqdm": True, "dataloader_num_workers": 0}
    settings |= {
        "max_steps": len(rows) // BATCH_SIZE,
        "train_sampling_strategy": "sequential",
        "singles_per_sample": 2,
    }
    settings |= {"per_device_train_batch_size": BATCH_SIZE, "warmup_steps": 0.06, "seed": seed, **changes}
    trainer = SugarTrainer(
        str(checkpoint("llava")),
        SugarTrainingConfig(str(folder), **settings),
        train_dataset=rows,
        peft_config=LoraConfig(**WORLD_LORA | {"r": 32, "lora_alpha": 64}),
    )
    trainer.train()
    return trainer


def verdict(kind: str, ours: list[float], others: list[float], chance: tuple[float, float]) -> tuple[str, str, str]:
    """Mean difference, its interval, and what follows by the rule above."""
    differences = np.subtract(ours, others)
    if len(differences) < 3:
        return f"{differences.mean():+.1f}", "", "not testable"
    half = T_975[len(differences)] * differences.std(ddof=1) / len(differences) ** 0.5
    low, high = differences.mean() - half, differences.mean() + half
    means = np.mean(ours), np.mean(others)
    if all(mean < floor + 3 for mean, floor in zip(means, chance)) or min(means) > 97:
        word = "not testable"
    elif kind == "flat":
        word = "reproduced" if -5 < low and high < 5 else "undecided" if low < 0 < high else "refuted"
    elif kind == "kept":
        word = "reproduced" if low > -3 else "refuted" if high < 0 else "undecided"
    else:
        word = "reproduced" if low > 0 else "refuted" if high < 0 else "no difference seen"
    return f"{differences.mean():+.1f}", f"{low:+.1f} to {high:+.1f}", word


def table(cells: dict[str, dict[int, dict[str, float]]]) -> None:
    """Print the claims, of the seeds that both of their settings have, and the figures of every setting."""
    print(
        "| claim | task | with it | without | seeds | difference | 95% interval | verdict |\n|---|---|---|---|---|---|---|---|"
    )
    for claim, kind, ours, others, tasks in CLAIMS:
        seeds = sorted(cells.get(ours, {}).keys() & cells.get(others, {}).keys())
        for task in tasks if seeds else ():
            names = task if isinstance(task, tuple) else (task, task)
            sides = [[cells[cell][seed][name] for seed in seeds] for cell, name in zip((ours, others), names)]
            result = verdict(kind, *sides, tuple(CHANCE.get(name, 0.0) for name in names))
            left, right = (
                f"{cell if names[0] == names[1] else name}: {np.mean(side):.1f}"
                for cell, name, side in zip((ours, others), names, sides)
            )
            what = names[0] if names[0] == names[1] else names[0].split(",")[0]
            print("|", " | ".join([claim, what, left, right, str(len(seeds)), *result]), "|")
    columns = (*RETRIEVED, "winoground", *GENERATED)
    print(f"\n| setting | seeds | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}")
    for name, seeds in cells.items():
        values = [[figures[column] for figures in seeds.values() if column in figures] for column in columns]
        print(f"| {name} | {len(seeds)} | {' | '.join(f'{np.mean(v):.1f}' if v else '' for v in values)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*LABELS, *SETTINGS]
    parser.add_argument(
        "--cells", nargs="*", default=names, choices=names, metavar="NAME", help="none: only the table"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--scale", type=float, default=1.0, help="of batches, teacher's steps and test sets")
    parser.add_argument("--output", type=Path, default=Path("runs/claims"))
    args = parser.parse_args()
    disable_progress_bars()

    def file(name: str, seed: int) -> Path:
        return args.output / "cells" / f"{name.replace(', ', '_').replace(' ', '-')}-{seed}.json"

    wanted = [
        (name, seed)
        for seed in args.seeds
        for name in args.cells
        if not file(name, seed).exists() and (name in SETTINGS or seed == args.seeds[0])
    ]
    if wanted:
        batches = {kind: max(1, round(count * args.scale)) for kind, count in BATCHES.items()}
        image = str(image_teacher(args.output / "dinov2", args.scale))
        clip = str(checkpoint("clip"))
        encoders = {
            "triple": TripleEncoder.from_teachers({**world_teachers(), "image": image}),
            "clip": TripleEncoder.from_teachers({"cross": clip}),
        }
        plain = training_rows(batches, BATCH_SIZE)
        rows = {
            name: add_teacher_embeddings(plain, encoder, args.output / f"teacher_cache_{name}")
            for name, encoder in encoders.items()
        }
    measured = None
    for name, seed in wanted:
        started = time.monotonic()
        if measured != seed:
            tests, measured = HeldOut(args.output / "tests", seed, args.scale), seed
        changes = dict({**LABELS, **SETTINGS}[name])
        teachers, without = changes.pop("teachers", "triple"), changes.pop("without", None)
        if name in LABELS:
            figures = tests.labels(encoders[teachers], **changes)
        else:
            chosen = in_turns(rows[teachers], batches, BATCH_SIZE, seed, without)
            trainer = train(chosen, seed, args.output / "run", **changes)
            figures = tests.measure(trainer, generated=name in ("both", "SFT"), helped=name == "both")
        with replacing(file(name, seed)) as path:
            path.write_text(json.dumps(figures, indent=2) + "\n")
        print(f"{name}, seed {seed}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    cells = {}
    for name in names:
        found = {seed: file(name, seed) for seed in args.seeds if file(name, seed).exists()}
        if found:
            cells[name] = {seed: json.loads(path.read_text()) for seed, path in found.items()}
    table(cells)


if __name__ == "__main__":
    main()
