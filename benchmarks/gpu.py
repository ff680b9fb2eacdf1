"""
What only a GPU can tell, in one run of under 10 minutes and without a network: the compiled alignment kernel against
PyTorch, QLoRA steps of a 7B model with their peak memory against `--estimate-memory`, a step of SugarTrainer against one of
TRL's SFTTrainer, packed against padded batches, embedding, generation. The model has LLaVA-1.5-7B's configuration and random
weights, which are made on the GPU.

    make gpu                                  # python benchmarks/gpu.py --output gpu.json
    python benchmarks/gpu.py --parts kernels qlora
    python benchmarks/gpu.py --dry            # tiny sizes on the CPU, only to see that it runs

One table is printed and, with the name of the GPU, written as JSON. When a part fails the others go on; the exit status is 1
if one did, or a value is wrong.
"""

import argparse
import gc
import json
import math
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import torch
from alignment import inputs_of
from peft import LoraConfig
from prepare import full_teachers
from train_step import llava, rows
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration, TrainerCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from hf_sugar import (
    SugarConfig,
    SugarEmbedder,
    SugarForConditionalGeneration,
    SugarProcessor,
    SugarTrainer,
    SugarTrainingConfig,
)
from hf_sugar.alignment import packed_alignment_kernel
from hf_sugar.memory import estimate_memory


GIB = 2**30
LORA = {"r": 128, "lora_alpha": 256, "target_modules": ["q_proj", "v_proj"]}


class Clock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.start = now()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(now() - self.start)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def least(function, repeats: int = 3) -> float:
    """Seconds of the fastest of some calls, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = now()
        function()
        times.append(now() - start)
    return min(times[1:])


class Bench:
    """The sizes, what is made once, and what has been found."""

    def __init__(self, directory: Path, dry: bool):
        self.directory, self.dry, self.found = directory, dry, []
        self.device = torch.device("cpu" if dry else "cuda")
        self.image_size = 28 if dry else 336
        self.data = rows(16 if dry else 64, self.image_size)
        self.path = str(directory / "llava")
        llava(argparse.Namespace(hidden=64, layers=2, image_size=self.image_size), Path(self.path))
        if not dry:
            self.make_7b()
        teachers = full_teachers(
            directory / "teachers", layers=1
        )  # the width of embeddings counts here, not what they say
        self.common = {"report_to": "none", "disable_tqdm": True, "use_cpu": dry, "bf16": not dry, "max_steps": 4}
        self.common |= {"save_strategy": "no", "logging_steps": 1, "max_length": None}
        self.sugar = {"teachers": teachers, "teacher_cache_dir": str(directory / "cache")}

    def make_7b(self):
        tokens, config = LlavaConfig.from_pretrained(self.path), LlavaConfig()  # LLaVA-1.5-7B's
        config.text_config.vocab_size, config.image_token_id = tokens.text_config.vocab_size, tokens.image_token_id
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config.text_config, name, getattr(tokens.text_config, name))
        torch.manual_seed(0)
        with self.device:
            model = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(self.path)

    def add(self, what: str, value: float, unit: str, wrong: bool = False):
        self.found.append({"what": what, "value": value, "unit": unit, "wrong": bool(wrong)})
        print(f"{what}: {value:.4g} {unit}{' WRONG' if wrong else ''}", flush=True)

    def trainer(self, sugar: bool = True, **settings):
        settings = {**self.common, "model_init_kwargs": {"dtype": "bfloat16"}, **settings}
        if sugar:
            kind, args = SugarTrainer, SugarTrainingConfig(str(self.directory / "run"), **self.sugar, **settings)
        else:
            kind, args = SFTTrainer, SFTConfig(str(self.directory / "run"), **settings)
        return kind(self.path, args, train_dataset=self.data, peft_config=LoraConfig(**LORA))

    def steps(self, what: str, trainer) -> tuple[float, float]:
        """Train a little. Adds seconds, peak and loss; returns the loss and the peak in GiB."""
        clock = Clock()
        trainer.add_callback(clock)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        peak = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else math.nan
        loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        self.add(f"{what}: a step", min(clock.seconds[1:]), "s")
        self.add(f"{what}: peak", peak, "GiB")
        self.add(f"{what}: loss of the first step", loss, "", wrong=not math.isfinite(loss))
        return loss, peak


def kernels(bench: Bench):
    for case in ["8x4x64"] if bench.dry else ["64x8x1536", "256x8x1536", "64x64x1536:4", "512x16x1536"]:
        inputs = {k: v.to(bench.device) if isinstance(v, torch.Tensor) else v for k, v in inputs_of(case).items()}
        precise = {**inputs, "embeddings": inputs["embeddings"].double()}
        exact = packed_alignment_kernel(**precise, normalize="self+count", backend="torch")
        for tf32 in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            for backend in ("torch", "auto"):
                name = (
                    f"kernel {case}, {'PyTorch' if backend == 'torch' else 'compiled'}, TF32 {'on' if tf32 else 'off'}"
                )
                compute = partial(packed_alignment_kernel, **inputs, normalize="self+count", backend=backend)
                value = compute()
                error = (value.double() - exact).abs().max().item()
                bench.add(name, 1e3 * least(compute, 10), "ms")
                bench.add(f"{name}: error", error, "", wrong=not error < (2e-2 if tf32 else 1e-3))
    torch.backends.cuda.matmul.allow_tf32 = False


def qlora(bench: Bench):
    # bitsandbytes has other kernels on the CPU, and its own tests there (tests/test_qlora.py)
    quantized = {} if bench.dry else {"load_in_4bit": True, "optim": "paged_adamw_8bit"}
    for batch, matrix in [(2, 4)] if bench.dry else [(1, 64), (4, 64), (8, 64)]:
        settings = {"per_device_train_batch_size": batch, "matrix_batch_size": matrix, **quantized}
        trainer = bench.trainer(**settings, gradient_accumulation_steps=matrix // batch)
        trainer.args.max_steps = 2
        length = max(
            len(trainer.data_collator([row])["input_ids"][0]) for row in trainer.train_dataset.select(range(4))
        )
        _, peak = bench.steps(f"QLoRA, batch {batch}, matrix {matrix}, {length} tokens", trainer)
        trainer.args.max_length = length
        config = SugarConfig.from_pretrained(bench.path, retrieval_dim=trainer.args.retrieval_dim)
        base = trainer.model.get_base_model()
        quantization = getattr(base.config, "quantization_config", None)
        estimate = estimate_memory(config, trainer.args, LoraConfig(**LORA), quantization, dtype=torch.bfloat16)
        bench.add(f"QLoRA, batch {batch}: estimated without the reserve", estimate.total / GIB - 1, "GiB")
        bench.add(f"QLoRA, batch {batch}: estimated / measured", (estimate.total / GIB - 1) / peak, "")
        del trainer, base
        free()


def lora(bench: Bench):
    for batch in [2] if bench.dry else [4, 8]:
        for name, sugar in (("Sugar", True), ("TRL SFT", False)):
            bench.steps(f"LoRA, batch {batch}, {name}", bench.trainer(sugar, per_device_train_batch_size=batch))
            free()


def packed(bench: Bench):
    losses = []
    for name, settings in (("padded", {}), ("packed", {"padding_free": True})):
        trainer = bench.trainer(per_device_train_batch_size=2 if bench.dry else 8, **settings)
        losses.append(bench.steps(f"LoRA, {name}", trainer)[0])
        del trainer
        free()
    difference = abs(losses[0] - losses[1]) / losses[0]
    bench.add("packed against padded: loss, relative difference", difference, "", wrong=not difference < 2e-2)


@torch.no_grad()
def embed(bench: Bench):
    model = SugarForConditionalGeneration.from_pretrained(bench.path, dtype=torch.bfloat16).to(bench.device)
    processor = SugarProcessor.from_pretrained(bench.path)
    items = [row["images"][0] for row in bench.data]
    for batch in [4] if bench.dry else [16, 64]:
        embedder = SugarEmbedder(model, processor, batch_size=batch)
        bench.add(f"embedding images, batch {batch}", len(items) / least(partial(embedder, items), 2), "images / s")


@torch.no_grad()
def generate(bench: Bench):
    model = SugarForConditionalGeneration.from_pretrained(bench.path, dtype=torch.bfloat16).to(bench.device)
    processor, row = AutoProcessor.from_pretrained(bench.path), bench.data[0]
    content = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": "what is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    ).to(bench.device, torch.bfloat16)
    settings = {"max_new_tokens": 8 if bench.dry else 64, "do_sample": False}
    tokens = {}
    for name, called in (("Sugar", model), ("its backbone", model.vlm)):
        tokens[name] = called.generate(**inputs, **settings)
        bench.add(f"generate, {name}", least(partial(called.generate, **inputs, **settings), 2), "s")
    bench.add(
        "generate: tokens that differ",
        float((tokens["Sugar"] != tokens["its backbone"]).sum()),
        "",
        wrong=not torch.equal(*tokens.values()),
    )


PARTS = {part.__name__: part for part in (kernels, embed, generate, lora, packed, qlora)}


def free():
    gc.collect()
    torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("There is no GPU here. `--dry` shows on the CPU that the script runs.")
    logging.set_verbosity_error()
    began, failed = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), args.dry)
        for name in args.parts:
            try:
                PARTS[name](bench)
            except Exception as error:
                traceback.print_exc()
                failed[name] = f"{type(error).__name__}: {error}"
            free()
    machine = "CPU, dry run" if args.dry else torch.cuda.get_device_name()
    print(f"\n{machine}, torch {torch.__version__}\n\n| what | value | |\n|---|---|---|")
    for row in bench.found:
        print(f"| {row['what']} | {row['value']:.4g} {row['unit']} | {'WRONG' if row['wrong'] else ''} |")
    for name, error in failed.items():
        print(f"| {name} | failed | {error.splitlines()[0]} |")
    seconds = time.perf_counter() - began
    print(f"\nthe whole: {seconds:.0f} s")
    content = {
        "machine": machine,
        "torch": torch.__version__,
        "seconds": seconds,
        "found": bench.found,
        "failed": failed,
    }
    args.output.write_text(json.dumps(content, indent=1))
    return int(bool(failed) or any(row["wrong"] for row in bench.found))


if __name__ == "__main__":
    sys.exit(main())
