"""Rows of a batch laid end to end for a language model or text encoder, so that nothing is computed for padding."""

import inspect
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging


logger = logging.get_logger(__name__)

ROWS = "sdpa_rows"
# Below this share of padding a batch stays as it is: one call for all rows is then as fast as one for each.
LEAST_PADDING = 0.1


def sdpa_rows(module, query, key, value, attention_mask, sliding_window=None, **kwargs):
    """
    transformers' `sdpa`; given the lengths of rows that lie end to end, integers `(1, 1, 1, rows)` in place of a mask, each row
    attends to itself alone. A mask of four dimensions reaches the attention of the model as it is, and nothing else.
    """
    if attention_mask is None or attention_mask.dtype != torch.long:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths, outputs = attention_mask.flatten().tolist(), []
    for length, *row in zip(lengths, *(tensor.split(lengths, dim=2) for tensor in (query, key, value))):
        mask = None
        if sliding_window is not None and length > sliding_window:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device)
            mask = mask.triu(1 - sliding_window).tril(0 if module.is_causal else sliding_window - 1)
        outputs.append(sdpa_attention_forward(module, *row, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(ROWS, sdpa_rows)
AttentionMaskInterface.register(ROWS, sdpa_mask)


def why_padded(vlm: PreTrainedModel) -> str | None:
    """What keeps the rows of a backbone, or of a text encoder, from being laid end to end, if anything does."""
    decoder = vlm.get_decoder()
    config, attention = decoder.config, decoder.config._attn_implementation
    if attention not in ("sdpa", ROWS) and "flash" not in attention:
        return f"its attention is {attention!r}, neither 'sdpa' nor flash attention"
    if not decoder._supports_attention_backend:
        return "its attention does not go through transformers' attention interface"
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return "it takes no positions"
    if hasattr(getattr(decoder, "embeddings", None), "position_embedding"):  # CLIP's text model and its kin
        return "it takes no more tokens in all than positions"
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if decoder._is_stateful or others:
        return f"its layers carry a state from token to token ({', '.join(sorted(others)) or 'recurrent'})"
    if hasattr(vlm, "create_masks_for_generate"):
        return "its masks are its own (attention that goes both ways within an image, for example)"
    if "mrope_section" in str(getattr(config, "rope_parameters", "")) and not hasattr(
        vlm.base_model, "get_rope_index"
    ):
        return "its positions are not known"
    if getattr(config, "output_router_logits", False):
        return "its experts are balanced by the attention mask"
    return None


def lay_rows(
    vlm: PreTrainedModel, inputs: dict[str, Any], padding_free: bool = True
) -> tuple[dict[str, Any], torch.Tensor | None]:
    """The inputs of a batch (tokens and mask `(batch, length)`, and whatever else the backbone takes) with its rows laid end to end,
    tokens `(1, tokens)`, and the mask that [`unlay_rows`] takes. Without `padding_free`, or where the backbone cannot, they stay
    as they are, and there is no mask."""
    tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not padding_free or tokens is None or mask is None or mask.shape != tokens.shape:
        return inputs, None
    mask = mask.bool()
    lengths = mask.sum(dim=1).cpu()
    if lengths.sum() > (1 - LEAST_PADDING) * mask.numel():
        return inputs, None
    if reason := why_padded(vlm):
        logger.warning_once(f"The rows of {vlm.config.model_type} are padded: {reason}.")
        return inputs, None
    positions, decoder = mask.cumsum(dim=1) - 1, vlm.get_decoder()
    if hasattr(embeddings := getattr(decoder, "embeddings", None), "create_position_ids_from_input_ids"):
        positions += embeddings.padding_idx + 1  # RoBERTa and its kin count from there
    laid = {
        name: value[mask][None] if torch.is_tensor(value) and value.shape == tokens.shape else value
        for name, value in inputs.items()
    }
    laid["position_ids"] = positions[mask][None]
    if "labels" in laid:  # nothing follows from the end of another row
        laid["labels"] = laid["labels"].masked_fill(laid["position_ids"] == 0, -100)
    if "image_grid_thw" in inputs:  # Qwen2-VL and its kin: time, height and width, below the position in the row
        grid = {name: inputs[name] for name in ("image_grid_thw", "mm_token_type_ids")}
        places, _ = vlm.base_model.get_rope_index(tokens, attention_mask=mask.long(), **grid)
        laid["position_ids"] = torch.cat([positions[None], places])[:, mask][:, None]
    config = decoder.config
    if config._attn_implementation == "sdpa":
        config._attn_implementation = ROWS  # for good: activation checkpointing calls the layers again, after this
    laid["attention_mask"] = lengths.view(1, 1, 1, -1) if config._attn_implementation == ROWS else None
    return laid, mask


def unlay_rows(hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Hidden states `(1, tokens, hidden)` as `(batch, length, hidden)`, zero on padding; without a mask as they are."""
    if mask is None:
        return hidden_states
    padded = hidden_states.new_zeros(*mask.shape, hidden_states.shape[-1])
    return padded.index_put((mask.to(padded.device),), hidden_states[0])
