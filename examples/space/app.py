"""A page that searches pictures and answers questions about them, with one model. See README.md for its variables."""

import os
from pathlib import Path


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

import torch
from peft import LoraConfig

from hf_sugar import (
    SugarEmbedder,
    SugarForConditionalGeneration,
    SugarIndex,
    SugarProcessor,
    SugarRAG,
    SugarTrainer,
    SugarTrainingConfig,
)
from hf_sugar.data import load_data
from hf_sugar.evaluation.plots import plot_alignment
from hf_sugar.retrieval.app import build_page, launch
from hf_sugar.world import checkpoint, load_world, world_teachers


MODEL, DATA = os.environ.get("SUGAR_MODEL"), os.environ.get("SUGAR_DATA")
STEPS = int(os.environ.get("SUGAR_STEPS", "100"))


def train_tiny_model(directory: str = "tiny-sugar") -> str:
    """Where no model is named: a tiny one, trained on captioned pictures of the rendered world."""
    if not Path(directory, "config.json").exists():
        settings = {"max_steps": STEPS, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "retrieval_dim": 128}
        settings |= {"gradient_checkpointing": False, "bf16": False, "report_to": [], "save_strategy": "no"}
        trainer = SugarTrainer(
            model=str(checkpoint("llava")),
            args=SugarTrainingConfig(output_dir=directory, teachers=world_teachers(), **settings),
            train_dataset=load_world("captions", "train", 1000),
            peft_config=LoraConfig(r=64, lora_alpha=128, target_modules="all-linear"),
        )
        trainer.train()
        trainer.save_model()
    return directory


def make_page():
    """The page of the model and the rows that the variables name."""
    name = MODEL or train_tiny_model()
    model = SugarForConditionalGeneration.from_pretrained(name).to("cuda" if torch.cuda.is_available() else "cpu")
    embed = SugarEmbedder(model.eval(), SugarProcessor.from_pretrained(name), progress=True)
    rows = load_data(DATA, "test") if DATA else load_world("captions", "test", 100)
    rag = SugarRAG(model, embed.processor, SugarIndex.build(rows, embed), k=1)
    return build_page(rag, Path(name).name, 4, plot_alignment)


if __name__ == "__main__":
    launch(make_page(), "0.0.0.0", 7860, "10mb")
