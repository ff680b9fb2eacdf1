"""Embeddings of texts, images and interleaved documents from a Sugar model, with the model's fingerprint."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..data.rows import conversation_row, load_image


TEXT_SUFFIXES = (".txt", ".md")
ITEMS = (
    "a text, a PIL image, the Path of an image or text file, a list of those, or a row with `messages` and `images`"
)


def as_row(item: Any, where: str) -> dict[str, Any]:
    """
    An item as a row in the conversational vision format. Images keep whatever form they have.

    Args:
        item:
            A text, a PIL image, the `Path` of an image or text file, a list of those, or a row.
        where (`str`):
            What error messages call the item.

    Returns:
        `dict`: `messages`, `images`, `loss_on` and `id`.

    Raises:
        `TypeError`: if the item is of another type.
        `ValueError`: if there is nothing in it.
    """
    if isinstance(item, dict):
        return conversation_row(item)
    content, images = [], []
    for part in item if isinstance(item, list | tuple) else [item]:
        if isinstance(part, Path) and part.suffix.lower() in TEXT_SUFFIXES:
            part = part.read_text(encoding="utf-8")
        if isinstance(part, str):
            if not part.strip():
                raise ValueError(f"{where} is empty or holds an empty text; there is nothing to embed.")
            content.append({"type": "text", "text": part.strip()})
        elif isinstance(part, Path | Image.Image):
            content.append({"type": "image", "text": None})
            images.append(part)
        else:
            raise TypeError(f"{where} is or holds {type(part).__name__}; give {ITEMS}.")
    if not content:
        raise ValueError(f"{where} is an empty list; there is nothing to embed.")
    return {"messages": [{"role": "user", "content": content}], "images": images, "loss_on": "text", "id": None}


class SugarEmbedder:
    """
    Embedding function of a model for [`SugarIndex`]: called with items, it returns their embeddings.

    Args:
        model ([`SugarForConditionalGeneration`]):
            Model. It is in evaluation mode while it embeds, and in its former mode afterwards.
        processor ([`SugarProcessor`]):
            Processor of the model.
        batch_size (`int`, *optional*, defaults to `32`):
            Items in one forward pass; those of similar length share one.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Attributes:
        fingerprint (`str`): names the weights. It is the same wherever the checkpoint lies, on every device, and in
            float32 and bfloat16.

    Example:

    ```python
    >>> embed = SugarEmbedder(model, processor)
    >>> embed(["a red circle", image, [image, "What is this?"]]).shape
    (3, 128)
    ```
    """

    def __init__(self, model: torch.nn.Module, processor: Any, batch_size: int = 32, progress: bool = False):
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self.progress = progress

    @cached_property
    def fingerprint(self) -> str:
        # Some thousand values of each weight: training moves them all, and reading all of 7B would take a minute.
        digest = hashlib.blake2b(digest_size=16)
        for name, weight in sorted(self.model.state_dict().items()):
            if ".original_module." in name:  # of PEFT, not used, and random where it came with an adapter
                continue
            values = weight.detach().flatten()
            values = values[:: max(1, len(values) // 4096)]
            if values.is_floating_point():
                values = values.to(torch.bfloat16)
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(values.contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __call__(self, items: Sequence[Any]) -> np.ndarray:
        """
        Embeddings of whole items.

        Args:
            items (`Sequence`):
                Each a `str` (always a text), a `PIL.Image.Image`, the `Path` of an image or text file, a list of those,
                interleaved, or a row in the conversational vision format.

        Returns:
            `np.ndarray` of shape `(items, dim)`: float32, L2-normalised.

        Raises:
            `TypeError`: if an item is of another type.
            `ValueError`: if there are no items, one is empty, too long for the model, or its embedding is not finite.
        """
        return np.stack([slices[-1] for slices in self.every_slice(items)])

    @torch.no_grad()
    def every_slice(self, items: Sequence[Any]) -> list[np.ndarray]:
        """
        Embeddings of all prefixes of items that end with a slice, from one forward pass.

        Args:
            items (`Sequence`):
                As for whole items.

        Returns:
            `list[np.ndarray]`: of shape `(slices, dim)` for each item; the last one is that of the whole item.

        Raises:
            `TypeError`, `ValueError`: as for whole items.
        """
        if len(items) == 0:
            raise ValueError("There are no items to embed.")
        rows = [as_row(item, f"item {n}") for n, item in enumerate(items)]
        order = sorted(range(len(rows)), key=lambda n: _length(rows[n]), reverse=True)
        limit = self.model.config.get_text_config().max_position_embeddings
        result: list[Any] = [None] * len(rows)
        was_training = self.model.training
        self.model.eval()
        try:
            with tqdm(total=len(rows), desc="Embedding", disable=not self.progress) as bar:
                for start in range(0, len(order), self.batch_size):
                    batch = order[start : start + self.batch_size]
                    for n, embeddings in zip(batch, self._forward([rows[n] for n in batch], batch, limit)):
                        result[n] = embeddings
                    bar.update(len(batch))
        finally:
            self.model.train(was_training)
        return result

    def _forward(self, rows: list[dict[str, Any]], numbers: list[int], limit: int) -> list[np.ndarray]:
        loaded = [
            {**row, "images": [load_image(image, f"item {n}, images[{i}]") for i, image in enumerate(row["images"])]}
            for n, row in zip(numbers, rows, strict=True)
        ]
        inputs = self.processor.embed_inputs(loaded, max_length=limit)
        inputs = inputs.to(self.model.device, dtype=self.model.dtype)
        embeddings, mask = self.model.embed_slices(**inputs)
        counts = mask.sum(dim=1).tolist()
        embeddings = embeddings.float().cpu().numpy()
        for n, row in zip(numbers, embeddings, strict=True):
            if not np.isfinite(row).all():
                raise ValueError(
                    f"The embedding of item {n} is not finite in {self.model.dtype}. Load the model in bfloat16 or "
                    "float32."
                )
        return [row[:count] for row, count in zip(embeddings, counts, strict=True)]


def _length(row: dict[str, Any]) -> tuple[int, int]:
    """Images, then characters: an image is many tokens."""
    contents = [message["content"] for message in row["messages"]]
    texts = [c if isinstance(c, str) else "".join(part.get("text") or "" for part in c) for c in contents]
    return len(row["images"]), sum(map(len, texts))
