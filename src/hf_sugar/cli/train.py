"""Train Sugar on a LLaVA checkpoint: supervised fine-tuning with the structure loss."""

import copy
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import BitsAndBytesConfig
from trl import ModelConfig, get_peft_config, get_quantization_config

from hf_sugar.data import load_data
from hf_sugar.distributed import loaded_whole
from hf_sugar.evaluation import (
    EvaluationData,
    chance,
    kernel_settings,
    label_ceilings,
    load_tasks,
    plot_losses,
    write_report,
)
from hf_sugar.evaluation.tasks import run_tasks
from hf_sugar.inference import SugarEmbedder, SugarGenerator
from hf_sugar.memory import MemoryEstimate, estimate_memory
from hf_sugar.models import SugarConfig, SugarForConditionalGeneration
from hf_sugar.teachers import TripleEncoder
from hf_sugar.training import SugarTrainer, SugarTrainingConfig
from hf_sugar.training.loading import projector_settings

from .arguments import StreamedDataArguments, setting
from .checkpoint import CheckpointArguments


logger = logging.getLogger(__name__)


@dataclass
class ModelArguments(ModelConfig):
    """[`~trl.ModelConfig`] with the paper's LoRA (rank 128, alpha 256) and QLoRA's double quantization."""

    lora_r: int = setting("Rank of LoRA.", 128)
    lora_alpha: int = setting("Alpha of LoRA.", 256)
    use_bnb_nested_quant: bool = setting("Whether the constants of 4-bit weights are quantized as well.", True)


@dataclass
class TrainArguments(SugarTrainingConfig):
    """[`SugarTrainingConfig`], also of a run that is elsewhere."""

    estimate_memory: bool = setting("Print how much memory the run would need, and do not train.", False)
    accelerate_config: str | None = setting("With `estimate_memory`: the `--config_file` of the launch.", None)

    def __post_init__(self, *args):
        if self.estimate_memory:  # the machine that asks need not be the one that trains
            self.use_cpu = True
            self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__(*args)


def quantization_config(model: ModelConfig) -> BitsAndBytesConfig | None:
    """Quantization that the settings ask for. 4-bit weights are computed with in bfloat16, whatever the dtype of the rest."""
    quantization = get_quantization_config(model)
    if model.load_in_4bit:
        quantization.bnb_4bit_compute_dtype = torch.bfloat16
    return quantization


def estimate(args: SugarTrainingConfig, model: ModelConfig) -> MemoryEstimate:
    """Memory that [`train`] would need. Of the model only its configuration is read."""
    stored, _ = SugarConfig.get_config_dict(model.model_name_or_path, revision=model.model_revision)
    config = SugarConfig.from_dict({**stored, **projector_settings(args, stored)})
    dtype = config.vlm_config.dtype if model.dtype in (None, "auto") else getattr(torch, model.dtype)
    processes, sharding = 1, None
    if getattr(args, "accelerate_config", None) is not None:
        launch = load_config_from_file(args.accelerate_config)
        processes = launch.num_processes
        zero, fsdp = launch.deepspeed_config.get("zero_stage"), launch.fsdp_config.get("fsdp_version", 1)
        sharding = {"FSDP": f"fsdp{fsdp}", "DEEPSPEED": f"zero{zero}"}.get(launch.distributed_type)
        if sharding not in (None, "fsdp2", "zero2", "zero3"):
            raise ValueError(
                f"{args.accelerate_config} is estimated with `fsdp_version: 2`, or with a `zero_stage` of 2 or 3, and no other."
            )
    return estimate_memory(
        config,
        args,
        get_peft_config(model),
        quantization_config(model),
        dtype=dtype or torch.float32,
        attn_implementation=model.attn_implementation,
        processes=processes,
        sharding=sharding,
    )


def train(
    data: StreamedDataArguments, args: TrainArguments, model: ModelArguments, evaluation: EvaluationData | None = None
) -> SugarTrainer | MemoryEstimate:
    """Train, save, and where there is evaluation data measure the result and write a report into `args.output_dir`. Returns
    the trainer, or with `estimate_memory` the estimate. A [`SugarTrainingConfig`] and a [`~trl.ModelConfig`] will do."""
    CheckpointArguments(model.model_name_or_path, model.model_revision).stored_config()
    if getattr(args, "estimate_memory", False):
        found = estimate(args, model)
        print(found.table())
        return found
    if getattr(args, "accelerate_config", None) is not None:
        raise ValueError("`accelerate_config` is for `estimate_memory`. To train by it, use `accelerate launch`.")
    idle = [f.name for f in fields(model) if f.name.startswith("lora_") and getattr(model, f.name) != f.default]
    if idle and not model.use_peft:
        logger.warning("`use_peft` is off: all weights are trained, and %s has no effect.", ", ".join(idle))
    if data.train_data is None:
        raise ValueError("`train_data` is not set: name the data to train on.")
    if args.teachers is not None and args.structure_weight > 0:
        TripleEncoder.from_teachers(args.teachers, device="cpu")  # reads no weights, and tells a wrong name at once
    args = copy.copy(args)
    loading = {name: getattr(model, name) for name in ("attn_implementation", "dtype")}
    args.model_init_kwargs = {**loading, "revision": model.model_revision, **(args.model_init_kwargs or {})}
    args.on_bad_row = data.on_bad_row
    reading = {"seed": args.seed, "on_bad_row": data.on_bad_row, "image_root": data.image_root}
    eval_dataset = load_data(data.eval_data, "validation", **reading) if data.eval_data else None
    train_dataset = load_data(data.train_data, streaming=data.streaming, **reading)
    if data.streaming:  # what is read ahead is shuffled; other data are shuffled by the sampler
        train_dataset = train_dataset.shuffle(seed=args.seed)
    # what is wrong with data that are measured afterwards shows before
    tasks = load_tasks(evaluation, on_bad_row=data.on_bad_row) if evaluation is not None and evaluation.any() else None
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
    resume = str(args.resume_from_checkpoint).lower()
    trainer.train({"true": True, "false": False}.get(resume, args.resume_from_checkpoint))
    trainer.save_model()
    if trainer.is_world_process_zero():
        if tasks is not None:
            report(trainer, model, evaluation, tasks)
        print(f"The model is in {args.output_dir}, trained for {trainer.state.global_step} steps.")
    if args.push_to_hub:
        trainer.push_to_hub()
    return trainer


def report(trainer: SugarTrainer, model: ModelConfig, evaluation: EvaluationData, tasks: list[Any]) -> None:
    """Measure what was trained, and write it down beside the model."""
    output_dir, trained = Path(trainer.args.output_dir), trainer.model
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # of which this process has a share
        with loaded_whole():
            trained = SugarForConditionalGeneration.from_pretrained(output_dir, dtype="auto").to(trainer.args.device)
    project = not trained.config.random_projector
    trained = (trained, trainer.processing_class, trainer.args.per_device_eval_batch_size)
    embed = SugarEmbedder(*trained, project=project, progress=True)
    columns, notes = {"chance": chance(tasks)}, []
    if not project:
        notes = [
            "The retrieval projector is not trained (`structure_weight` 0): pooled hidden states are compared instead."
        ]
    if trainer.encoder:
        try:
            columns["labels"] = label_ceilings(tasks, trainer.encoder, **kernel_settings(vars(trainer.args)))
        except (OSError, ValueError) as error:  # their weights need not be here, if `hf-sugar prepare` ran elsewhere
            notes.append(f"What the labels reach is not measured: {error}")
        trainer.encoder.unload()
    columns["trained"] = run_tasks(tasks, embed, SugarGenerator(*trained, progress=True))
    plot_losses({"": trainer.state.log_history}, output_dir / "losses.png")
    settings = {"model": vars(model), "untrained": not project, **vars(evaluation)}
    print(write_report(output_dir, output_dir.name, columns, settings, notes))
    trainer.create_model_card()
