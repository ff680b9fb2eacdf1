import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig
from trl import ModelConfig, get_peft_config, get_quantization_config

from hf_sugar.data import load_data
from hf_sugar.evaluation import EvaluationData, evaluate_tasks, plot_losses, write_report
from hf_sugar.inference import SugarEmbedder, SugarGenerator
from hf_sugar.memory import MemoryEstimate, estimate_memory
from hf_sugar.models import SugarConfig
from hf_sugar.training import SugarTrainer, SugarTrainingConfig
from hf_sugar.training.loading import projector_settings

from .arguments import StreamedDataArguments


@dataclass
class ModelArguments(ModelConfig):
    """[`~trl.ModelConfig`] with the paper's LoRA (rank 128, alpha 256) and QLoRA's double quantization."""

    lora_r: int = field(default=128, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=256, metadata={"help": "Alpha of LoRA."})
    use_bnb_nested_quant: bool = field(
        default=True, metadata={"help": "Whether the constants of 4-bit weights are quantized as well."}
    )


@dataclass
class EstimatedTrainingConfig(SugarTrainingConfig):
    """[`SugarTrainingConfig`] of a run elsewhere: the machine that asks need not be the one that trains."""

    def __post_init__(self, *args):
        self.use_cpu = True
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__(*args)


@dataclass
class ActionArguments:
    """What to do."""

    estimate_memory: bool = field(
        default=False, metadata={"help": "Print how much memory the run would need, and do not train."}
    )


def quantization_config(model: ModelConfig) -> BitsAndBytesConfig | None:
    """Quantization that the settings of the model ask for. 4-bit weights are computed with in bfloat16, whatever the dtype
    of the rest."""
    quantization = get_quantization_config(model)
    if model.load_in_4bit:
        quantization.bnb_4bit_compute_dtype = torch.bfloat16
    return quantization


def estimate(args: SugarTrainingConfig, model: ModelConfig) -> MemoryEstimate:
    """Memory that [`train`] would need. Of the model only its configuration is read."""
    if model.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is not set: name the checkpoint to train.")
    stored, _ = SugarConfig.get_config_dict(model.model_name_or_path, revision=model.model_revision)
    if stored.keys() <= {"model_type", "vlm_config"}:  # a plain backbone: the projector is made new
        stored = {**stored, **projector_settings(args)}
    config = SugarConfig.from_dict(stored)
    dtype = config.vlm_config.dtype if model.dtype in (None, "auto") else getattr(torch, model.dtype)
    return estimate_memory(
        config,
        args,
        get_peft_config(model),
        quantization_config(model),
        dtype=dtype or torch.float32,
        attn_implementation=model.attn_implementation,
    )


def train(
    data: StreamedDataArguments,
    args: SugarTrainingConfig,
    model: ModelConfig,
    evaluation: EvaluationData | None = None,
) -> SugarTrainer:
    """
    Train, save, and where there is evaluation data measure the result and write a report into `args.output_dir`.

    Args:
        data ([`StreamedDataArguments`]):
            What to train on.
        args ([`SugarTrainingConfig`]):
            How.
        model ([`~trl.ModelConfig`]):
            Which checkpoint, and LoRA and quantization settings.
        evaluation ([`EvaluationData`], *optional*):
            What to measure the result on.

    Returns:
        [`SugarTrainer`]: after training.
    """
    if model.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is not set: name the checkpoint to train.")
    if data.train_data is None:
        raise ValueError("`train_data` is not set: name the data to train on.")
    args = copy.copy(args)
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    args.on_bad_row = data.on_bad_row
    reading = {"seed": args.seed, "on_bad_row": data.on_bad_row, "image_root": data.image_root}
    eval_dataset = None
    if data.eval_data is not None:
        eval_dataset = load_data(data.eval_data, "validation", **reading)
    train_dataset = load_data(data.train_data, streaming=data.streaming, **reading)
    if data.streaming:  # what is read ahead is shuffled; other data are shuffled by the sampler
        train_dataset = train_dataset.shuffle(seed=args.seed)
    trainer = SugarTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model),
        quantization_config=quantization_config(model),
    )
    sources = data.train_data if isinstance(data.train_data, list) else [data.train_data]
    trainer.dataset_names = [str(source["path"] if isinstance(source, dict) else source) for source in sources]
    trainer.train(
        {"true": True, "false": False}.get(str(args.resume_from_checkpoint).lower(), args.resume_from_checkpoint)
    )
    trainer.save_model()
    if evaluation is not None and evaluation.any() and trainer.is_world_process_zero():
        trained = (trainer.model, trainer.processing_class, args.per_device_eval_batch_size)
        project, notes = args.structure_weight > 0, []
        if not project:
            notes.append(
                "The retrieval projector is not trained (`structure_weight` 0): pooled hidden states are compared instead."
            )
        embed = SugarEmbedder(*trained, project=project, progress=True)
        results = evaluate_tasks(evaluation, embed, SugarGenerator(*trained, progress=True))
        plot_losses(trainer.state.log_history, Path(args.output_dir) / "losses.png")
        table = write_report(
            args.output_dir,
            Path(args.output_dir).name,
            {"trained": results},
            {"model": vars(model), "untrained": not project, **vars(evaluation)},
            notes,
        )
        print(table)
        trainer.create_model_card()
    return trainer


def summary(trainer: SugarTrainer) -> str:
    """Where the result of a training is, how the training ended, and what can be done with it."""
    last = {}
    for entry in trainer.state.log_history:
        last.update(entry)
    found = {
        key: f"{last[key]:.4g}"
        for key in sorted(last, key=lambda key: ("recall@" in key, key.startswith("eval_"), key))
        if key.removeprefix("eval_") in ("loss", "generative_loss", "structure_loss") or "recall@" in key
    }
    path = trainer.args.output_dir
    return "\n".join(
        [
            f"The model is in {path}, trained for {trainer.state.global_step} steps.",
            "Last values: " + ", ".join(f"{key} {value}" for key, value in found.items()),
            "Next:",
            f"  hf-sugar evaluate --model_name_or_path {path} --image_text_data DATA",
            f"  hf-sugar index --model_name_or_path {path} --data DATA --index index",
            f"  hf-sugar search --model_name_or_path {path} --index index --query TEXT",
            f"  hf-sugar push {path} --repo_id USER/NAME",
        ]
    )


def main(
    data: StreamedDataArguments,
    args: SugarTrainingConfig,
    model: ModelArguments,
    evaluation: EvaluationData,
    action: ActionArguments,
) -> None:
    if action.estimate_memory:
        print(estimate(args, model).table())
        return
    trainer = train(data, args, model, evaluation)
    if trainer.is_world_process_zero():
        print(summary(trainer))
    if args.push_to_hub:
        trainer.push_to_hub()
