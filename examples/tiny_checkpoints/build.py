"""
Builds the tiny checkpoints of the rendered world from nothing: a LLaVA and the teachers CLIP, DINOv2 and BERT.

    python examples/tiny_checkpoints/build.py --output_dir weights
    python examples/tiny_checkpoints/build.py --output_dir weights --only clip bert --clip_steps 200

The LLaVA takes its vision tower from the CLIP in the output folder, and `facts` goes on from the LLaVA there. Each is
saved as soon as it is trained, then loaded again from disk and scored. `scores.json` keeps the scores.
"""

import json
import os
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from train import pretrain_llava, save_checkpoint, train_bert, train_clip, train_dinov2
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
)
from trl import TrlParser

from hf_sugar import SugarForConditionalGeneration, SugarProcessor, SugarTrainer, SugarTrainingConfig
from hf_sugar.evaluation import exact_match, recall_at_k, winoground
from hf_sugar.inference import SugarGenerator
from hf_sugar.world import DESCRIBE, load_world
from hf_sugar.world.scenes import Scene, article, render, scenes, story


@dataclass
class BuildArguments:
    output_dir: str = field(
        default="weights", metadata={"help": "Folder that receives the checkpoints and scores.json."}
    )
    only: list[str] = field(
        default_factory=lambda: ["clip", "dinov2", "bert", "llava", "facts"],
        metadata={"help": "Which checkpoints to build; `facts` is the second stage of the LLaVA."},
    )
    scores_only: bool = field(default=False, metadata={"help": "Only score what `output_dir` holds."})
    image_size: int = field(default=32, metadata={"help": "Width and height of the images."})
    seed: int = field(default=0, metadata={"help": "Seed of data, weights and batches."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})
    scenes: int = field(default=9000, metadata={"help": "Scenes the teachers see, each with one of other words."})
    stories: int = field(default=1500, metadata={"help": "Stories the teachers see."})
    clip_steps: int = field(default=500, metadata={"help": "Steps of 256 pairs."})
    dinov2_steps: int = field(default=500, metadata={"help": "Steps of 128 images."})
    bert_steps: int = field(default=600, metadata={"help": "Steps of 128 pairs."})
    llava_steps: int = field(default=3000, metadata={"help": "Steps of 2048 tokens."})
    fact_steps: int = field(default=1000, metadata={"help": "Steps of 32 rows, two fifths of which are facts."})
    llava_rows: int = field(default=40000, metadata={"help": "Rows the LLaVA sees: conversations, stories, captions."})
    eval_size: int = field(default=500, metadata={"help": "Rows or candidates in each score."})


def paraphrases(scene: Scene) -> list[str]:
    """Other ways of saying the caption; none is the caption itself."""
    if scene.relation:
        first, second = map(article, map(str, scene.things))
        left = ("on the left", "on the right", "to the right of")
        near, far, back = left if scene.relation == "left" else ("at the top", "at the bottom", "below")
        return [
            f"{second} {back} {first}",
            f"{first} {near} and {second} {far}",
            f"{second} {far} and {first} {near}",
            f"there is {second} {back} {first}",
            f"{back} {first} there is {second}",
            f"a picture of {scene.caption}",
        ]
    swapped = " and ".join(reversed(scene.caption.split(" and ")))
    verb = "is" if scene.counts[-1] == 1 else "are"
    said = [f"there are {scene.caption}", f"a picture of {scene.caption}", f"the image shows {scene.caption}"]
    if len(scene.things) == 2:
        said += [swapped, f"there {verb} {swapped}", f"a picture of {swapped}"]
    return said


def teacher_data(args: BuildArguments) -> tuple[list, list[str], list[tuple[str, str]]]:
    """
    Images with texts, and pairs of texts that mean the same. Rows come in twos that are hard to tell apart: scenes that
    differ in the order of their words, or two steps of one story.
    """
    rng = random.Random(args.seed)
    images, texts, pairs = [], [], []
    train = [scene for scene in scenes("train") if len(scene.things) == 2]
    for scene in rng.choices(train, k=args.scenes):
        attributes = ("thing", "color", "size", "shape") if scene.relation else ("color", "size")
        swapped = [other for other in map(scene.swapped, attributes) if other != scene and other.split == "train"]
        for each in (scene, rng.choice(swapped or train)):
            images.append(each.render(rng, args.image_size))
            texts.append(rng.choice([each.caption, rng.choice(paraphrases(each))]))
            pairs.append(tuple(rng.sample([each.caption, *paraphrases(each)], 2)))
    for _ in range(args.stories):
        for sentence, placed in story("train", rng)[:2]:
            images.append(render(placed, rng, args.image_size))
            texts.append(sentence)
            pairs.append((sentence, sentence))
    for _ in range(args.stories):
        for text in rng.choice(train).question(rng):
            pairs.append((text, text))
    return images, texts, pairs


def world_rows(args: BuildArguments, count: int, shares: dict[str, float]) -> Dataset:
    kinds = [
        load_world(kind, "train", round(share * count), args.image_size, args.seed, progress=True)
        for kind, share in shares.items()
    ]
    return concatenate_datasets(kinds)


def learn_facts(directory: Path, args: BuildArguments) -> list[float]:
    """
    Teach a saved LLaVA to take an answer from an earlier turn of the conversation. It is a stage of its own, because beside
    the rest and from nothing this is not learnt in as many steps.
    """
    shares = {"facts": 0.42, "conversations": 0.5, "stories": 0.02, "captions": 0.06}
    with tempfile.TemporaryDirectory() as output_dir:
        config = SugarTrainingConfig(
            output_dir,
            structure_weight=0,
            max_steps=args.fact_steps,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            warmup_steps=30,
            train_sampling_strategy="group_by_length",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            seed=args.seed,
        )
        trainer = SugarTrainer(str(directory), config, train_dataset=world_rows(args, 12000, shares))
        trainer.train()
    model = AutoModelForImageTextToText.from_pretrained(directory)  # with its settings of generation
    model.load_state_dict(trainer.model.vlm.state_dict())
    model.half().save_pretrained(directory)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def captioned(split: str, args: BuildArguments) -> tuple[list, list[str]]:
    rows = load_world("captions", split, args.eval_size, args.image_size, args.seed)
    return [row["images"][0] for row in rows], [row["messages"][0]["content"][1]["text"] for row in rows]


def compare(queries: torch.Tensor, candidates: torch.Tensor, **names: bool) -> dict[str, float]:
    """Cosines of normalised rows that belong together and of all others, and the recall by name (`True`: reversed)."""
    similarity = queries @ candidates.T
    others = similarity[~torch.eye(len(similarity), dtype=torch.bool)]
    recall = {
        name: recall_at_k((similarity.T if turned else similarity).numpy(), range(len(similarity)), ks=(1,))[1].mean()
        for name, turned in names.items()
    }
    return {**recall, "cosine_of_pairs": similarity.diag().mean().item(), "cosine_of_others": others.mean().item()}


@torch.no_grad()
def score_clip(directory: Path, split: str, args: BuildArguments) -> dict[str, float]:
    model = AutoModel.from_pretrained(directory, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(directory)

    def embed(items: list):
        if isinstance(items[0], str):
            return model.get_text_features(**processor(text=items, padding=True, return_tensors="pt")).pooler_output
        return model.get_image_features(**processor(images=items, return_tensors="pt")).pooler_output

    def normalised(items: list):
        return torch.nn.functional.normalize(embed(items), dim=-1)

    images, texts = map(normalised, captioned(split, args))
    pairs = load_world("winoground", split, args.eval_size, args.image_size, args.seed)
    scores = winoground(lambda items: normalised(items).numpy(), pairs)
    return {
        **compare(images, texts, **{"image_to_text_R@1": False, "text_to_image_R@1": True}),
        **{f"winoground_{name.removesuffix('_score')}": figure.value / 100 for name, figure in scores.items()},
    }


@torch.no_grad()
def score_dinov2(directory: Path, split: str, args: BuildArguments) -> dict[str, float]:
    """Whether an image finds another picture of its scene, moved by at most a pixel and lit differently."""
    model = AutoModel.from_pretrained(directory, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(directory)
    rng = random.Random(args.seed)
    views = []
    for scene in random.Random(args.seed).sample(scenes(split), args.eval_size):
        placed = scene.place(rng)
        nudge = [(thing, x + 0.5 / args.image_size, y + 0.5 / args.image_size) for thing, x, y in placed]
        views.append([render(each, rng, args.image_size) for each in (placed, nudge)])
    embeddings = [
        model(**processor(images=list(images), return_tensors="pt")).last_hidden_state[:, 0]
        for images in zip(*views, strict=True)
    ]
    a, b = (torch.nn.functional.normalize(each, dim=-1) for each in embeddings)
    return compare(a, b, **{"view_R@1": False})


@torch.no_grad()
def score_bert(directory: Path, split: str, args: BuildArguments) -> dict[str, float]:
    """Whether a paraphrase finds its caption."""
    model = AutoModel.from_pretrained(directory, dtype=torch.float32, add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rng = random.Random(args.seed)
    chosen = rng.sample(scenes(split), args.eval_size)
    embeddings = [
        model(**tokenizer(texts, padding=True, return_tensors="pt")).last_hidden_state[:, 0]
        for texts in ([rng.choice(paraphrases(s)) for s in chosen], [s.caption for s in chosen])
    ]
    a, b = (torch.nn.functional.normalize(each, dim=-1) for each in embeddings)
    return compare(a, b, **{"paraphrase_R@1": False})


def score_llava(directory: Path, split: str, args: BuildArguments) -> dict[str, float]:
    """Exact match of descriptions, of the first answer about an image, and of what an earlier turn told."""
    model = SugarForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    generate = SugarGenerator(model, SugarProcessor.from_pretrained(directory))
    rows = load_world("conversations", split, 2 * args.eval_size, args.image_size, args.seed)
    rows = [{**row, "messages": row["messages"][:2]} for row in rows]
    described = [row for row in rows if row["messages"][0]["content"][1]["text"] == DESCRIBE]
    asked = [row for row in rows if row["messages"][0]["content"][1]["text"] != DESCRIBE]
    facts = load_world("facts", split, args.eval_size, args.image_size, args.seed)
    kinds = {"caption_exact": described, "vqa_exact": asked, "fact_exact": facts}
    return {name: exact_match(generate, kind)["exact_match"].value / 100 for name, kind in kinds.items()}


SCORES = {
    "clip": score_clip,
    "dinov2": score_dinov2,
    "bert": score_bert,
    "llava": score_llava,
    "facts": score_llava,
}


def build(name: str, directory: Path, args: BuildArguments) -> list[float]:
    """Trains and saves a checkpoint. Returns the losses."""
    if name == "facts":
        return learn_facts(directory, args)
    if name == "llava":
        rows = world_rows(args, args.llava_rows, {"conversations": 0.8, "stories": 0.07, "captions": 0.13})
        tower = CLIPModel.from_pretrained(directory.parent / "clip", dtype=torch.float32)
        model, processor, losses = pretrain_llava(rows, rows["images"], tower, steps=args.llava_steps, seed=args.seed)
    else:
        images, texts, pairs = teacher_data(args)
        if name == "clip":
            model, processor, losses = train_clip(images, texts, steps=args.clip_steps, block=2, seed=args.seed)
        elif name == "dinov2":
            model, processor, losses = train_dinov2(images, steps=args.dinov2_steps, seed=args.seed)
        else:
            model, processor, losses = train_bert(pairs, steps=args.bert_steps, block=2, seed=args.seed)
    save_checkpoint(model, processor, directory)
    return losses


def main(args: BuildArguments) -> None:
    torch.set_num_threads(args.threads)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "scores.json"
    for name in args.only:
        directory = output_dir / ("llava" if name == "facts" else name)
        results = json.loads(path.read_text()) if path.exists() else {}
        entry = results.setdefault(name, {})
        if not args.scores_only:
            start = time.perf_counter()
            losses = build(name, directory, args)
            entry["training"] = {
                "steps": len(losses),
                "seed": args.seed,
                "seconds": round(time.perf_counter() - start),
                "threads": args.threads,
                "final_loss": sum(losses[-20:]) / len(losses[-20:]),
            }
        entry["scores"] = {
            split: {key: round(value, 4) for key, value in SCORES[name](directory, split, args).items()}
            for split in ("test", "test_unseen")
        }
        entry["rows_scored"] = args.eval_size
        entry["bytes"] = sum(file.stat().st_size for file in directory.iterdir())
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=2) + "\n")
        os.replace(temporary, path)
        print(name, json.dumps(entry, indent=2))


if __name__ == "__main__":
    main(TrlParser(BuildArguments).parse_args_and_config()[0])
