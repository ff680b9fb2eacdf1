"""How a Sugar model is loaded and saved: full checkpoints, plain backbones and adapter repositories."""

from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME, cached_file, logging
from transformers.utils.hub import extract_commit_hash

from .adapter_sugar import SugarAdapterMixin, first_few
from .files_sugar import damage, whole_directory
from .fingerprint_sugar import fingerprint, same_fingerprint


logger = logging.get_logger(__name__)

HUB_ACCESS = ("token", "cache_dir", "local_files_only", "force_download", "proxies")


class SugarCheckpointMixin(SugarAdapterMixin):
    """`from_pretrained` and `save_pretrained` of [`SugarForConditionalGeneration`]."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, config: Any = None, **kwargs: Any
    ) -> Self:
        """
        Load a full checkpoint, an adapter repository or a plain backbone, from the Hub or a directory. Weights are
        read from safetensors files only. An adapter repository holds the LoRA weights and the retrieval projector in
        `adapter/`; the backbone's weights, and nothing else, come from the place and revision that its configuration
        names. If the backbone is somewhere else by now, pass `backbone_name_or_path`.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): Hub id or directory.
            args, config, kwargs: as in [`~transformers.PreTrainedModel.from_pretrained`], and fields of [`SugarConfig`].

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
                overrides = {key: kwargs.pop(key) for key in cls.config_class.__annotations__ if key in kwargs}
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
        other_shapes_are_fine = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            hub = {key: kwargs[key] for key in (*HUB_ACCESS, "revision", "subfolder") if key in kwargs}
            raise OSError(
                damage(Path(cached_file(pretrained_model_name_or_path, CONFIG_NAME, **hub)).parent)
            ) from error
        wrong = list(info["missing_keys"])
        if not other_shapes_are_fine:
            shapes = info["mismatched_keys"]
            wrong += [f"{name} {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in shapes]
        if wrong:
            raise ValueError(
                f"The checkpoint {str(pretrained_model_name_or_path)!r} lacks weights: {first_few(wrong)}. Download it again."
            )
        model._loaded_from = model.config.name_or_path, fingerprint(model.vlm)
        return model, info

    @classmethod
    def _load_backbone(cls, config, adapter: str | Path, *args, subfolder=None, adapter_kwargs=None, **kwargs):
        # `subfolder` and `adapter_kwargs`, into which the Auto classes put the revision, are about the adapter's repository
        if not config.backbone_name_or_path:
            raise ValueError(f"{adapter} does not say where its backbone is. Pass `backbone_name_or_path`.")
        kwargs["revision"] = config.backbone_revision
        try:
            return cls._load_weights(config.backbone_name_or_path, *args, config=config, **kwargs)
        except OSError as error:
            raise OSError(
                f"The adapter in {adapter} is for the backbone {config.backbone_name_or_path!r} (revision {config.backbone_revision}), "
                f"which cannot be loaded: {error}\nIf it is somewhere else, pass `backbone_name_or_path`."
            ) from error

    def backbone_source(self) -> tuple[str, str | None]:
        """Name and commit of the place where the backbone's weights are. The name is empty where they are nowhere: not
        loaded, or changed since then (merged, trained, resized). After saving them, say where by
        `config.name_or_path`."""
        name, loaded = self._loaded_from
        if self.config.name_or_path == name and not same_fingerprint(loaded, fingerprint(self.vlm)):
            return "", None
        if self.config.backbone_name_or_path:
            return self.config.backbone_name_or_path, self.config.backbone_revision
        return self.config.name_or_path, self.config._commit_hash

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save a full checkpoint, or an adapter repository if an adapter is attached, with the code, so that the Auto
        classes can load it without this library. Arguments are those of
        [`~transformers.PreTrainedModel.save_pretrained`]."""
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

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # What `push_to_hub` is about to upload. Where this file runs as remote code, it keeps the card of transformers.
        try:
            from hf_sugar.hub import complete_directory
        except ModuleNotFoundError:
            pass
        else:
            complete_directory(working_dir, repo_id, self.config.name_or_path)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def export_backbone(
        self, save_directory: str | Path, merge: bool = False, processor: Any = None, **kwargs: Any
    ) -> None:
        """
        Write the backbone as the plain checkpoint of its own class, without the retrieval projector.

        Args:
            save_directory (`str` or `Path`): directory to write to.
            merge (`bool`, *optional*, defaults to `False`):
                Whether to merge the active adapter first (see `merge_and_unload`; the model stays merged).
            processor ([`SugarProcessor`], *optional*): written with it, as the backbone's own class too.
            kwargs: arguments of `save_pretrained`.

        Raises:
            `ValueError`: if an adapter is attached and `merge` is not set, or if the weights are quantized.
        """
        self._require_full_precision("export its backbone")
        if self._active_adapter() is not None:
            if not merge:
                raise ValueError("An adapter is attached: set `merge=True`, or use `export_adapter`.")
            self.merge_and_unload()
        self.vlm.generation_config = self.generation_config
        with whole_directory(save_directory) as directory:
            self.vlm.save_pretrained(directory, **kwargs)
            if processor is not None:
                processor.to_backbone().save_pretrained(directory)
