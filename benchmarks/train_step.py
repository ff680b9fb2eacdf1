"""
A step of SugarTrainer with cached teachers against a step of TRL's SFTTrainer: the same model, the same rows and batches,
the two alternated. Also the label lookup of a batch as a share of a step, and the peak memory.

python benchmarks/train_step.py --hidden 1024 --layers 12 --batch 8 --steps 10
python benchmarks/train_step.py --hidden 64 --layers 2 --batch 2 --steps 2 --images 4   # only to see that it runs
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from hf_sugar import SugarTrainer, SugarTrainingConfig
from hf_sugar.cli.demo import world_teachers
from hf_sugar.world import checkpoint


FEATURES = Features(
    {
        "messages": [{"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}],
        "images": List(Image()),
    }
)


def rows(count: int, size: int) -> Dataset:
    random = np.random.RandomState(0)
    data = []
    for i in range(count):
        pixels = random.randint(0, 256, (size, size, 3), dtype=np.uint8)
        question = [{"type": "image", "text": None}, {"type": "text", "text": f"what is in picture {i}?"}]
        answer = [{"type": "text", "text": "a red circle left of a blue square " * 8}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        data.append({"messages": messages, "images": [PILImage.fromarray(pixels)]})
    return Dataset.from_list(data, features=FEATURES)


def llava(args, directory: Path) -> str:
    """A LLaVA of the asked size with random weights, with the tokenizer of the embedded world."""
    processor = AutoProcessor.from_pretrained(checkpoint("llava"))
    tiny = LlavaConfig.from_pretrained(checkpoint("llava"))
    vision = CLIPVisionConfig(
        hidden_size=args.hidden // 2,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        image_size=args.image_size,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        pad_token_id=tiny.text_config.pad_token_id,
        bos_token_id=tiny.text_config.bos_token_id,
        eos_token_id=tiny.text_config.eos_token_id,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tiny.image_token_id,
        image_seq_length=(args.image_size // 14) ** 2,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    print(f"LLaVA of {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters")
    model.save_pretrained(directory)
    processor.patch_size = 14
    processor.num_additional_image_tokens = 1
    processor.vision_feature_select_strategy = "default"
    size = {"height": args.image_size, "width": args.image_size}
    processor.image_processor.size, processor.image_processor.crop_size = {"shortest_edge": args.image_size}, size
    processor.save_pretrained(directory)
    return str(directory)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--image_size", type=int, default=336)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--steps", type=int, default=10, help="alternated pairs of steps, after one that is not counted"
    )
    parser.add_argument("--images", type=int, default=64, help="rows, of one image each")
    args = parser.parse_args()
    logging.set_verbosity_error()

    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        data = rows(args.images, args.image_size)
        path = llava(args, directory / "llava")
        common = {
            "per_device_train_batch_size": args.batch,
            "report_to": "none",
            "bf16": False,
            "gradient_checkpointing": False,
            "max_length": None,
            "disable_tqdm": True,
            "learning_rate": 1e-4,
        }
        sugar = SugarTrainer(
            path,
            SugarTrainingConfig(str(directory / "sugar"), teachers=world_teachers(), flip_captions=False, **common),
            train_dataset=data,
        )
        sft = SFTTrainer(path, SFTConfig(str(directory / "sft"), **common), train_dataset=data)
        trainers = {"SFT": sft, "Sugar": sugar}
        for trainer in trainers.values():
            trainer.create_optimizer_and_scheduler(100)
            trainer.current_gradient_accumulation_steps = 1
        times = {name: {"collate": [], "step": []} for name in trainers}
        lookup = []
        for step in range(args.steps + 1):
            chosen = [data[(step * args.batch + n) % len(data)] for n in range(args.batch)]
            for name in ("SFT", "Sugar") if step % 2 else ("Sugar", "SFT"):
                trainer = trainers[name]
                started = time.perf_counter()
                batch = trainer.data_collator(chosen)
                collated = time.perf_counter()
                trainer.model.train()
                trainer.training_step(trainer.model, batch)
                trainer.optimizer.step()
                trainer.model.zero_grad()
                times[name]["collate"].append(collated - started)
                times[name]["step"].append(time.perf_counter() - collated)
            slices = [row["images"][0] for row in chosen]
            slices += [
                part["text"] for row in chosen for m in row["messages"] for part in m["content"] if part["text"]
            ]
            started = time.perf_counter()
            sugar.data_collator.embed_slices(slices)
            lookup.append(time.perf_counter() - started)

        print(
            f"\n| batch {args.batch} | collate (s) | forward, backward, update (s) | together (s) |\n|---|---|---|---|"
        )
        together = {}
        for name, parts in times.items():
            both = [a + b for a, b in zip(parts["collate"], parts["step"])][1:]
            together[name] = both
            medians = [statistics.median(values[1:]) for values in parts.values()] + [statistics.median(both)]
            print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in medians) + " |")
        ratio = statistics.median(a / b for a, b in zip(together["Sugar"], together["SFT"]))
        milliseconds = 1000 * statistics.median(lookup[1:])
        share = statistics.median(lookup[1:]) / statistics.median(together["Sugar"])
        print(f"\nSugar / SFT, median over pairs of steps: {ratio:.3f}")
        print(f"label lookup of a batch ({len(slices)} slices): {milliseconds:.1f} ms, {100 * share:.2f}% of a step")
        print(f"peak memory of the process, both models with their optimizers: {peak():.2f} GiB")


if __name__ == "__main__":
    main()
