from pathlib import Path

from trl import ModelConfig, get_peft_config, get_quantization_config

from hf_sugar.data import load_data
from hf_sugar.evaluation import embedder, generator
from hf_sugar.evaluation.plots import plot_losses
from hf_sugar.evaluation.report import EvaluationData, evaluate_tasks, write_report
from hf_sugar.training import SugarTrainer, SugarTrainingConfig

from .arguments import DataArguments, parse


def train(
    data: DataArguments,
    args: SugarTrainingConfig,
    model: ModelConfig,
    evaluation: EvaluationData | None = None,
) -> SugarTrainer:
    """
    Train, save, and where there is evaluation data measure the result and write a report into `args.output_dir`.

    Args:
        data ([`DataArguments`]):
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
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    eval_dataset = None
    if data.eval_data is not None:
        eval_dataset = load_data(data.eval_data, "validation", on_bad_row=data.on_bad_row)
    trainer = SugarTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=load_data(data.train_data, seed=args.seed, on_bad_row=data.on_bad_row),
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if evaluation is not None and evaluation.any() and trainer.is_world_process_zero():
        results = evaluate_tasks(
            evaluation,
            embedder(trainer.model, trainer.processing_class, args.per_device_eval_batch_size, progress=True),
            generator(trainer.model, trainer.processing_class, args.per_device_eval_batch_size, progress=True),
        )
        plot_losses(trainer.state.log_history, Path(args.output_dir) / "losses.png")
        table = write_report(
            args.output_dir,
            Path(args.output_dir).name,
            {"trained": results},
            {"model": vars(model)},
        )
        print(table)
    return trainer


def main(argv: list[str]) -> None:
    data, args, model, evaluation = parse(
        "train",
        (DataArguments, SugarTrainingConfig, ModelConfig, EvaluationData),
        argv,
        "Train Sugar on a LLaVA checkpoint: supervised fine-tuning with the structure loss.",
    )
    trainer = train(data, args, model, evaluation)
    if args.push_to_hub:
        trainer.push_to_hub()
