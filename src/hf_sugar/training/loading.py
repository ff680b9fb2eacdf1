"""How a model comes into the trainer. Whatever it is given as, it leaves as a Sugar model, or as a PEFT model around one,
that can be trained and whose result loads in one line; or it is refused."""

import copy
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, BitsAndBytesConfig, PreTrainedModel, ProcessorMixin
from trl.trainer.utils import create_model_from_path

from hf_sugar.models import SugarConfig, SugarForConditionalGeneration, SugarProcessor
from hf_sugar.models.adapter_sugar import PEFT_PREFIX, check_peft_config
from hf_sugar.models.fingerprint_sugar import fingerprint

from .config import SugarTrainingConfig


logger = logging.getLogger(__name__)


def require_vision(model: Any, revision: str | None = None) -> None:
    """Refuse, with a `TypeError`, what is no image-text-to-text model, given as a model, a directory or a Hub id."""
    if isinstance(model, PeftModel):
        base = model.get_base_model()
        if not isinstance(base, SugarForConditionalGeneration):
            raise TypeError(
                f"The {type(base).__name__} below the adapters has no retrieval projector. Pass it alone, with `peft_config`."
            )
    elif isinstance(model, str):
        stored, _ = SugarConfig.get_config_dict(model, revision=revision)
        backbone = SugarConfig.from_dict(stored).vlm_config
        if type(backbone) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise TypeError(f"{model} is a {backbone.model_type}, not an image-text-to-text model such as LLaVA.")
    elif not isinstance(model, SugarForConditionalGeneration):
        known = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(getattr(model, "config", None)), ())
        if not isinstance(model, known):
            raise TypeError(f"`model` is a {type(model).__name__}, not an image-text-to-text model such as LLaVA.")


def load_model(
    name: str, args: SugarTrainingConfig, quantization_config: BitsAndBytesConfig | None = None
) -> SugarForConditionalGeneration:
    """Load a plain backbone, a full Sugar checkpoint or an adapter repository as TRL loads models, quantized as is given or as
    `args.load_in_4bit` says; a projector that it lacks is made new."""
    kwargs = dict(args.model_init_kwargs or {})
    if quantization_config is None and args.load_in_4bit:
        quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            # FSDP divides floating weights alone, and leaves others whole on each device
            bnb_4bit_quant_storage=torch.bfloat16 if parse_flag_from_env("ACCELERATE_USE_FSDP") else torch.uint8,
        )
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED", "FSDP"):
        kwargs["device_map"] = None
    stored, _ = SugarConfig.get_config_dict(name, revision=kwargs.get("revision"))
    kwargs = {**projector_settings(args, stored), **kwargs}
    return create_model_from_path(name, SugarForConditionalGeneration, **kwargs)


def load_processor(
    processor: ProcessorMixin | None, name: str, args: SugarTrainingConfig, revision: str | None = None
) -> SugarProcessor:
    """The processor as the trainer needs it: a copy of the one that is given, or the one saved with the model. A `TypeError` or
    `ValueError` if there is none, or it cannot pad or read images."""
    if processor is None:
        if not name:
            raise ValueError("The model has no name to load a processor by: pass it as `processing_class`.")
        processor = SugarProcessor.from_pretrained(name, revision=revision)
    elif not isinstance(processor, ProcessorMixin):
        raise TypeError(f"`processing_class` is a {type(processor).__name__}. Pass the processor of the model.")
    processor = SugarProcessor.from_processor(copy.deepcopy(processor))
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = args.pad_token or tokenizer.eos_token  # as TRL does
        if tokenizer.pad_token is None:
            raise ValueError("The tokenizer has neither a padding nor an end-of-sequence token: set its `pad_token`.")
        logger.info("The tokenizer has no padding token; %r is used and saved as such.", tokenizer.pad_token)
    if "patch_size" in vars(processor) and processor.patch_size is None:
        raise ValueError("The processor has no `patch_size`: set it to `model.config.vision_config.patch_size`.")
    return processor


def enter(
    model: PreTrainedModel | PeftModel, args: SugarTrainingConfig, peft_config: PeftConfig | None = None
) -> PreTrainedModel | PeftModel:
    """A model, as it was loaded or is given, made ready for the trainer: a plain backbone is wrapped; an adapter that came with a
    Sugar model is gone on with, or merged if a `peft_config` is going to be added. A `TypeError` or `ValueError` if it cannot be
    trained, or what would be saved could not be loaded."""
    if peft_config is not None:
        check_peft_config(peft_config)
    if isinstance(model, PeftModel):
        base = model.get_base_model()
        if peft_config is not None:
            raise ValueError("`model` has an adapter: merge it (`merge_and_unload`), or leave out `peft_config`.")
    else:
        if not isinstance(model, SugarForConditionalGeneration):
            model = SugarForConditionalGeneration.from_vlm(model, **projector_settings(args))
        base = model
        if any(module.disable_adapters for _, module in base._adapter_modules()):
            raise ValueError("The adapter of `model` is switched off: call its `enable_adapters` first.")
        if base._active_adapter() is not None and peft_config is None:
            model = _go_on(base)
        elif base._active_adapter() is not None:
            backbone = Path(args.output_dir, "backbone").absolute()
            if Path(base.backbone_source()[0]).absolute() == backbone:
                raise ValueError(f"`output_dir`: {backbone} is the adapter's own backbone. Choose another directory.")
            base.merge_and_unload()
            logger.info("The adapter of the model is merged into it, because `peft_config` adds a new one.")

    if peft_config is None and isinstance(model, PeftModel):
        check_peft_config(model.peft_config[base._active_adapter()])
        if not isinstance(base.retrieval_projector, ModulesToSaveWrapper):
            raise ValueError("The adapter lacks the projector: add `modules_to_save=['retrieval_projector']`.")
    elif peft_config is None and is_quantized(base):
        raise ValueError("The weights are quantized, and cannot be trained: pass `peft_config` to train an adapter.")
    if args.freeze_vision_tower:
        freeze_vision_tower(base)
    if peft_config is None and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("No weight of `model` requires_grad: load its adapter with `is_trainable`.")

    for module in (model, base, base.vlm):
        forget_preparation(module)
    if not hasattr(base.vlm, "_hf_hook"):  # by which accelerate spreads a model over devices
        vars(base.vlm).pop("forward", None)  # of another trainer that had the backbone
    return model


def _go_on(model: SugarForConditionalGeneration) -> PeftModel:
    """The adapter that a model was loaded with, as PEFT trains it."""
    adapter = model._active_adapter()
    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = False
    weights = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    weights = {PEFT_PREFIX + name: weight.clone() for name, weight in weights.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the model has an adapter: it is made anew in the same layers
        model = get_peft_model(model, config, adapter_name=adapter)
    set_peft_model_state_dict(model, weights, adapter)
    return model


def save_backbone(base: SugarForConditionalGeneration, directory: Path, main_process: bool) -> None:
    """Save a model without adapter whose weights lie nowhere (merged, or changed since it was loaded), because an adapter names
    the place of its backbone."""
    base.save_pretrained(directory, is_main_process=main_process)
    base.config.name_or_path = base.name_or_path = str(directory)
    base.config._commit_hash = None
    base._loaded_from = str(directory), fingerprint(base.vlm)
    logger.info("The weights that the adapter is for lie nowhere else: they are saved in %s.", directory)


def require_loadable(base: SugarForConditionalGeneration) -> None:
    """Refuse, with a `ValueError`, an adapter whose backbone nobody could load, before it is trained."""
    if not base.backbone_source()[0]:
        raise ValueError(
            "The weights below the adapter lie nowhere: save the model without it, and leave `init_lora_weights` plain."
        )
    if isinstance(base.get_output_embeddings(), TrainableTokensWrapper):
        # TRL 1.16's fused head reads the bias of a linear layer
        raise ValueError("`trainable_token_indices` cannot be trained where embeddings are tied to the LM head.")


def freeze_vision_tower(base: SugarForConditionalGeneration) -> None:
    """Train nothing of the vision tower. A `ValueError` where transformers does not know which module that is."""
    tower = base.vlm.get_encoder(modality="image")
    if any(module is tower for module in (base.vlm, base.base_model)):
        raise ValueError(
            f"`freeze_vision_tower`: that of {type(base.vlm).__name__} is not known. Freeze it yourself, and pass the model."
        )
    tower.requires_grad_(False)


def is_quantized(base: SugarForConditionalGeneration) -> bool:
    """Whether a Sugar model, or the backbone that was wrapped, has quantized weights."""
    return any(getattr(module, "is_quantized", False) for module in (base, base.vlm))


def forget_preparation(model: PreTrainedModel) -> None:
    """Take back what accelerate did to a model for another trainer, or for an evaluation. From 1.14 on (seen in 1.15) it
    returns a model that it has prepared once as it is: without DDP, and in the precision of that time."""
    vars(model).pop("_is_accelerate_prepared", None)
    if "_original_forward" in vars(model):
        model.forward = vars(model).pop("_original_forward")


def train_through_4bit(model: SugarForConditionalGeneration) -> None:
    """At the first forward in evaluation mode bitsandbytes packs 4-bit weights for the CPU, and through packed weights no
    gradient passes, with no more than a warning (seen in 0.50): unpack them and leave them so."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.state_dict()  # unpacks, but for a rounding of the constants
            module.support_avx512bf16_for_cpu = False


def projector_settings(args: SugarTrainingConfig, stored: dict[str, Any] | None = None) -> dict[str, Any]:
    """Fields of [`SugarConfig`] that the training configuration sets where the retrieval projector is made new: not where
    the configuration that is `stored` is of more than a plain backbone."""
    if stored is not None and stored.keys() - {"model_type", "random_projector", "vlm_config"}:
        return {}
    return {name: getattr(args, name) for name in ("retrieval_dim", "retrieval_hidden_size", "image_pooling")}


def matryoshka_dims(args: SugarTrainingConfig, config: SugarConfig) -> list[int] | None:
    """The lengths at which embeddings are compared, the whole one first: those of the model, unless the settings have others."""
    if args.matryoshka_dims is None:
        return config.matryoshka_dims
    dims = sorted({*args.matryoshka_dims, config.retrieval_dim}, reverse=True)
    if dims[0] > config.retrieval_dim or dims[-1] < 1:
        said = f"`matryoshka_dims` is {args.matryoshka_dims}, but the model's embeddings have {config.retrieval_dim} dimensions"
        raise ValueError(f"{said}: give lengths from 1 to that.")
    return dims


def for_language_model(peft_config: PeftConfig, model: SugarForConditionalGeneration) -> PeftConfig:
    """A copy of the PEFT configuration with the retrieval projector among the modules saved whole, and everything outside
    of the language model excluded: `q_proj` is a name that vision towers use too."""
    peft_config = copy.deepcopy(peft_config)
    decoder = model.vlm.get_decoder()
    name = next(name for name, module in model.named_modules() if module is decoder)
    if peft_config.target_modules is None:
        peft_config.target_modules = ["q_proj", "v_proj"]
    if peft_config.exclude_modules is None:
        peft_config.exclude_modules = rf"(?!{re.escape(name)}\.).*"
    peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or []), "retrieval_projector"})
    return peft_config
