"""Adapters of a Sugar model, which bring the retrieval projector with them. PEFT does the work."""

import copy
from collections.abc import Iterator
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
# Settings of a backbone that its weights are made for: where two differ, they are different backbones.
SHAPE_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "embed_dim",
    "intermediate_size",
    "num_hidden_layers",
    "depth",
    "num_attention_heads",
    "num_key_value_heads",
    "patch_size",
)


class SugarAdapterMixin:
    """Adapters of [`SugarForConditionalGeneration`]."""

    def load_sugar_adapter(
        self, pretrained_model_name_or_path, adapter_name: str = "default", subfolder: str = "", **hub_kwargs
    ):
        """
        Attach the LoRA weights and the retrieval projector of an adapter repository, and make them the active ones.
        Several can be attached; `set_adapter(name)` switches both.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                Hub id or directory that has an `adapter/` folder.
            adapter_name (`str`, *optional*, defaults to `"default"`):
                Name to switch to it by.
            subfolder (`str`, *optional*):
                Where in the repository it is, if not at the top.
            hub_kwargs:
                `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            `ValueError`: if a weight is missing, unexpected or of another shape, if it was trained on another
                backbone, or if it has no retrieval projector. A model never goes on with a random projector.
        """
        peft = _peft()
        config = self.config_class.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **hub_kwargs)
        require_same_shapes(pretrained_model_name_or_path, config, self.config)
        for field in ("retrieval_dim", "image_pooling"):
            if getattr(config, field) != getattr(self.config, field):
                raise ValueError(
                    f"The adapter in {pretrained_model_name_or_path} was trained with {field}="
                    f"{getattr(config, field)!r}; this model has {getattr(self.config, field)!r}. Load the model with "
                    f"`{field}={getattr(config, field)!r}`."
                )
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
        peft.inject_adapter_in_model(copy.deepcopy(peft_config), empty, low_cpu_mem_usage=True)
        expected = peft.get_peft_model_state_dict(empty, save_embedding_layers=False)
        wrong = {
            "missing": expected.keys() - state_dict.keys(),
            "unexpected": state_dict.keys() - expected.keys(),
            "of another shape": {
                f"{key} {tuple(state_dict[key].shape)} instead of {tuple(expected[key].shape)}"
                for key in expected.keys() & state_dict.keys()
                if state_dict[key].shape != expected[key].shape
            },
        }
        if not any(key.startswith("retrieval_projector.") for key in state_dict):
            wrong["missing"] |= {key for key in empty.state_dict() if key.startswith("retrieval_projector.")}
        if any(wrong.values()):
            listing = "; ".join(f"{kind}: {first_few(keys)}" for kind, keys in wrong.items() if keys)
            raise ValueError(
                f"The adapter in {pretrained_model_name_or_path} does not fit this backbone ({listing}). Load it on the "
                "backbone that it was trained on, which its config.json names."
            )
        if config.backbone_fingerprint and not same_fingerprint(config.backbone_fingerprint, fingerprint(self.vlm)):
            raise ValueError(
                f"The adapter in {pretrained_model_name_or_path} was trained on another backbone than this one: the shapes "
                f"are the same, the weights are not. It was trained on {config.backbone_name_or_path!r} (revision "
                f"{config.backbone_revision}); this is {self.config.name_or_path!r}."
            )
        peft.inject_adapter_in_model(peft_config, self, adapter_name)
        if all(weight.dtype == torch.float32 for weight in state_dict.values()):
            # on a half-precision backbone PEFT injects in half precision, but trains and loads in float32
            peft.tuners.tuners_utils.cast_adapter_dtype(self, adapter_name)
        peft.set_peft_model_state_dict(self, state_dict, adapter_name)
        self._hf_peft_config_loaded = True
        self.set_adapter(adapter_name)
        self.requires_grad_(False)
        self.eval()

    # Those of transformers do the same, but 5.24 refuses to with any PEFT before 0.22.

    def set_adapter(self, adapter_name: str):
        """
        Switch to an adapter, with its retrieval projector.

        Args:
            adapter_name (`str`):
                Name that it was loaded under.
        """
        attached = getattr(self, "peft_config", {})
        if not isinstance(adapter_name, str) or adapter_name not in attached:
            raise ValueError(
                f"There is no adapter {adapter_name!r}. Name one of these: {', '.join(attached) or 'none'}."
            )
        inference_mode = attached[adapter_name].inference_mode
        _peft().functional.set_adapter(self, adapter_name, inference_mode=inference_mode)

    def active_adapters(self) -> list[str]:
        """Name of the active adapter, in a list."""
        adapter = self._active_adapter()
        if adapter is None:
            raise ValueError("There is no adapter.")
        return [adapter]

    def disable_adapters(self):
        """Switch to the model without adapters; its retrieval projector is not a trained one then."""
        self.active_adapters()
        for module in self._adapter_modules():
            module.enable_adapters(False)

    def enable_adapters(self):
        """Undo `disable_adapters`."""
        [adapter] = self.active_adapters()
        for module in self._adapter_modules():
            module.enable_adapters(True)
        self.set_adapter(adapter)  # frozen or not as before

    def _adapter_modules(self) -> Iterator[nn.Module]:
        peft = _peft()
        kinds = (peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.AuxiliaryTrainingWrapper)
        return (module for module in self.modules() if isinstance(module, kinds))

    def merge_and_unload(self):
        """
        Merge the active adapters into the weights and take the adapters off: what is left is a full model, which
        `save_pretrained` writes as a full checkpoint. To train another adapter on it, save it and load it from there:
        an adapter names the place of its backbone.

        Returns:
            [`SugarForConditionalGeneration`]: the model itself.

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
        adapters = set(self._adapter_modules())
        off = ()
        for name, module in list(self.named_modules()):
            if module not in adapters or name.startswith(off):
                continue
            if isinstance(module, _peft().utils.AuxiliaryTrainingWrapper):
                module = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                module.merge()
                module = module.get_base_layer()
            self.set_submodule(name, module)
            off += (f"{name}.",)
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

    def _require_full_precision(self, purpose: str):
        if hasattr(self.config, "quantization_config"):
            raise ValueError(
                f"The weights are quantized. To {purpose}, load the model without `quantization_config`; save an adapter "
                "that is not saved yet first (`save_pretrained`)."
            )

    def _active_adapter(self) -> str | None:
        """Name of the adapter that is on, whoever put it there: this class, transformers or a `PeftModel` around it."""
        if not is_peft_available():
            return None
        names = {name for module in self._adapter_modules() for name in module.active_adapters}
        if len(names) > 1:
            raise ValueError(
                f"Several adapters are active ({', '.join(sorted(names))}). Make one of them active with `set_adapter`."
            )
        return names.pop() if names else None

    def _save_adapter_repository(self, directory: Path, adapter: str, state_dict=None):
        check_peft_config(self.peft_config[adapter])
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        config.backbone_name_or_path, config.backbone_revision = self.backbone_source()
        if not config.backbone_name_or_path:
            logger.warning(
                "The weights of this backbone lie nowhere: they were not loaded, or have changed since. So the adapter's "
                "config.json cannot say where they are. Save the backbone and load the adapter with `backbone_name_or_path`."
            )
        # the one taken while loading where weights are sharded now
        config.backbone_fingerprint = max(fingerprint(self.vlm), self._loaded_from[1], key=len)
        # The backbone's own weights are not quantized: whoever loads the adapter chooses.
        vars(config).pop("quantization_config", None)
        config.save_pretrained(directory)
        custom_object_save(self, directory)

        weights = self._adapter_weights(adapter, state_dict)
        peft_config = copy.copy(self.peft_config[adapter])
        peft_config.base_model_name_or_path = config.backbone_name_or_path
        peft_config.revision = config.backbone_revision
        _save_adapter(directory / ADAPTER_SUBFOLDER, peft_config, weights)

    def _adapter_weights(self, adapter: str, state_dict=None) -> dict[str, torch.Tensor]:
        if state_dict is not None:
            state_dict = {key.removeprefix(PEFT_PREFIX): value for key, value in state_dict.items()}
        return _peft().get_peft_model_state_dict(self, state_dict, adapter, save_embedding_layers=False)

    def export_adapter(self, save_directory: str | Path):
        """
        Write the LoRA weights of the active adapter for the backbone's own class, without the retrieval projector:
        `PeftModel.from_pretrained(backbone, save_directory)` generates what this model generates.

        Args:
            save_directory (`str` or `Path`):
                Directory to write to.
        """
        adapter = self._active_adapter()
        if adapter is None:
            raise ValueError("There is no adapter to export; `export_backbone` writes the whole backbone.")
        weights = {
            key.removeprefix("vlm."): value
            for key, value in self._adapter_weights(adapter).items()
            if key.startswith("vlm.")
        }
        peft_config = copy.copy(self.peft_config[adapter])
        # by their full names: a pattern was written for the names of this class
        peft = _peft()
        wrappers = {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, peft.utils.AuxiliaryTrainingWrapper)
        }
        peft_config.target_modules = {
            name.removeprefix("vlm.")
            for name, module in self.named_modules()
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
            and name.startswith("vlm.")
            and name.rpartition(".")[0] not in wrappers
        }
        peft_config.modules_to_save = [
            name.removeprefix("vlm.")
            for name, module in wrappers.items()
            if name.startswith("vlm.") and isinstance(module, peft.utils.ModulesToSaveWrapper)
        ] or None
        peft_config.exclude_modules = None
        # each of the two by its own name and weights
        peft_config.ensure_weight_tying = False
        peft_config.base_model_name_or_path = self.config.backbone_name_or_path or self.config.name_or_path
        peft_config.revision = self.config.backbone_revision or self.config._commit_hash
        with whole_directory(save_directory) as directory:
            _save_adapter(directory, peft_config, weights)


def _peft():
    # inside `try`, so that transformers does not demand it of those who load a full checkpoint with the code in it
    try:
        import peft.functional
    except ImportError as error:
        raise ImportError("Adapters need PEFT. Run `pip install peft`.") from error
    return peft


def _save_adapter(directory: Path, peft_config, weights: dict[str, torch.Tensor]):
    directory.mkdir(parents=True, exist_ok=True)
    peft_config.inference_mode = True
    peft_config.auto_mapping = None  # it would name a module of this process
    peft_config.save_pretrained(directory)
    # copies, because those of tied modules are one tensor
    weights = {PEFT_PREFIX + key: value.detach().clone().contiguous() for key, value in weights.items()}
    save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def check_peft_config(peft_config):
    """
    Refuse what an adapter repository cannot hold.

    Args:
        peft_config ([`~peft.PeftConfig`]):
            Configuration of PEFT.

    Raises:
        `ValueError`: naming the setting.
    """
    if getattr(peft_config, "bias", "none") != "none":
        raise ValueError(
            f"`bias={peft_config.bias!r}` of the PEFT configuration changes the biases of the backbone itself, which no "
            "adapter can bring. Set `bias='none'`."
        )
    tuner = _peft().mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(peft_config.peft_type)
    if tuner is None or peft_config.is_prompt_learning or peft_config.is_adaption_prompt or tuner.uses_shared_state:
        raise ValueError(
            f"A {type(peft_config).__name__} cannot be loaded into a model again. Use an adapter of weights, `LoraConfig` "
            "for example."
        )


def require_same_shapes(adapter, expected, found):
    wrong = list(_differences(expected.vlm_config.to_dict(), found.vlm_config.to_dict(), "vlm_config"))
    if wrong:
        raise ValueError(
            f"The adapter in {adapter} was trained on another backbone than this one: {first_few(wrong)}. Its config.json "
            "names the one it was trained on."
        )


def _differences(expected: dict, found: dict, prefix: str):
    for key, value in expected.items():
        if isinstance(value, dict) and isinstance(found.get(key), dict):
            yield from _differences(value, found[key], f"{prefix}.{key}")
        elif key in SHAPE_FIELDS and found.get(key) != value:
            yield f"{prefix}.{key} {found.get(key)!r} instead of {value!r}"


def first_few(names, count: int = 4) -> str:
    names = sorted(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
