import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs

from .checkpoint_sugar import SugarCheckpointMixin
from .configuration_sugar import SugarConfig
from .fingerprint_sugar import fingerprint, unwrapped
from .packing_sugar import lay_rows, unlay_rows


# transformers 5.24 calls the cache `cache` in every output, and makes the old name a property of it.
CACHE = "cache" if hasattr(ModelOutput, "past_key_values") else "past_key_values"


@dataclass
class SugarOutput(ModelOutput):
    """
    Output of [`SugarForConditionalGeneration`]: the backbone's own output and the slice embeddings.

    Args:
        loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` is passed):
            Next-token cross-entropy, as the backbone computes it.
        logits (`torch.Tensor` of shape `(batch, length, vocabulary)`): The backbone's logits, unchanged.
        past_key_values (`Cache`, *optional*):
            The backbone's cache. From transformers 5.24 on the field is called `cache`; this name reads it too.
        hidden_states (`tuple[torch.Tensor]`, *optional*): Hidden states of the language model, when asked for.
        attentions (`tuple[torch.Tensor]`, *optional*): Attention weights, when asked for.
        image_hidden_states (`torch.Tensor`, *optional*):
            Projected image features, where the backbone returns them; those of all images one after the other.
        embeddings (`torch.FloatTensor` of shape `(batch, slices, retrieval_dim)`, *optional*, returned when `slice_ids` is passed):
            L2-normalised embedding of the prefix that ends at each slice, zero where a sample has fewer slices.
        embedding_mask (`torch.LongTensor` of shape `(batch, slices)`, *optional*, returned when `slice_ids` is passed):
            1 where the sample has that slice.
        image_outputs (`ModelOutput`, *optional*): What the vision tower gives, where the backbone returns it (transformers 5.24).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    if CACHE == "cache":
        cache: object | None = None
    else:
        past_key_values: object | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None
    image_hidden_states: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    embedding_mask: torch.Tensor | None = None
    image_outputs: ModelOutput | None = None


def pool_slices(hidden_states: torch.Tensor, slice_ids: torch.Tensor, image_pooling: str = "mean"):
    """
    Mean of the hidden states of each slice.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, length, hidden)`): Last hidden states of the language model.
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


class SugarForConditionalGeneration(SugarCheckpointMixin, PreTrainedModel, GenerationMixin):
    """
    Any image-text-to-text backbone (`AutoModelForImageTextToText`) with a retrieval projector: it generates what the
    backbone generates, and embeds every prefix of an interleaved image-text sample in one forward pass.

    Method: [Sugar](https://huggingface.co/papers/2411.00304).

    Example:

    ```python
    >>> from pathlib import Path
    >>> from hf_sugar import SugarForConditionalGeneration, SugarProcessor

    >>> model = SugarForConditionalGeneration.from_backbone("llava-hf/llava-1.5-7b-hf", dtype="bfloat16")
    >>> processor = SugarProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf")
    >>> embeddings = model.embed(**processor.embed_inputs(["a red circle", [Path("photo.jpg"), "What is this?"]]))
    ```
    """

    _auto_class = "AutoModel"  # saved with its code
    config_class = SugarConfig
    config: SugarConfig
    base_model_prefix = "vlm"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = []
    # never quantized, and kept exact under half precision: the projector is small and its cosines are compared
    _keep_in_fp32_modules = ["retrieval_projector"]
    _skip_keys_device_placement = [CACHE]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # PEFT looks for tied weights of the parts only where the whole has a mapping
    _tied_weights_keys = {}
    _loaded_from = "", ""  # name of the checkpoint, and fingerprint of the backbone as it was there
    # Whether rows of unequal length are laid end to end where they are embedded, see `packing_sugar.py`.
    padding_free = True

    def __init__(self, config: SugarConfig):
        super().__init__(config)
        # callers flip the outer flag
        config.vlm_config.tie_word_embeddings = config.tie_word_embeddings
        self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config)
        self.retrieval_projector = RetrievalProjector(config)
        if config.backbone_name_or_path is not None or not config.architectures:
            # the projector comes with the adapter, after the backbone, or is new on a plain backbone
            self._keys_to_ignore_on_load_missing = ["retrieval_projector"]
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        # In custom code, transformers takes modules without weights of their own for initialised, and so leaves out what
        # a backbone does there to those of their children (CLIP's attention). Nothing in this class needs that.
        return False

    # The part below the LM head. `base_model_prefix` names the whole backbone, because that is where a raw
    # checkpoint's weights go; what callers of `base_model` want is the module that returns `last_hidden_state`.
    @property
    def base_model(self) -> PreTrainedModel:
        return self.vlm.base_model

    def get_output_embeddings(self) -> nn.Module:
        return self.vlm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.vlm.set_output_embeddings(new_embeddings)

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("return_dict", self.config.return_dict)
        return self.vlm.get_image_features(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.vlm.prepare_inputs_for_generation(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
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
        output_hidden_states: bool | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SugarOutput | tuple:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): Token ids, image placeholders expanded.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 on padding.
            pixel_values (`torch.Tensor`, *optional*): Images as the backbone's processor gives them.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Targets of the next-token loss, -100 where there is none.
            slice_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Which slice of its sample each token represents, -1 outside, as [`SugarProcessor`] gives it. When
                passed, the output has `embeddings`.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden)`, *optional*):
                In place of `input_ids`.
            kwargs: Anything else that the backbone's forward takes.

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
        last = []
        hook = nullcontext()
        if slice_ids is not None:
            # What callers ask of `output_hidden_states` is theirs, and may leave out the last layer.
            hook = self.base_model.register_forward_hook(lambda module, inputs, output: last.append(output[0]))
        with hook:
            outputs = self.vlm(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                labels=labels,
                output_hidden_states=output_hidden_states,
                return_dict=True,
                **kwargs,
            )
        embeddings = mask = None
        if slice_ids is not None:
            embeddings, mask = self.project_slices(last[0], slice_ids)
        output = SugarOutput(
            **{name: outputs.get(name) for name in ("loss", "logits", CACHE, "hidden_states", "attentions")},
            image_hidden_states=_image_features(outputs),
            embeddings=embeddings,
            embedding_mask=mask,
            image_outputs=outputs.get("image_outputs"),
        )
        return output if return_dict else output.to_tuple()

    def project_slices(
        self,
        hidden_states: torch.Tensor,
        slice_ids: torch.Tensor,
        project: bool = True,
        truncate_dim: int | None = None,
    ):
        """
        Embeddings of the slices from the last hidden states.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden)`): Last hidden states.
            slice_ids (`torch.LongTensor` of shape `(batch, length)`):
                As in [`~SugarForConditionalGeneration.forward`].
            project (`bool`, *optional*, defaults to `True`):
                Whether to use the retrieval projector; without it the pooled hidden states themselves are returned,
                which is what an untrained model is to be compared by.
            truncate_dim (`int`, *optional*):
                Length to which the embeddings are cut before they are normalised; `config.matryoshka_dims` are those that
                the model was trained for.

        Returns:
            `tuple[torch.FloatTensor, torch.LongTensor]`: L2-normalised embeddings `(batch, slices, dim)`, mask
            `(batch, slices)`. A `ValueError` if `truncate_dim` is longer than the embeddings.
        """
        pooled, mask = pool_slices(hidden_states, slice_ids, self.config.image_pooling)
        if project:
            pooled = self.retrieval_projector(pooled).float()
        if truncate_dim is not None and not 0 < truncate_dim <= pooled.shape[-1]:
            raise ValueError(f"`truncate_dim` is {truncate_dim}; it must be from 1 to {pooled.shape[-1]}.")
        return nn.functional.normalize(pooled[..., :truncate_dim], dim=-1) * mask[..., None], mask

    def embed_slices(
        self, slice_ids: torch.LongTensor, project: bool = True, truncate_dim: int | None = None, **inputs
    ):
        """
        One embedding for every prefix of every sample that ends at a slice, from one pass without the LM head.

        Args:
            slice_ids, project, truncate_dim: As in [`~SugarForConditionalGeneration.project_slices`].
            inputs: `input_ids`, `attention_mask`, `pixel_values` and whatever else the backbone takes.

        Returns:
            `tuple[torch.FloatTensor, torch.LongTensor]`: embeddings `(batch, slices, dim)`, mask `(batch, slices)`.
        """
        inputs, mask = lay_rows(self.vlm, inputs, self.padding_free)
        hidden_states = self.base_model(**inputs, use_cache=False, return_dict=True)[0]
        return self.project_slices(unlay_rows(hidden_states, mask), slice_ids, project, truncate_dim)

    def embed(
        self, slice_ids: torch.LongTensor, project: bool = True, truncate_dim: int | None = None, **inputs
    ) -> torch.FloatTensor:
        """
        The embedding of each whole sample: that of its last slice. Takes the arguments of
        [`~SugarForConditionalGeneration.embed_slices`], which [`SugarProcessor.embed_inputs`] makes.

        Returns:
            `torch.FloatTensor` of shape `(batch, dim)`: L2-normalised, so inner products are cosines.
        """
        embeddings, mask = self.embed_slices(slice_ids, project, truncate_dim, **inputs)
        last = mask.sum(dim=1) - 1
        return embeddings[torch.arange(len(last), device=embeddings.device), last]

    @classmethod
    def from_backbone(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> "SugarForConditionalGeneration":
        """Wrap a plain backbone checkpoint with a fresh retrieval projector: another name of `from_pretrained`."""
        return cls.from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_vlm(cls, vlm: PreTrainedModel, **config_kwargs: Any) -> "SugarForConditionalGeneration":
        """
        Wrap a backbone that is already loaded; it is used, not copied.

        Args:
            vlm (`PreTrainedModel`): An image-text-to-text model.
            config_kwargs: Fields of [`SugarConfig`].

        Raises:
            `ValueError`: if it has an adapter.
        """
        if any(unwrapped(module) is not module for module in vlm.modules()):
            raise ValueError("The backbone has an adapter of its own. Merge it first (PEFT's `merge_and_unload`).")
        config_kwargs = {"random_projector": True, **config_kwargs}
        config = cls.config_class(vlm_config=copy.deepcopy(vlm.config), **config_kwargs)
        config.name_or_path = vlm.config.name_or_path
        with torch.device("meta"):
            model = cls(config)
        model.vlm = vlm
        model.config.vlm_config = vlm.config
        model.retrieval_projector = RetrievalProjector(config).to(vlm.device)
        model.retrieval_projector.apply(model._init_weights)
        model.generation_config = vlm.generation_config
        # kept with the backbone, which may be trained and wrapped again
        model._loaded_from = vars(vlm).setdefault("_loaded_from", (config.name_or_path, fingerprint(vlm)))
        return model.train(vlm.training)


def _image_features(outputs: ModelOutput) -> torch.Tensor | None:
    # transformers 5.24 has them in `image_outputs`, and in some families as a list of images
    features = outputs.get("image_hidden_states")
    if features is None and outputs.get("image_outputs") is not None:
        features = outputs["image_outputs"].pooler_output
    return torch.cat(list(features)) if isinstance(features, list | tuple) else features
