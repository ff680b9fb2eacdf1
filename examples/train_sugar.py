"""
Train Sugar on a LLaVA checkpoint.

python examples/train_sugar.py --config examples/llava_1.5_7b.yaml
accelerate launch --config_file examples/accelerate/multi_gpu.yaml examples/train_sugar.py --config examples/llava_1.5_7b.yaml

Every setting of the YAML file can also be given, or overridden, on the command line.
"""

from trl import TrlParser, get_peft_config

from hf_sugar import SugarTrainer, SugarTrainingConfig
from hf_sugar.cli.arguments import DataArguments
from hf_sugar.cli.train import ModelArguments, quantization_config
from hf_sugar.data import load_data


if __name__ == "__main__":
    parser = TrlParser((DataArguments, SugarTrainingConfig, ModelArguments))
    data, args, model = parser.parse_args_and_config()
    args.on_bad_row = data.on_bad_row
    args.model_init_kwargs = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}

    trainer = SugarTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=load_data(data.train_data, seed=args.seed),
        eval_dataset=load_data(data.eval_data, "validation") if data.eval_data else None,
        peft_config=get_peft_config(model),
        quantization_config=quantization_config(model),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub()
