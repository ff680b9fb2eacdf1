"""
What reranking adds, on the rendered world, before and after the first hits of each search have been looked at again: by the
likelihood of the query, with the demo's model; or by "yes" and "no", with rows beside the demo's that teach them.

python benchmarks/rerank.py --seeds 0 1 2
python benchmarks/rerank.py --answers --output runs/rerank-answers

For an image the teachers find captions that come close (`mine_negatives`), for the picture of a fact those of other facts:
half of the rows are answered with "yes". A batch is twice that of the demo, so that its own rows are seen about as often.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Value, disable_progress_bars
from peft import LoraConfig

from hf_sugar import (
    SugarForConditionalGeneration,
    SugarIndex,
    SugarProcessor,
    SugarTrainer,
    SugarTrainingConfig,
    TripleEncoder,
)
from hf_sugar.cli.arguments import DataArguments
from hf_sugar.cli.demo import WORLD_LORA, WORLD_TRAINING, render_world
from hf_sugar.data import load_data
from hf_sugar.evaluation import EvaluationData, exact_match, image_text_pairs
from hf_sugar.evaluation.metrics import recall_at_k
from hf_sugar.evaluation.tasks import load_pairs, winoground
from hf_sugar.inference import SugarEmbedder, SugarGenerator
from hf_sugar.retrieval import RERANK_PROMPT, SugarReranker, mine_negatives, rag_generator, rerank_row, rerank_rows
from hf_sugar.teachers import add_teacher_embeddings
from hf_sugar.world import checkpoint, world_teachers


TOP = 10


def rows_to_rerank(captions: Dataset, facts: Dataset, encoder: TripleEncoder) -> list[Dataset]:
    """Of captions, and of facts: whether two pictures are of the same scene."""

    def embed(items):
        return F.normalize(encoder.encode(items)[:, encoder.split :], dim=-1).numpy()

    texts = [row["messages"][0]["content"][1]["text"] for row in captions.remove_columns("images")]
    index = SugarIndex.build(sorted(set(texts)), embed)
    of_captions = rerank_rows(mine_negatives(captions, index, encoder, num_candidates=20, margin=0.001))

    questions = [[image, facts[0]["messages"][0]["content"][1]["text"]] for row in facts for image in row["images"]]
    vectors = torch.from_numpy(embed([image for image, _ in questions]))
    near = vectors[0::2] @ vectors[1::2].T
    near = near.fill_diagonal_(-1).argmax(dim=1).tolist()
    rows = []
    for n, wrong in enumerate(near):
        for answer, other in (("yes", n), ("no", wrong)):
            row = rerank_row(questions[2 * n], questions[2 * other + 1], RERANK_PROMPT, answer)
            rows.append({**row, "id": f"fact {n} {answer}"})
    return [of_captions, Dataset.from_list(rows, features=Features({**of_captions.features, "id": Value("string")}))]


def train(output: Path, seed: int, rows: Dataset, steps: int, batch_size: int) -> None:
    settings = {**WORLD_TRAINING, "logging_steps": 50, "per_device_train_batch_size": batch_size, "max_steps": steps}
    trainer = SugarTrainer(
        str(checkpoint("llava")),
        SugarTrainingConfig(str(output), **{**settings, "seed": seed}),
        train_dataset=rows,
        peft_config=LoraConfig(**WORLD_LORA),
    )
    trainer.train()
    trainer.save_model()


def text_to_image(embed, reranker, source: str) -> tuple[float, float]:
    """R@1 before and after reranking; images of the same caption are right alike."""
    images, texts = image_text_pairs(load_data(source))
    images = [images[n] for n in range(len(images))]
    right = [{n for n, other in enumerate(texts) if other == text} for text in texts]
    scores = embed(texts) @ embed(images).T
    top = np.argsort(-scores, axis=1)[:, :TOP]
    pairs = [(text, images[n]) for text, row in zip(texts, top, strict=True) for n in row]
    again = np.full_like(scores, -1)
    np.put_along_axis(again, top, reranker.score(pairs).reshape(top.shape), axis=1)
    return tuple(100 * float(np.mean(recall_at_k(each, right, [1])[1])) for each in (scores, again))


def winoground_again(reranker, rows: Dataset) -> dict[str, float]:
    pairs = [(row[f"caption_{c}"], row[f"image_{i}"]) for row in rows for c in (0, 1) for i in (0, 1)]
    s = reranker.score(pairs).reshape(-1, 2, 2)  # row, caption, image
    text = (s[:, 0, 0] > s[:, 1, 0]) & (s[:, 1, 1] > s[:, 0, 1])
    image = (s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])
    hits = {"text_score": text, "image_score": image, "group_score": text & image}
    return {name: 100 * float(each.mean()) for name, each in hits.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--answers", action="store_true", help='teach "yes" and "no", and rerank by them')
    parser.add_argument("--steps", type=int, default=WORLD_TRAINING["max_steps"])
    parser.add_argument(
        "--output", type=Path, default=Path("runs/rerank"), help="a model that is there is not trained again"
    )
    args = parser.parse_args()
    disable_progress_bars()

    data, evaluation = DataArguments(), EvaluationData()
    facts = render_world(args.output / "world", data, evaluation)["rag"]
    encoder = TripleEncoder.from_teachers(world_teachers())
    if not (args.output / "rows").exists():
        captions, _, _, of_facts = (load_data(source) for source in data.train_data)
        for n, rows in enumerate(rows_to_rerank(captions, of_facts, encoder) if args.answers else []):
            data.train_data.append(str(args.output / f"reranking-{n}.parquet"))
            rows.to_parquet(data.train_data[-1])
        rows = add_teacher_embeddings(load_data(data.train_data), encoder, args.output / "teacher_cache")
        rows.save_to_disk(args.output / "rows")
    rows = Dataset.load_from_disk(args.output / "rows")
    print(
        f"{len(rows)} rows\n| | seed | text to image R@1 | unseen | text score | image | group | facts |\n"
        + 8 * "|---"
        + "|"
    )
    for seed in args.seeds:
        directory = args.output / f"seed-{seed}"
        if not (directory / "config.json").exists():
            train(directory, seed, rows, args.steps, 64 if args.answers else 32)
        model = SugarForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
        processor = SugarProcessor.from_pretrained(directory)
        model.config.rerank_prompt = RERANK_PROMPT if args.answers else None
        embed, reranker = SugarEmbedder(model, processor), SugarReranker(model, processor)
        figures = [text_to_image(embed, reranker, source) for source in evaluation.image_text_data.values()]
        pairs = load_pairs(evaluation.winoground_data)
        before = {name: estimate.value for name, estimate in winoground(embed, pairs).items()}
        figures += zip(before.values(), winoground_again(reranker, pairs).values(), strict=True)
        questions, generate = load_data(facts["questions"]), SugarGenerator(model, processor)
        again = TOP if args.answers else None  # a question has a picture, which has no likelihood
        index = SugarIndex.build(load_data(facts["knowledge"]), embed, by="question")
        answers = (rag_generator(generate, index), rag_generator(generate, index, rerank=again))
        figures.append([exact_match(answer, questions)["exact_match"].value for answer in answers])
        for n, name in enumerate(("searched", f"first {TOP} reranked")):
            print(f"| {name} | {seed} | " + " | ".join(f"{each[n]:.1f}" for each in figures) + " |", flush=True)


if __name__ == "__main__":
    main()
