"""How a Sugar model is loaded, saved and exported: full checkpoints, plain backbones and adapter repositories."""

import base64
import copy
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME, cached_file, is_peft_available, logging
from transformers.utils.hub import extract_commit_hash


logger = logging.get_logger(__name__)

ADAPTER_SUBFOLDER = "adapter"
PEFT_PREFIX = "base_model.model."  # of the names in an adapter file
BACKBONE_FIELDS = ("backbone_name_or_path", "backbone_revision")
HUB_ACCESS = ("token", "cache_dir", "local_files_only", "force_download", "proxies")

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

FINGERPRINT_PREFIX = "weights:"
SAMPLES = 4  # of each weight in a fingerprint
SAMPLE = np.dtype([("name", "<u4"), ("values", "<i2", SAMPLES)])
SAMPLED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fingerprint(model: nn.Module, adapters: bool = False) -> str:
    """
    What tells models apart: a few numbers of every weight, each beside a checksum of the weight's name. Quantized weights
    and those that are not whole on this process (sharded, offloaded) are left out. Compare two of them with
    [`same_fingerprint`], not with `==`.

    Args:
        model (`torch.nn.Module`):
            The whole model, or its backbone (`model.vlm`).
        adapters (`bool`, *optional*, defaults to `False`):
            Whether the active adapter counts too. By default it is the model without adapters.

    Returns:
        `str`: 16 characters for each weight.
    """
    weights = dict(_weights(model))
    if adapters and (adapter := model._active_adapter()) is not None:
        if not any(module.disable_adapters for module in model._adapter_modules()):
            # with the trained projector in the place of the one that it was made from
            weights |= model._adapter_weights(adapter)
    names, samples, seen = [], [], set()
    for name, weight in weights.items():
        # a quantized or sharded weight is of another class or dtype
        plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.dtype in SAMPLED_DTYPES
        if not plain or weight.is_meta or weight.numel() == 0 or id(weight) in seen:
            continue
        seen.add(id(weight))
        places = [weight.numel() * n // (SAMPLES + 1) for n in range(1, SAMPLES + 1)]
        names.append(zlib.crc32(name.encode()))
        samples.append(weight.detach().flatten()[places].to(torch.bfloat16).cpu())
    records = np.empty(len(names), SAMPLE)
    if names:
        records["name"], records["values"] = names, torch.stack(samples).view(torch.int16).numpy()
    return FINGERPRINT_PREFIX + base64.b64encode(records.tobytes()).decode()


def same_fingerprint(first: str, second: str) -> bool:
    """
    Whether two [`fingerprint`]s are of the same weights, in whatever precision each was loaded. What only one of them
    has, because the other was quantized, is not compared.

    Args:
        first, second (`str`):
            Fingerprints.
    """
    if first == second:
        return True
    if not (first.startswith(FINGERPRINT_PREFIX) and second.startswith(FINGERPRINT_PREFIX)):
        return False
    tables = []
    for text in (first, second):
        records = np.frombuffer(base64.b64decode(text.removeprefix(FINGERPRINT_PREFIX)), SAMPLE)
        tables.append(dict(zip(records["name"].tolist(), records["values"])))
    common = tables[0].keys() & tables[1].keys()
    if not common:
        return not all(tables)  # of one of them, nothing is known
    ours, theirs = (
        torch.from_numpy(np.stack([table[name] for name in common])).view(torch.bfloat16).float() for table in tables
    )
    # a unit in the last place, because float16 is rounded twice, and the smallest that float16 has
    return torch.allclose(ours, theirs, rtol=2**-7, atol=1e-7, equal_nan=True)


def _weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Weights of the model without adapters, by the names that they have there."""
    if (inner := _unwrapped(module)) is not module:
        yield from _weights(inner, prefix)
        return
    yield from ((prefix + name, weight) for name, weight in module._parameters.items() if weight is not None)
    for name, child in module._modules.items():
        if child is not None:
            yield from _weights(child, f"{prefix}{name}.")


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module itself where PEFT has put one of its own around it."""
    for name in ("base_layer", "original_module", "token_adapter"):
        if module._modules.get(name) is not None:
            return _unwrapped(module._modules[name])
    return module


class SugarCheckpointMixin:
    """`from_pretrained`, `save_pretrained` and adapters of [`SugarForConditionalGeneration`]."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """
        Load a full checkpoint, an adapter repository or a plain backbone, from the Hub or a directory. Weights are
        read from safetensors files only.

        An adapter repository (as [`SugarTrainer`] and `save_pretrained` write it under PEFT) holds the LoRA weights and
        the retrieval projector in `adapter/`; the backbone comes from the place that its configuration names, at the
        revision it was trained on. Nothing but weights is read from there. If the backbone is somewhere else by now,
        pass `backbone_name_or_path`.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                Hub id or directory.
            args, config, kwargs:
                As in [`~transformers.PreTrainedModel.from_pretrained`], and fields of [`SugarConfig`].

        Raises:
            `ValueError`: if weights are missing, if the adapter's are not exactly those that the model expects, or if the
                backbone is another one.
            `OSError`: if a file is missing or damaged.
        """
        kwargs.setdefault("use_safetensors", True)
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, config=config, **kwargs)
        want_info = kwargs.pop("output_loading_info", False)
        hub = {key: kwargs[key] for key in (*HUB_ACCESS, "revision", "subfolder") if key in kwargs}
        file = cached_file(
            pretrained_model_name_or_path, CONFIG_NAME, **hub, _raise_exceptions_for_missing_entries=False
        )
        commit = None if Path(pretrained_model_name_or_path).is_dir() else extract_commit_hash(file, None)
        if commit is not None:  # everything of one load comes from one commit
            kwargs["revision"] = hub["revision"] = commit
        if config is None:
            stored, _ = cls.config_class.get_config_dict(pretrained_model_name_or_path, **hub)
            if stored.get("backbone_name_or_path") is not None:
                if "backbone_name_or_path" in kwargs:
                    stored["backbone_revision"] = None
                overrides = {key: kwargs.pop(key) for key in BACKBONE_FIELDS if key in kwargs}
                config = cls.config_class.from_dict({**stored, **overrides})
        if config is None or config.backbone_name_or_path is None:
            model, info = cls._load_weights(pretrained_model_name_or_path, *args, config=config, **kwargs)
            model.config._commit_hash = commit
            if not model.config.architectures:
                logger.info("%s has no retrieval projector: it gets a new one.", pretrained_model_name_or_path)
        else:
            model, info = cls._load_backbone(config, pretrained_model_name_or_path, *args, **kwargs)
            model.load_sugar_adapter(pretrained_model_name_or_path, **hub)
        return (model, info) if want_info else model

    @classmethod
    def _load_weights(cls, pretrained_model_name_or_path, *args, **kwargs):
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            directory = cached_file(
                pretrained_model_name_or_path,
                CONFIG_NAME,
                **{key: kwargs[key] for key in (*HUB_ACCESS, "revision", "subfolder") if key in kwargs},
            )
            raise OSError(_damage(Path(directory).parent)) from error
        if info["missing_keys"]:
            raise ValueError(
                f"The checkpoint {str(pretrained_model_name_or_path)!r} lacks weights: {_first(info['missing_keys'])}. It is "
                "not complete, or not of this model: save or download it again."
            )
        model._loaded_from = model.config.name_or_path, fingerprint(model.vlm)
        return model, info

    @classmethod
    def _load_backbone(cls, config, adapter: str | Path, *args, subfolder=None, adapter_kwargs=None, **kwargs):
        # `subfolder` and `adapter_kwargs`, into which the Auto classes put the revision, are about the adapter's repository
        if not config.backbone_name_or_path:
            raise ValueError(
                f"The adapter in {adapter} does not say where its backbone is, which was changed or not saved before the "
                "training. Pass `backbone_name_or_path`."
            )
        kwargs["revision"] = config.backbone_revision
        hub = {key: kwargs[key] for key in (*HUB_ACCESS, "revision") if key in kwargs}
        try:
            found, _ = cls.config_class.get_config_dict(config.backbone_name_or_path, **hub)
        except OSError as error:
            raise OSError(
                f"The adapter in {adapter} is for the backbone {config.backbone_name_or_path!r} (revision "
                f"{config.backbone_revision}), which cannot be loaded: {error}\nIf it is somewhere else, pass "
                "`backbone_name_or_path`."
            ) from error
        _require_same_shapes(adapter, config, cls.config_class.from_dict(found))
        return cls._load_weights(config.backbone_name_or_path, *args, config=config, **kwargs)

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
        _require_same_shapes(pretrained_model_name_or_path, config, self.config)
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
            raise OSError(_damage(Path(file).parent)) from error
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
            listing = "; ".join(f"{kind}: {_first(keys)}" for kind, keys in wrong.items() if keys)
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
        inputs, outputs = map(_unwrapped, embeddings)
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

    def backbone_source(self) -> tuple[str, str | None]:
        """
        Name and commit of the place where the backbone's weights are, which an adapter repository needs. The name is empty
        where they are nowhere: not loaded, or changed since then (merged, trained, resized). After saving them, say where
        by `config.name_or_path`.
        """
        name, loaded = self._loaded_from
        if self.config.name_or_path == name and not same_fingerprint(loaded, fingerprint(self.vlm)):
            return "", None
        if self.config.backbone_name_or_path:
            return self.config.backbone_name_or_path, self.config.backbone_revision
        return self.config.name_or_path, self.config._commit_hash

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

    def save_pretrained(
        self, save_directory, is_main_process: bool = True, state_dict=None, push_to_hub: bool = False, **kwargs
    ):
        """
        Save what `from_pretrained` loads in one line, with the code, so that the Auto classes can load it without this
        library: a full checkpoint, or an adapter repository if an adapter is attached.

        Args:
            save_directory (`str` or `Path`):
                Directory to write to.
            is_main_process (`bool`, *optional*, defaults to `True`):
                Whether this process writes.
            state_dict (`dict`, *optional*):
                Weights to save instead of the model's own.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Whether to push it too.
            kwargs:
                Other arguments of [`~transformers.PreTrainedModel.save_pretrained`].
        """
        adapter = self._active_adapter()
        if adapter is None:
            self.config.backbone_name_or_path = self.config.backbone_revision = self.config.backbone_fingerprint = None
            if not is_main_process:
                return super().save_pretrained(save_directory, False, state_dict, **kwargs)
        elif not is_main_process:
            return
        with whole_directory(save_directory) as directory:
            if adapter is None:
                super().save_pretrained(directory, state_dict=state_dict, **kwargs)
            else:
                self._save_adapter_repository(directory, adapter, state_dict)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

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

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # What `push_to_hub` is about to upload. Where this file runs as remote code, it keeps the card of transformers.
        try:
            from hf_sugar.hub import complete_directory
        except ModuleNotFoundError:
            pass
        else:
            complete_directory(working_dir, repo_id, self.config.name_or_path)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

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

    def export_backbone(self, save_directory: str | Path, merge: bool = False, processor=None, **kwargs):
        """
        Write the backbone as the plain checkpoint of its own class, without the retrieval projector.

        Args:
            save_directory (`str` or `Path`):
                Directory to write to.
            merge (`bool`, *optional*, defaults to `False`):
                Whether to merge the active adapter first (see `merge_and_unload`; the model stays merged).
            processor ([`SugarProcessor`], *optional*):
                Processor to write with it, as the backbone's own class too.
            kwargs:
                Arguments of `save_pretrained`.

        Raises:
            `ValueError`: if an adapter is attached and `merge` is not set, or if the weights are quantized.
        """
        self._require_full_precision("export its backbone")
        if self._active_adapter() is not None:
            if not merge:
                raise ValueError(
                    "An adapter is attached. Set `merge=True` to export the backbone with it, or write it by itself "
                    "with `export_adapter`."
                )
            self.merge_and_unload()
        self.vlm.generation_config = self.generation_config
        with whole_directory(save_directory) as directory:
            self.vlm.save_pretrained(directory, **kwargs)
            if processor is not None:
                processor.to_backbone().save_pretrained(directory)


@contextmanager
def whole_directory(directory: str | Path) -> Iterator[Path]:
    """
    A place to write a checkpoint to. When the block ends, the files from there are moved into `directory`, and what is left
    of another checkpoint goes; other files stay. Where the block is broken off, `directory` stays as it was.

    Args:
        directory (`str` or `Path`):
            New or existing directory.
    """
    directory = Path(directory)
    new = directory / ".incomplete"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        files = [file.relative_to(new) for file in new.rglob("*") if file.is_file()]
        files.sort(key=lambda file: file.name == CONFIG_NAME)
        if Path(CONFIG_NAME) in files:
            # first out and last in: nothing can be loaded in between
            (directory / CONFIG_NAME).unlink(missing_ok=True)
            for pattern in ("model*.safetensors*", f"{ADAPTER_SUBFOLDER}/adapter_*"):
                for file in directory.glob(pattern):
                    if file.relative_to(directory) not in files:
                        file.unlink()
        for file in files:
            (directory / file).parent.mkdir(exist_ok=True)
            os.replace(new / file, directory / file)
    finally:
        shutil.rmtree(new, ignore_errors=True)


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


def _require_same_shapes(adapter, expected, found):
    wrong = list(_differences(expected.vlm_config.to_dict(), found.vlm_config.to_dict(), "vlm_config"))
    if wrong:
        raise ValueError(
            f"The adapter in {adapter} was trained on another backbone than this one: {_first(wrong)}. Its config.json "
            "names the one it was trained on."
        )


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


def _damage(directory: Path) -> str:
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            return f"{file} is damaged ({error}). Copy or download it again."
    return f"A file in {directory} is damaged. Copy or download it again."


def _differences(expected: dict, found: dict, prefix: str):
    for key, value in expected.items():
        if isinstance(value, dict) and isinstance(found.get(key), dict):
            yield from _differences(value, found[key], f"{prefix}.{key}")
        elif key in SHAPE_FIELDS and found.get(key) != value:
            yield f"{prefix}.{key} {found.get(key)!r} instead of {value!r}"


def _first(names, count: int = 4) -> str:
    names = sorted(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
