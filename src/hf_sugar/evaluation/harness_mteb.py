"""A Sugar model in mteb: https://github.com/embeddings-benchmark/mteb."""

import hashlib
from typing import Any

import numpy as np
import torch
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction

from ..inference import SugarEmbedder


class MTEBModel(AbsEncoder):
    """
    Model for `mteb.evaluate`. A text, an image, and an image with a text are one item each. What `mteb` calls
    queries and documents gets the instructions of the model's configuration, if it has any; those of `mteb` are not used.

    Args:
        model ([`SugarForConditionalGeneration`]), processor ([`SugarProcessor`]): Model and its processor.
        name (`str`, *optional*):
            `organization/model` under which mteb files the results. By default the name that the model was loaded by, under
            the organization `local`.
        truncate_dim (`int`, *optional*): As in [`SugarEmbedder`].
    """

    def __init__(
        self, model: torch.nn.Module, processor: Any, name: str | None = None, truncate_dim: int | None = None
    ):
        self.embedder = SugarEmbedder(model, processor, truncate_dim=truncate_dim)
        identity = self.embedder.fingerprint + (self.embedder.instruction("query") or "")
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": name or f"local/{model.name_or_path.rstrip('/').split('/')[-1] or 'sugar'}",
                "revision": hashlib.sha256(identity.encode()).hexdigest()[:32],
                "modalities": ["text", "image"],
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": any(map(self.embedder.instruction, ("query", "document"))),
                "framework": ["PyTorch", "Transformers"],
                "embed_dim": self.embedder.dim,
                "max_tokens": model.config.get_text_config().max_position_embeddings,
                "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
            }
        )

    def encode(self, inputs: Any, *, batch_size: int = 32, prompt_type: Any = None, **kwargs: Any) -> np.ndarray:
        """Embeddings of shape `(items, dim)` of batches with `text`, `image` or both, queries or documents by `prompt_type`;
        what else mteb says changes nothing."""
        self.embedder.batch_size = batch_size
        embeddings = []
        for batch in inputs:
            columns = [batch[name] for name in ("image", "text") if name in batch]
            if not columns:
                raise ValueError(f"A Sugar model embeds texts and images, but the task gives {', '.join(batch)}.")
            items = [
                [part for part in parts if part is not None and part != ""] for parts in zip(*columns, strict=True)
            ]
            embeddings.append(self.embedder(items, prompt_type and prompt_type.value))
        return np.concatenate(embeddings)
