"""
The tables of docs/memory.md and docs/scale.md: what `hf-sugar train --estimate-memory` says of LLaVA-1.5-7B, whose configuration is
made here, so that nothing is asked of the Hub. Needs bitsandbytes.

python benchmarks/memory.py
"""

import contextlib
import io
import tempfile
from pathlib import Path

from transformers import LlavaConfig
from transformers.utils import logging

from hf_sugar.cli.main import main


EXAMPLES = Path(__file__).parents[1] / "examples"


def estimate(config: Path, *settings: str) -> str:
    command = ["train", "--estimate-memory", "--model_name_or_path", str(config), *settings]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(command)
    return printed.getvalue()


def total(*arguments) -> str:
    return estimate(*arguments).split("**total** | ")[1].split()[0]


def tables(config: Path):
    qlora = config, "--config", str(EXAMPLES / "qlora_7b.yaml")
    print(estimate(*qlora, "--per_device_train_batch_size", "1"), flush=True)
    print("| batch size | tokens | float32 | bfloat16 |\n|---|---|---|---|")
    for batch in ("1", "2", "4", "8"):
        for length in ("1024", "2048"):
            sizes = "--per_device_train_batch_size", batch, "--max_length", length, "--singles_per_sample", "0"
            totals = [total(*qlora, *sizes, "--dtype", dtype) for dtype in ("float32", "bfloat16")]
            print(f"| {batch} | {length} | {' | '.join(totals)} |", flush=True)
    one = *qlora, "--per_device_train_batch_size", "1", "--max_length", "2048", "--singles_per_sample", "0"
    print("\nwithout checkpointing:", total(*one, "--gradient_checkpointing", "False"))
    print("without quantization, in bfloat16:", total(*one, "--load_in_4bit", "False", "--dtype", "bfloat16"))
    full = "--config", str(EXAMPLES / "llava_1.5_7b.yaml"), "--use_peft", "False"
    sizes = "--max_length", "2048", "--per_device_train_batch_size", "4"
    print("\nfull weights on 8 GPUs under FSDP2:\n")
    print(estimate(config, *full, *sizes, "--accelerate_config", str(EXAMPLES / "accelerate" / "fsdp2.yaml")))


if __name__ == "__main__":
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as directory:
        text = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096}
        LlavaConfig(text_config=text, architectures=["LlavaForConditionalGeneration"]).save_pretrained(directory)
        tables(Path(directory))
