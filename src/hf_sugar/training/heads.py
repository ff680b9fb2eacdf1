"""What a model gives in training, in one call: TRL's fused LM head, slice embeddings, and those of sequences beside the batch."""

import copy
import functools
import types
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule
from transformers.utils import logging
from trl.kernels import chunked_logprob
from trl.trainer.utils import FusedCausalLMOutput

from hf_sugar.models import SugarForConditionalGeneration
from hf_sugar.models.packing_sugar import lay_rows, unlay_rows, why_padded

from .config import SugarTrainingConfig


logger = logging.get_logger(__name__)


@dataclass
class FusedSugarOutput(FusedCausalLMOutput):
    """TRL's output with the embeddings of slices and of sequences beside the batch. They are part of what forward returns, so
    that DDP sees the projector's parameters used in it."""

    embeddings: torch.Tensor | None = None
    embedding_mask: torch.Tensor | None = None
    single_embeddings: torch.Tensor | None = None


def add_structure_head(model: SugarForConditionalGeneration, padding_free: bool = False) -> None:
    """Let a model that has TRL's fused LM head also return embeddings from the same call: with `slice_ids` those of
    slices, and with `singles`, inputs of [`SugarForConditionalGeneration.embed`], those of other sequences. `image_index`
    among these says which of the `images` of the batch each of their images is; the vision tower sees it once, in
    families whose `get_image_features` gives a list of images. With `blank_image` nothing of the image is used, with
    `without_head` no loss is computed, as in [`embed_rows`]. With `padding_free` the rows of a batch are laid end to end,
    see [`~models.packing_sugar.lay_rows`]. What the fused head gives a token has the shape `(1, tokens with a label)`, or
    without `slice_ids` that of the rows. A copy of the model computes with its own weights."""
    model.padding_free = padding_free
    # For anything but the fused head TRL's function goes on to the forward that this very object had, which a copy would
    # ask for its answers (seen in TRL 1.16; nothing to be done here once it looks that forward up on `self`).
    fused_forward = model.forward.__func__

    @functools.wraps(type(model).forward)
    def forward(
        self, *args, slice_ids=None, singles=None, fused_lm_head=False, blank_image=False, without_head=False, **kwargs
    ):
        if without_head:
            return embed_rows(self, slice_ids, singles, blank_image, **kwargs)
        if not fused_lm_head:
            return type(self).forward(self, *args, slice_ids=slice_ids, **kwargs)
        kwargs, rows = lay_rows(self.vlm, kwargs, self.padding_free)
        if isinstance(head := self.get_output_embeddings(), FSDPModule):
            # TRL 1.16 uses its weight without a call of it, and would leave out the other processes' gradients
            head.unshard()
        scored = None
        if slice_ids is not None and kwargs.get("labels") is not None:
            # Where Triton runs TRL 1.16 leaves out what has no label. Elsewhere it scores images, prompts and padding too, and
            # holds several copies of a tile of logits: of 4,096 tokens and 32,768 words they are 3 GB.
            labels = kwargs.pop("labels")[:, 1:]
            if labels.device.type not in ("cuda", "xpu"):
                chunked_logprob.TOKEN_CHUNK_SIZE = 512
            scored = labels != -100
            kwargs["shift_labels"] = labels[scored][None]
        with _observed(self, blank_image, scored) as seen:
            output = fused_forward(self, *args, fused_lm_head=True, **kwargs)
        if slice_ids is None:
            return output
        embeddings, mask = self.project_slices(unlay_rows(seen["hidden_states"], rows), slice_ids)
        return FusedSugarOutput(
            **output,
            embeddings=embeddings,
            embedding_mask=mask,
            single_embeddings=embed_singles(self, singles, seen.get("image_features")),
        )

    model.forward = types.MethodType(forward, model)


def lays_rows(model: SugarForConditionalGeneration, args: SugarTrainingConfig) -> bool:
    """Whether a training lays rows end to end. A model that cannot is named, and refused where it would have to."""
    reason, name = why_padded(model.vlm), model.config.vlm_config.model_type
    if args.max_batch_tokens and reason:
        raise ValueError(f"`max_batch_tokens` needs rows without padding, and those of {name} are padded: {reason}.")
    if args.padding_free and reason:
        logger.warning("`padding_free`: the rows of %s are padded: %s.", name, reason)
    return args.padding_free and not reason


def embed_rows(model: SugarForConditionalGeneration, slice_ids, singles=None, blank_image: bool = False, **inputs):
    """The embeddings that a call with the same inputs gives in training, without the LM head: `(batch, slices, dim)`, and
    `(sequences, dim)` or `None`."""
    with _observed(model, blank_image) as seen:
        embeddings, _ = model.embed_slices(slice_ids, **inputs)
    return embeddings, embed_singles(model, singles, seen.get("image_features"))


@contextmanager
def _observed(model: SugarForConditionalGeneration, blank_image: bool = False, scored: torch.Tensor | None = None):
    """The last hidden states and the image features that are computed meanwhile: the fused head keeps them to itself. Of a
    blank image there are none. With `scored`, `(batch, length - 1)`, the head sees the states of these positions alone."""
    compute, seen = model.base_model.get_image_features, {}

    def get_image_features(*args, **kwargs):
        seen["image_features"] = output = compute(*args, **kwargs)
        if blank_image:
            output = _of_images(output, lambda x: x[:0] if torch.is_tensor(x) else [image[:0] for image in x])
        return output

    def keep(module, inputs, output):
        seen["hidden_states"] = states = output.last_hidden_state
        if scored is not None:
            output.last_hidden_state = states[:, :-1][scored.to(states.device)][None]

    with model.base_model.register_forward_hook(keep), _image_features_from(model, get_image_features):
        yield seen


@contextmanager
def _image_features_from(model: SugarForConditionalGeneration, function):
    """The backbone takes its image features from a function."""
    model.base_model.get_image_features = function
    try:
        yield
    finally:
        del model.base_model.get_image_features


def _of_images(features, choose):
    """Image features, and those that go to deeper layers (Qwen3-VL), of chosen images."""
    features = copy.copy(features)
    features.pooler_output = choose(features.pooler_output)
    if getattr(features, "deepstack_features", None) is not None:
        features.deepstack_features = [choose(layer) for layer in features.deepstack_features]
    return features


def embed_singles(model: SugarForConditionalGeneration, singles: dict | None, image_features) -> torch.Tensor | None:
    """Embeddings `(sequences, dim)` of the sequences beside a batch, from the features of the batch's images if there is an entry
    for each of them, and not for each patch or row, and as it would be for the image alone."""
    if singles is None:
        return None
    inputs = {name: value for name, value in singles.items() if name not in ("image_index", "images", "blank_image")}
    if singles.get("blank_image"):
        with _observed(model, blank_image=True):
            return model.embed(**inputs)
    features = getattr(image_features, "pooler_output", None)
    if not isinstance(features, list | tuple) or len(features) != singles.get("images"):
        return model.embed(**inputs)
    known = _of_images(image_features, lambda images: [images[index] for index in singles["image_index"].tolist()])
    tokens = (inputs["input_ids"] == model.config.image_token_id).sum(dim=1)
    if tokens[tokens > 0].tolist() != list(map(len, known.pooler_output)):
        return model.embed(**inputs)
    with _image_features_from(model, lambda *args, **kwargs: known):
        return model.embed(**inputs)
