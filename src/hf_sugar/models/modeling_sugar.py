import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.processing_utils import Unpack
from transformers.utils import CONFIG_NAME, ModelOutput, TransformersKwargs, cached_file, is_peft_available, logging
from transformers.utils.hub import extract_commit_hash

from .configuration_sugar import SugarConfig


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


@dataclass
class SugarOutput(ModelOutput):
    """
    Output of [`SugarForConditionalGeneration`]: the backbone's own output and the slice embeddings.

    Args:
        loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` is passed):
            Next-token cross-entropy, as the backbone computes it.
        logits (`torch.Tensor` of shape `(batch, length, vocabulary)`):
            The backbone's logits, unchanged.
        past_key_values (`Cache`, *optional*):
            The backbone's cache.
        hidden_states (`tuple[torch.Tensor]`, *optional*):
            Hidden states of the language model, when asked for.
        attentions (`tuple[torch.Tensor]`, *optional*):
            Attention weights, when asked for.
        image_hidden_states (`torch.Tensor`, *optional*):
            Projected image features, where the backbone returns them.
        embeddings (`torch.FloatTensor` of shape `(batch, slices, retrieval_dim)`, *optional*, returned when `slice_ids` is passed):
            L2-normalised embedding of the prefix that ends at each slice, zero where a sample has fewer slices.
        embedding_mask (`torch.LongTensor` of shape `(batch, slices)`, *optional*, returned when `slice_ids` is passed):
            1 where the sample has that slice.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None
    image_hidden_states: object | None = None
    embeddings: torch.Tensor | None = None
    embedding_mask: torch.Tensor | None = None


def pool_slices(hidden_states: torch.Tensor, slice_ids: torch.Tensor, image_pooling: str = "mean"):
    """
    Mean of the hidden states of each slice.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, length, hidden)`):
            Last hidden states of the language model.
        slice_ids (`torch.LongTensor` of shape `(batch, length)`):
            Number of the slice that a token represents, -1 outside.
        image_pooling (`str`, *optional*, defaults to `"mean"`):
            `"last"` keeps only the last token of each slice (a text slice has no other).

    Returns:
        `tuple[torch.FloatTensor, torch.LongTensor]`: means of shape `(batch, slices, hidden)` in float32, and a mask of
        shape `(batch, slices)` that is 1 where the sample has the slice.
    """
    batch, length, size = hidden_states.shape
    slice_ids = slice_ids.to(hidden_states.device)
    slices = int(slice_ids.max()) + 1
    # Column 0 collects the tokens that belong to no slice, and is cut off at the end.
    column = slice_ids + 1
    if image_pooling == "last":
        places = torch.arange(length, device=column.device).expand(batch, length)
        last = places.new_zeros(batch, slices + 1).scatter_reduce(1, column, places, "amax")
        column = torch.where(last.gather(1, column) == places, column, 0)
    index = (column + torch.arange(batch, device=column.device)[:, None] * (slices + 1)).flatten()
    total = torch.zeros(batch * (slices + 1), size, dtype=torch.float32, device=hidden_states.device)
    total = total.index_add(0, index, hidden_states.reshape(-1, size).float())
    count = torch.zeros(batch * (slices + 1), dtype=torch.float32, device=hidden_states.device)
    count = count.index_add(0, index, torch.ones_like(index, dtype=torch.float32))
    means = (total / count.clamp(min=1)[:, None]).view(batch, slices + 1, size)[:, 1:]
    return means, (count.view(batch, slices + 1)[:, 1:] > 0).long()


class RetrievalProjector(nn.Module):
    """The MLP `r = MLP(d)` of the paper: one hidden layer, float32 whatever the backbone's dtype."""

    def __init__(self, config: SugarConfig):
        super().__init__()
        size = config.get_text_config().hidden_size
        hidden = config.retrieval_hidden_size or size
        self.linear_1 = nn.Linear(size, hidden, dtype=torch.float32)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden, config.retrieval_dim, bias=False, dtype=torch.float32)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.linear_2(self.act(self.linear_1(hidden_states.to(self.linear_1.weight.dtype))))


class SugarPreTrainedModel(PreTrainedModel):
    _auto_class = "AutoModel"  # saved with its code
    config_class = SugarConfig
    config: SugarConfig
    base_model_prefix = "vlm"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = []
    # never quantized, and kept exact under half precision: the projector is small and its cosines are compared
    _keep_in_fp32_modules = ["retrieval_projector"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def is_custom_code(cls) -> bool:
        # In custom code, transformers takes modules without weights of their own for initialised, and so leaves out what
        # a backbone does there to those of their children (CLIP's attention). Nothing in this class needs that.
        return False


class SugarForConditionalGeneration(SugarPreTrainedModel, GenerationMixin):
    """
    Any image-text-to-text backbone (`AutoModelForImageTextToText`) with a retrieval projector: it generates what the
    backbone generates, and embeds every prefix of an interleaved image-text sample in one forward pass.

    Method: [Sugar](https://huggingface.co/papers/2411.00304).

    Args:
        config ([`SugarConfig`]):
            Configuration of the model.

    Example:

    ```python
    >>> from hf_sugar import SugarForConditionalGeneration, SugarProcessor

    >>> model = SugarForConditionalGeneration.from_backbone("llava-hf/llava-1.5-7b-hf", dtype="bfloat16")
    >>> processor = SugarProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf")
    >>> embeddings = model.embed(**processor.embed_inputs(["a red circle", ["photo.jpg", "What is this?"]]))
    ```
    """

    def __init__(self, config: SugarConfig):
        super().__init__(config)
        # callers flip the outer flag
        config.vlm_config.tie_word_embeddings = config.tie_word_embeddings
        self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config)
        self.retrieval_projector = RetrievalProjector(config)
        if config.backbone_name_or_path is not None:
            # it comes with the adapter, after the backbone
            self._keys_to_ignore_on_load_missing = ["retrieval_projector"]
        self.post_init()

    # The part below the LM head. `base_model_prefix` names the whole backbone, because that is where a raw
    # checkpoint's weights go; what callers of `base_model` want is the module that returns `last_hidden_state`.
    @property
    def base_model(self) -> PreTrainedModel:
        return self.vlm.base_model

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.vlm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.vlm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.vlm.set_output_embeddings(new_embeddings)

    def get_image_features(self, *args, **kwargs):
        kwargs.setdefault("return_dict", self.config.return_dict)
        return self.vlm.get_image_features(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return self.vlm.prepare_inputs_for_generation(*args, **kwargs)

    def generate(self, *args, **kwargs):
        """Token for token what the backbone's own `generate` returns; takes the same arguments."""
        kwargs.pop("slice_ids", None)
        self.vlm.generation_config = self.generation_config
        return self.vlm.generate(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        slice_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SugarOutput | tuple:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Token ids, image placeholders expanded.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                0 on padding.
            pixel_values (`torch.Tensor`, *optional*):
                Images as the backbone's processor gives them.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Targets of the next-token loss, -100 where there is none.
            slice_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Which slice of its sample each token represents, -1 outside, as [`SugarProcessor`] gives it. When
                passed, the output has `embeddings`.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden)`, *optional*):
                In place of `input_ids`.
            kwargs:
                Anything else that the backbone's forward takes.

        Returns:
            [`SugarOutput`]: the logits are the backbone's, bit for bit.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        if pixel_values is not None:
            # no `pixel_values=None`: Video-LLaVA's processor calls them otherwise, and would lose to it
            kwargs["pixel_values"] = pixel_values
        outputs = self.vlm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            # [-1] keeps the last layer only
            output_hidden_states=output_hidden_states or ([-1] if slice_ids is not None else False),
            return_dict=True,
            **kwargs,
        )
        embeddings = mask = None
        if slice_ids is not None:
            embeddings, mask = self.project_slices(outputs.hidden_states[-1], slice_ids)
        output = SugarOutput(
            loss=outputs.loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
            image_hidden_states=outputs.get("image_hidden_states"),
            embeddings=embeddings,
            embedding_mask=mask,
        )
        return output if return_dict else output.to_tuple()

    def project_slices(self, hidden_states: torch.Tensor, slice_ids: torch.Tensor, project: bool = True):
        """
        Embeddings of the slices from the last hidden states.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden)`):
                Last hidden states.
            slice_ids (`torch.LongTensor` of shape `(batch, length)`):
                As in [`~SugarForConditionalGeneration.forward`].
            project (`bool`, *optional*, defaults to `True`):
                Whether to use the retrieval projector; without it the pooled hidden states themselves are returned,
                which is what an untrained model is to be compared by.

        Returns:
            `tuple[torch.FloatTensor, torch.LongTensor]`: L2-normalised embeddings `(batch, slices, dim)`, mask
            `(batch, slices)`.
        """
        pooled, mask = pool_slices(hidden_states, slice_ids, self.config.image_pooling)
        if project:
            pooled = self.retrieval_projector(pooled).float()
        return nn.functional.normalize(pooled, dim=-1) * mask[..., None], mask

    def embed_slices(self, slice_ids: torch.LongTensor, project: bool = True, **inputs):
        """
        One embedding for every prefix of every sample that ends at a slice, from one pass without the LM head.

        Args:
            slice_ids (`torch.LongTensor` of shape `(batch, length)`):
                As in [`~SugarForConditionalGeneration.forward`].
            project (`bool`, *optional*, defaults to `True`):
                Whether to use the retrieval projector.
            inputs:
                `input_ids`, `attention_mask`, `pixel_values` and whatever else the backbone takes.

        Returns:
            `tuple[torch.FloatTensor, torch.LongTensor]`: embeddings `(batch, slices, dim)`, mask `(batch, slices)`.
        """
        hidden_states = self.base_model(**inputs, use_cache=False, return_dict=True)[0]
        return self.project_slices(hidden_states, slice_ids, project)

    def embed(self, slice_ids: torch.LongTensor, project: bool = True, **inputs) -> torch.FloatTensor:
        """
        The embedding of each whole sample: that of its last slice. Takes the arguments of
        [`~SugarForConditionalGeneration.embed_slices`], which [`SugarProcessor.embed_inputs`] makes.

        Returns:
            `torch.FloatTensor` of shape `(batch, dim)`: L2-normalised, so inner products are cosines.
        """
        embeddings, mask = self.embed_slices(slice_ids, project, **inputs)
        last = mask.sum(dim=1) - 1
        return embeddings[torch.arange(len(last), device=embeddings.device), last]

    @classmethod
    def from_backbone(cls, pretrained_model_name_or_path, **kwargs) -> "SugarForConditionalGeneration":
        """
        Wrap a plain backbone checkpoint with a fresh retrieval projector. The same as `from_pretrained` on it.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                Hub id or directory of any image-text-to-text checkpoint.
            kwargs:
                Arguments of `from_pretrained` and fields of [`SugarConfig`], `retrieval_dim` for example.
        """
        return cls.from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_vlm(cls, vlm: PreTrainedModel, **config_kwargs) -> "SugarForConditionalGeneration":
        """
        Wrap a backbone that is already loaded; it is used, not copied.

        Args:
            vlm (`PreTrainedModel`):
                An image-text-to-text model.
            config_kwargs:
                Fields of [`SugarConfig`].
        """
        config = cls.config_class(vlm_config=copy.deepcopy(vlm.config), **config_kwargs)
        config.name_or_path = vlm.config.name_or_path
        with torch.device("meta"):
            model = cls(config)
        model.vlm = vlm
        model.config.vlm_config = vlm.config
        model.retrieval_projector = RetrievalProjector(config).to(vlm.device)
        model.retrieval_projector.apply(model._init_weights)
        model.generation_config = vlm.generation_config
        return model.train(vlm.training)

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
            `ValueError`: if the adapter's weights are not exactly those that the model expects, or the backbone is
                another one.
        """
        kwargs.setdefault("use_safetensors", True)
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, config=config, **kwargs)
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
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model.config._commit_hash = commit
            return loaded

        want_info = kwargs.pop("output_loading_info", False)
        model, info = cls._load_backbone(config, pretrained_model_name_or_path, *args, **kwargs)
        model.load_sugar_adapter(pretrained_model_name_or_path, **hub)
        return (model.eval(), info) if want_info else model.eval()

    @classmethod
    def _load_backbone(cls, config, adapter: str | Path, *args, subfolder=None, adapter_kwargs=None, **kwargs):
        # `subfolder` and `adapter_kwargs`, into which the Auto classes put the revision, are about the adapter's repository
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
        _require_same_backbone(adapter, config, cls.config_class.from_dict(found))
        model, info = super().from_pretrained(
            config.backbone_name_or_path, *args, config=config, output_loading_info=True, **kwargs
        )
        if info["missing_keys"]:
            raise ValueError(
                f"The backbone {config.backbone_name_or_path!r} of the adapter in {adapter} lacks weights: "
                f"{_first(info['missing_keys'])}. Load it on the backbone that it was trained on."
            )
        return model, info

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
        _require_same_backbone(pretrained_model_name_or_path, config, self.config)
        for field in ("retrieval_dim", "image_pooling"):
            if getattr(config, field) != getattr(self.config, field):
                raise ValueError(
                    f"The adapter in {pretrained_model_name_or_path} was trained with {field}="
                    f"{getattr(config, field)!r}; this model has {getattr(self.config, field)!r}. Load the model with "
                    f"`{field}={getattr(config, field)!r}`."
                )
        file = cached_file(
            pretrained_model_name_or_path,
            "adapter_model.safetensors",
            subfolder=str(Path(subfolder, ADAPTER_SUBFOLDER)),
            **hub_kwargs,
        )
        state_dict = {key.removeprefix(PEFT_PREFIX): value for key, value in load_file(file).items()}
        # its neighbour: the same commit
        cached_file(
            pretrained_model_name_or_path,
            "adapter_config.json",
            subfolder=str(Path(subfolder, ADAPTER_SUBFOLDER)),
            **hub_kwargs,
        )
        peft_config = peft.PeftConfig.from_pretrained(str(Path(file).parent))
        peft_config.inference_mode = True
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
            wrong["missing"] |= {f"retrieval_projector.{key}" for key in RetrievalProjector(self.config).state_dict()}
        if any(wrong.values()):
            listing = "; ".join(f"{kind}: {_first(keys)}" for kind, keys in wrong.items() if keys)
            raise ValueError(
                f"The adapter in {pretrained_model_name_or_path} does not fit this backbone ({listing}). Load it on the "
                "backbone that it was trained on, which its config.json names."
            )
        theirs, ours = config.backbone_sample, _backbone_sample(self)
        if theirs and ours and not torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=2**-6, atol=1e-6):
            raise ValueError(
                f"The adapter in {pretrained_model_name_or_path} was trained on another backbone than this one: the shapes "
                f"are the same, the input embeddings are not. It was trained on {config.backbone_name_or_path!r} (revision "
                f"{config.backbone_revision}); this is {self.config.name_or_path!r}."
            )
        peft.inject_adapter_in_model(peft_config, self, adapter_name)
        peft.set_peft_model_state_dict(self, state_dict, adapter_name)
        self._hf_peft_config_loaded = True
        self.set_adapter(adapter_name)
        self.requires_grad_(False)
        self.eval()

    def enable_adapters(self):
        """Undo `disable_adapters`, for the retrieval projector too."""
        super().enable_adapters()
        # `disable_adapters` of transformers switches it off, but `enable_adapters` does not switch it on
        self.retrieval_projector.enable_adapters(True)

    def merge_and_unload(self) -> "SugarForConditionalGeneration":
        """
        Merge the active adapters into the weights and take the adapters off: what is left is a full model, which
        `save_pretrained` writes as a full checkpoint. To train another adapter on it, save it and load it from there:
        an adapter names the place of its backbone.

        Returns:
            [`SugarForConditionalGeneration`]: the model itself.

        Raises:
            `ValueError`: if the weights are quantized, because the sum would be rounded to the few bits of the backbone.
        """
        peft = _peft()
        self._require_full_precision("merge its adapter")
        for name, module in list(self.named_modules()):
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.merge()
                self.set_submodule(name, module.get_base_layer())
            elif isinstance(module, peft.utils.ModulesToSaveWrapper):
                self.set_submodule(name, module.modules_to_save[module.active_adapters[0]])
        self._hf_peft_config_loaded = False
        del self.peft_config
        self.config.backbone_name_or_path = self.config.backbone_revision = self.config.backbone_sample = None
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
        tuner_layer = _peft().tuners.tuners_utils.BaseTunerLayer
        names = {
            name for module in self.modules() if isinstance(module, tuner_layer) for name in module.active_adapters
        }
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
            self.config.backbone_name_or_path = self.config.backbone_revision = self.config.backbone_sample = None
            return super().save_pretrained(
                save_directory,
                is_main_process=is_main_process,
                state_dict=state_dict,
                push_to_hub=push_to_hub,
                **kwargs,
            )
        if push_to_hub:
            return self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        if not is_main_process:
            return

        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        if config.backbone_name_or_path is None:
            config.backbone_name_or_path = config.name_or_path
            config.backbone_revision = config._commit_hash
        if not config.backbone_name_or_path:
            logger.warning(
                "The backbone has no name, so the adapter's config.json cannot say where it is: it has to be loaded "
                "with `backbone_name_or_path`."
            )
        config.backbone_sample = _backbone_sample(self)
        # The backbone's own weights are not quantized: whoever loads the adapter chooses.
        vars(config).pop("quantization_config", None)
        config.save_pretrained(save_directory)
        custom_object_save(self, save_directory)

        weights = self._adapter_weights(adapter, state_dict)
        peft_config = copy.copy(self.peft_config[adapter])
        peft_config.base_model_name_or_path = config.backbone_name_or_path
        peft_config.revision = config.backbone_revision
        _save_adapter(Path(save_directory, ADAPTER_SUBFOLDER), peft_config, weights)

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
        tuner_layer = _peft().tuners.tuners_utils.BaseTunerLayer
        peft_config.target_modules = {
            name.removeprefix("vlm.")
            for name, module in self.named_modules()
            if isinstance(module, tuner_layer) and adapter in module.active_adapters and name.startswith("vlm.")
        }
        peft_config.exclude_modules = peft_config.modules_to_save = None
        peft_config.base_model_name_or_path = self.config.backbone_name_or_path or self.config.name_or_path
        peft_config.revision = self.config.backbone_revision or self.config._commit_hash
        _save_adapter(Path(save_directory), peft_config, weights)

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
        self.vlm.save_pretrained(save_directory, **kwargs)
        if processor is not None:
            processor.to_backbone().save_pretrained(save_directory)


def _peft():
    # inside `try`, so that transformers does not demand it of those who load a full checkpoint with the code in it
    try:
        import peft
    except ImportError as error:
        raise ImportError("Adapters need PEFT. Run `pip install peft`.") from error
    return peft


def _save_adapter(directory: Path, peft_config, weights: dict[str, torch.Tensor]):
    directory.mkdir(parents=True, exist_ok=True)
    peft_config.inference_mode = True
    peft_config.auto_mapping = None  # it would name a module of this process
    peft_config.save_pretrained(directory)
    weights = {PEFT_PREFIX + key: value.contiguous() for key, value in weights.items()}
    save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def _require_same_backbone(adapter, expected: SugarConfig, found: SugarConfig):
    wrong = list(_differences(expected.vlm_config.to_dict(), found.vlm_config.to_dict(), "vlm_config"))
    if wrong:
        raise ValueError(
            f"The adapter in {adapter} was trained on another backbone than this one: {_first(wrong)}. Its config.json "
            "names the one it was trained on."
        )


def _backbone_sample(model) -> list[float] | None:
    """
    Numbers that tell backbones of the same shapes apart: input embeddings of early tokens, which neither quantization nor
    LoRA on linear layers changes, nor new tokens at the end. `None` where they are not at hand: sharded, or trained too.
    """
    embeddings = model.get_input_embeddings()
    weight = embeddings.weight
    if (
        type(embeddings) is not torch.nn.Embedding
        or type(weight) is not torch.nn.Parameter
        or weight.device.type == "meta"
    ):
        return None
    if weight.ndim != 2 or not weight.is_floating_point():
        return None
    rows = torch.linspace(0, min(len(weight), 1000) - 1, 16).long()
    return weight[rows.to(weight.device), 0].float().tolist()


def _differences(expected: dict, found: dict, prefix: str):
    for key, value in expected.items():
        if isinstance(value, dict) and isinstance(found.get(key), dict):
            yield from _differences(value, found[key], f"{prefix}.{key}")
        elif key in SHAPE_FIELDS and found.get(key) != value:
            yield f"{prefix}.{key} {found.get(key)!r} instead of {value!r}"


def _first(names, count: int = 4) -> str:
    names = sorted(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
