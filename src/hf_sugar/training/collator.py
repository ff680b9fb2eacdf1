import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from hf_sugar.alignment import IMAGE, TEXT
from hf_sugar.data import load_image
from hf_sugar.models.processing_sugar import SugarProcessor
from hf_sugar.models.rows_sugar import check_row, conversation_row, fill_images, iter_slices


@dataclass
class SugarCollator:
    """
    Turns rows into model inputs: tokens, images, the slice that each token represents, labels, and the teachers'
    embedding of every slice.

    Args:
        processor ([`SugarProcessor`]):
            Processor of the model.
        max_length (`int`, *optional*):
            Longest sequence that the model takes; a longer row is an error.
        embed_slices (`Callable[[list[str | PIL.Image.Image]], torch.Tensor]`, *optional*):
            Gives the teacher embeddings `(slices, dim)` of texts and images. Without it the batch has none, and no
            `slice_ids`: what supervised fine-tuning needs.
        flip_captions (`bool`, *optional*, defaults to `False`):
            Whether image-caption rows are put into the other order with probability one half. What happens to a row
            depends on its text, `seed` and `epoch` alone, so that a run that is resumed sees the same.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the flips.

    Returns of a call:
        `dict[str, torch.Tensor]`: what the backbone's processor gives, `labels` `(batch, length)`, and with
        `embed_slices` also `slice_ids` `(batch, length)`, `teacher_embeddings` `(batch, slices, dim)` float32 and
        `slice_modality` `(batch, slices)`: text, image, or -1 where a row has fewer slices. A row with `structure=False`
        has none: it stays out of the structure loss, and no teacher is asked about it.
    """

    processor: SugarProcessor
    max_length: int | None = None
    embed_slices: Callable[[list[str | Image.Image]], torch.Tensor] | None = None
    flip_captions: bool = False
    seed: int = 0
    # in memory that the workers of a data loader share, so that those that persist know it too
    epoch: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.long).share_memory_())

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        conversations, loss_on, names, structure = [], [], [], []
        for index, example in enumerate(examples):
            row = conversation_row(example)
            name = f"Row {row['id']}" if row["id"] else f"Sample {index} of the batch"
            check_row(row, len(row["images"]), name)
            images = [load_image(image, f"{name}, images[{n}]") for n, image in enumerate(row["images"])]
            messages = fill_images(row["messages"], images)
            loss = row["loss_on"]
            if self.flip_captions and is_image_caption(messages, loss) and self._flips(messages):
                messages = [{**messages[0], "content": messages[0]["content"][::-1]}]
                # the caption may now come before its image, where nothing says what it should be
                loss = loss if messages[0]["content"][0]["type"] == "image" else None
            conversations.append(messages)
            loss_on.append(loss)
            names.append(name)
            structure.append(row["structure"])
        batch = self.processor.encode_conversations(conversations, loss_on, names, self.max_length)
        if self.embed_slices is None:
            del batch["slice_ids"]
            return dict(batch)

        slices = [
            [part["image"] if part["type"] == "image" else part["text"] for part in iter_slices(messages) if use]
            for messages, use in zip(conversations, structure)
        ]
        # as wide as `slice_ids`, whatever rows are left out
        longest = int(batch["slice_ids"].max()) + 1
        embeddings = self.embed_slices([item for row in slices for item in row])
        teacher_embeddings = embeddings.new_zeros(len(slices), longest, embeddings.shape[1])
        modality = torch.full((len(slices), longest), -1)
        for row, (items, values) in enumerate(zip(slices, embeddings.split([len(items) for items in slices]))):
            teacher_embeddings[row, : len(items)] = values
            modality[row, : len(items)] = torch.tensor([TEXT if isinstance(item, str) else IMAGE for item in items])
        return {**batch, "teacher_embeddings": teacher_embeddings, "slice_modality": modality}

    def _flips(self, messages: list[dict[str, Any]]) -> bool:
        [text] = [part["text"] for part in messages[0]["content"] if part["type"] == "text"]
        return hashlib.blake2b(f"{self.seed} {int(self.epoch)} {text}".encode(), digest_size=1).digest()[0] % 2 == 1


def is_image_caption(messages: list[dict[str, Any]], loss_on: str) -> bool:
    """Whether a row is a document of one image and one text (in either order)."""
    return (
        loss_on == "captions"
        and len(messages) == 1
        and sorted(part["type"] for part in messages[0]["content"]) == ["image", "text"]
    )
