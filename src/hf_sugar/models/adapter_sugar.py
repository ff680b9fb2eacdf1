"""Adapters of a Sugar model, which bring the retrieval projector with them. PEFT does the work."""

import copy
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import cached_file, is_peft_available, logging

from .files_sugar import ADAPTER_SUBFOLDER, damage, whole_directory
from .fingerprint_sugar import fingerprint, same_fingerprint, unwrapped


logger = logging.get_logger(__name__)

PEFT_PREFIX = "base_model.model."  # of the names in an adapter file


class SugarAdapterMixin:
    """Adapters of [`SugarForConditionalGeneration`]."""

    def load_sugar_adapter(
        self, pretrained_model_name_or_path, adapter_name: str = "default", subfolder: str = "", **hub_kwargs
    ):
        """
        Attach the LoRA weights and the retrieval projector of an adapter repository, and make them the active ones.
        Several can be attached; `set_adapter(name)` switches both.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): Hub id or directory that has an `adapter/` folder.
            adapter_name (`str`, *optional*, defaults to `"default"`): name to switch to it by.
            subfolder (`str`, *optional*): where in the repository it is, if not at the top.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            `ValueError`: if a weight is missing, unexpected or of another shape, if it was trained on another
                backbone, or if it has no retrieval projector. A model never goes on with a random projector.
        """
        peft = _peft()
        where = f"The adapter in {pretrained_model_name_or_path}"
        config = self.config_class.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **hub_kwargs)
        if config.image_pooling != self.config.image_pooling:
            raise ValueError(f"{where} has image_pooling={config.image_pooling!r}: load the model with the same.")
        hub_kwargs["subfolder"] = str(Path(subfolder, ADAPTER_SUBFOLDER))
        cached_file(pretrained_model_name_or_path, "adapter_config.json", **hub_kwargs)
        file = cached_file(pretrained_model_name_or_path, "adapter_model.safetensors", **hub_kwargs)
        try:
            state_dict = {key.removeprefix(PEFT_PREFIX): value for key, value in load_file(file).items()}
        except SafetensorError as error:
            raise OSError(damage(Path(file).parent)) from error
        peft_config = peft.PeftConfig.from_pretrained(str(Path(file).parent))
        peft_config.inference_mode = True
        check_peft_config(peft_config)
        if adapter_name in getattr(self, "peft_config", {}):
            raise ValueError(f"An adapter of the name {adapter_name!r} is attached. Pass another `adapter_name`.")

        # what it should hold is found out on a model without weights, so that this one stays as it is if it is wrong
        with torch.device("meta"):
            empty = type(self)(copy.deepcopy(self.config))
        projector = {
            f"retrieval_projector.{key}": value for key, value in empty.retrieval_projector.named_parameters()
        }
        peft.inject_adapter_in_model(copy.deepcopy(peft_config), empty, low_cpu_mem_usage=True)
        expected = projector | peft.get_peft_model_state_dict(empty, save_embedding_layers=False)
        wanted, found = (
            {key: tuple(value.shape) for key, value in weights.items()} for weights in (expected, state_dict)
        )
        wrong = [
            f"{key} {found.get(key, 'missing')} instead of {wanted.get(key, 'none')}"
            for key in wanted.keys() | found.keys()
            if wanted.get(key) != found.get(key)
        ]
        if wrong:
            raise ValueError(
                f"{where} does not fit this backbone: {first_few(wrong)}. Load it on the one that its config.json names."
            )
        if config.backbone_fingerprint and not same_fingerprint(config.backbone_fingerprint, fingerprint(self.vlm)):
            raise ValueError(
                f"{where} was trained on {config.backbone_name_or_path!r} (revision {config.backbone_revision}), and this is another"
                f" backbone, {self.config.name_or_path!r}: the shapes are the same, the weights are not."
            )
        peft.inject_adapter_in_model(peft_config, self, adapter_name)
        if all(weight.dtype == torch.float32 for weight in state_dict.values()):
            # on a half-precision backbone PEFT injects in half precision, but trains and loads in float32
            peft.functional.cast_adapter_dtype(self, adapter_name)
        peft.set_peft_model_state_dict(self, state_dict, adapter_name)
        self._hf_peft_config_loaded = True
        self.config.random_projector &= config.random_projector
        self.set_adapter(adapter_name)
        self.requires_grad_(False)
        self.eval()

    # Those of transformers leave out the projector; and 5.24 refuses any PEFT before 0.22.

    def set_adapter(self, adapter_name: str) -> None:
        """Switch to an adapter, with its retrieval projector, by the name that it was loaded under."""
        attached = getattr(self, "peft_config", {})
        if not isinstance(adapter_name, str) or adapter_name not in attached:
            raise ValueError(f"There is no adapter {adapter_name!r}, only {', '.join(attached) or 'none'}.")
        _peft().functional.set_adapter(self, adapter_name, inference_mode=attached[adapter_name].inference_mode)

    def active_adapters(self) -> list[str]:
        """Name of the active adapter, in a list."""
        if (adapter := self._active_adapter()) is None:
            raise ValueError("There is no adapter.")
        return [adapter]

    def disable_adapters(self) -> None:
        """Switch to the model without adapters; its retrieval projector is not a trained one then."""
        self.active_adapters()
        for _, module in self._adapter_modules():
            module.enable_adapters(False)

    def enable_adapters(self) -> None:
        """Undo `disable_adapters`."""
        [adapter] = self.active_adapters()
        for _, module in self._adapter_modules():
            module.enable_adapters(True)
        self.set_adapter(adapter)  # frozen or not as before

    def merge_and_unload(self) -> "SugarAdapterMixin":
        """
        Merge the active adapters into the weights and take the adapters off; the model itself is returned. To train
        another adapter on it, save it and load it from there: an adapter names the place of its backbone.

        Raises:
            `ValueError`: if the weights are quantized, because the sum would be rounded to the few bits of the backbone.
        """
        self._require_full_precision("merge its adapter")
        embeddings = self.get_input_embeddings(), self.get_output_embeddings()
        inputs, outputs = map(unwrapped, embeddings)
        tied = inputs.weight is outputs.weight and embeddings != (inputs, outputs)
        if tied:
            # PEFT (0.21) would add what an adapter changes in one of them to both of them, or twice
            outputs.weight = nn.Parameter(outputs.weight.detach().clone())
        inside = ()
        for name, module in self._adapter_modules():
            if name.startswith(inside):
                continue
            if hasattr(module, "unload_and_optionally_merge_module"):
                merged = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                module.merge()
                merged = module.get_base_layer()
            self.set_submodule(name, merged)
            inside += (f"{name}.",)
        if tied:
            inputs, outputs = self.get_input_embeddings(), self.get_output_embeddings()
            tied = torch.equal(inputs.weight, outputs.weight)
            for config in (self.config, self.vlm.config, self.vlm.config.get_text_config()):
                config.tie_word_embeddings = tied
            self.tie_weights()
        self._hf_peft_config_loaded = False
        del self.peft_config
        self.config.backbone_name_or_path = self.config.backbone_revision = self.config.backbone_fingerprint = None
        # no longer the weights of any place: an adapter trained on them must not name the old one
        self.config.name_or_path = self.name_or_path = ""
        for parameter in self.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        return self

    def export_adapter(self, save_directory: str | Path) -> None:
        """Write the LoRA weights of the active adapter for the backbone's own class, without the retrieval projector:
        `PeftModel.from_pretrained(backbone, save_directory)` generates what this model generates."""
        adapter = self._active_adapter()
        if adapter is None:
            raise ValueError("There is no adapter to export; `export_backbone` writes the whole backbone.")
        peft = _peft()
        peft_config = copy.copy(self.peft_config[adapter])
        # by their full names: a pattern was written for the names of this class
        modules = {n.removeprefix("vlm."): m for n, m in self._adapter_modules() if n.startswith("vlm.")}
        wrappers = [n for n, module in modules.items() if isinstance(module, peft.utils.AuxiliaryTrainingWrapper)]
        inside = tuple(f"{name}." for name in wrappers)
        peft_config.target_modules = {n for n in modules if n not in wrappers and not n.startswith(inside)}
        saved = [n for n in wrappers if isinstance(modules[n], peft.utils.ModulesToSaveWrapper)]
        peft_config.modules_to_save = saved or None
        peft_config.exclude_modules = None
        peft_config.ensure_weight_tying = False  # each of the two by its own name and weights
        weights = self._adapter_weights(adapter).items()
        weights = {key.removeprefix("vlm."): value for key, value in weights if key.startswith("vlm.")}
        with whole_directory(save_directory) as directory:
            _save_adapter(directory, peft_config, weights, *self.backbone_source())

    def _adapter_modules(self) -> list[tuple[str, nn.Module]]:
        """Names and modules of what PEFT has put into the model."""
        peft = _peft()
        kinds = (peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.AuxiliaryTrainingWrapper)
        return [(name, module) for name, module in self.named_modules() if isinstance(module, kinds)]

    def _active_adapter(self) -> str | None:
        """Name of the adapter that is on, whoever put it there: this class, transformers or a `PeftModel` around it."""
        if not is_peft_available():
            return None
        names = {name for _, module in self._adapter_modules() for name in module.active_adapters}
        if len(names) > 1:
            raise ValueError(f"Several adapters are active ({', '.join(sorted(names))}): choose with `set_adapter`.")
        return names.pop() if names else None

    def _require_full_precision(self, purpose: str):
        if hasattr(self.config, "quantization_config"):
            raise ValueError(f"The weights are quantized: to {purpose}, load them without `quantization_config`.")

    def _adapter_weights(self, adapter: str, state_dict=None) -> dict[str, torch.Tensor]:
        if state_dict is not None:
            state_dict = {key.removeprefix(PEFT_PREFIX): value for key, value in state_dict.items()}
        return _peft().get_peft_model_state_dict(self, state_dict, adapter, save_embedding_layers=False)

    def _save_adapter_repository(self, directory: Path, adapter: str, state_dict=None):
        check_peft_config(self.peft_config[adapter])
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        source = config.backbone_name_or_path, config.backbone_revision = self.backbone_source()
        if not config.backbone_name_or_path:
            logger.warning(
                "The config.json of this adapter cannot say where its backbone is, whose weights were changed or never saved. Save it, and load "
                "the adapter with `backbone_name_or_path`."
            )
        # the one taken while loading where weights are sharded now
        config.backbone_fingerprint = max(fingerprint(self.vlm), self._loaded_from[1], key=len)
        # The backbone's own weights are not quantized: whoever loads the adapter chooses.
        vars(config).pop("quantization_config", None)
        config.save_pretrained(directory)
        custom_object_save(self, directory)
        weights = self._adapter_weights(adapter, state_dict)
        _save_adapter(directory / ADAPTER_SUBFOLDER, copy.copy(self.peft_config[adapter]), weights, *source)


def _peft():
    # inside `try`, so that transformers does not demand it of those who load a full checkpoint with the code in it
    try:
        import peft.functional
    except ImportError as error:
        raise ImportError("Adapters need PEFT. Run `pip install peft`.") from error
    return peft


def _save_adapter(directory: Path, peft_config, weights: dict[str, torch.Tensor], source: str, revision: str | None):
    directory.mkdir(parents=True, exist_ok=True)
    peft_config.base_model_name_or_path, peft_config.revision = source, revision
    peft_config.inference_mode = True
    peft_config.auto_mapping = None  # it would name a module of this process
    peft_config.save_pretrained(directory)
    # copies, because those of tied modules are one tensor
    weights = {PEFT_PREFIX + key: value.detach().clone().contiguous() for key, value in weights.items()}
    save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def check_peft_config(peft_config):
    """Refuse a [`~peft.PeftConfig`] of what an adapter repository cannot hold, by a `ValueError` that names the setting."""
    if getattr(peft_config, "bias", "none") != "none":
        raise ValueError(f"`bias={peft_config.bias!r}` changes the backbone's own biases. Set `bias='none'`.")
    tuner = _peft().mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(peft_config.peft_type)
    if tuner is None or peft_config.is_prompt_learning or peft_config.is_adaption_prompt or tuner.uses_shared_state:
        raise ValueError(f"A {type(peft_config).__name__} cannot be loaded again. Take a `LoraConfig` or its kin.")


def first_few(names, count: int = 4) -> str:
    names = sorted(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
