import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from hf_sugar.alignment import IMAGE, TEXT
from hf_sugar.data import load_image
from hf_sugar.models.processing_sugar import SugarProcessor
from hf_sugar.models.rows_sugar import check_row, conversation_row, fill_images, iter_slices
from hf_sugar.teachers import check_same_teachers

from .discriminative import NEGATIVE, NOTHING, POSITIVE


_SHARED = ("image_index", "images")  # by which the sequences beside the rows take the features of the batch's images


@dataclass
class SugarCollator:
    """
    Turns rows into model inputs: tokens, images, the slice that each token represents, labels, and the teachers'
    embedding of every slice.

    Args:
        processor ([`SugarProcessor`], *optional*):
            Processor of the model. Without it the batch has no model inputs, and images are left to the teachers.
        max_length (`int`, *optional*): Longest sequence that the model takes; a longer row is an error.
        teachers (`str`, *optional*):
            The teachers whose embeddings the rows carry, as the column `teachers` says it
            ([`~teachers.add_teacher_embeddings`]).
        embed_slices (`Callable[[list[str | PIL.Image.Image]], torch.Tensor]`, *optional*):
            Gives the teacher embeddings `(slices, dim)` of texts and images instead. Without either the batch has none,
            and no `slice_ids`: what supervised fine-tuning needs.
        flip_captions (`bool`, *optional*, defaults to `False`):
            Whether image-caption rows are put into the other order with probability one half. What happens to a row
            depends on its text, `seed` and `epoch` alone, so that a run that is resumed sees the same.
        singles (`int`, *optional*):
            How many of the later slices of a caption row or document, images before texts, and of the further images of a
            conversation stand beside it as sequences of their own, besides the items of its columns `positives` and
            `negatives` (texts and images). Which ones depends on the same.
        seed (`int`, *optional*, defaults to `0`): Seed of the flips and of that choice.
        fill_up (`bool`, *optional*, defaults to `False`):
            Whether a batch without images or sequences beside the rows gets a blank one, of which nothing is used: processes
            must call the same parts of a model, or they wait for one another for ever.
        divided (`bool`, *optional*, defaults to `False`):
            Whether processes divide the weights, and so must call each part equally often: the sequences beside the rows do
            without the features of the batch's images.

    Returns of a call:
        `dict[str, torch.Tensor]`: what the backbone's processor gives, `labels` `(batch, length)`, and with
        teachers also `slice_ids` `(batch, length)`, `teacher_embeddings` `(batch, slices, dim)` float32 and
        `slice_modality` `(batch, slices)`: text, image, or -1 where a row has fewer slices. A row with `structure=False`
        has none: it stays out of the discriminative loss, and no teacher is asked about it. With `singles` also `singles`,
        the model's inputs of those sequences, and `single_slices` `(batch, singles)`: which slice of its row each is, or that
        it is a `POSITIVE`, a `NEGATIVE` or `NOTHING`.
    """

    processor: SugarProcessor | None
    max_length: int | None = None
    teachers: str | None = None
    embed_slices: Callable[[list[str | Image.Image]], torch.Tensor] | None = None
    flip_captions: bool = False
    singles: int | None = None
    seed: int = 0
    fill_up: bool = False
    divided: bool = False
    # in memory that the workers of a data loader share, so that those that persist know it too
    epoch: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.long).share_memory_())

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        conversations, loss_on, learnt, names, structure, flipped = [], [], [], [], [], []
        for index, example in enumerate(examples):
            row = conversation_row(example)
            name = f"Row {row['id']}" if row["id"] else f"Sample {index} of the batch"
            check_row(row, len(row["images"]), name)
            images = row["images"]
            if self.processor is not None:
                images = [load_image(image, f"{name}, images[{n}]") for n, image in enumerate(images)]
            messages = fill_images(row["messages"], images)
            loss = row["loss_on"]
            flipped.append(self._flips(messages, loss))
            if flipped[-1]:
                messages = [{**messages[0], "content": messages[0]["content"][::-1]}]
                # the caption may now come before its image, where nothing says what it should be
                loss = loss if messages[0]["content"][0]["type"] == "image" else None
            conversations.append(messages)
            loss_on.append(loss)
            learnt.append(loss if row["generative"] else None)
            names.append(name)
            structure.append(row["structure"])
        batch = {}
        if self.processor is not None:
            batch |= self.processor.encode_conversations(conversations, learnt, names, self.max_length)
        if self.singles is not None:
            batch |= self._singles(examples, conversations, loss_on, structure, names)
        if self.fill_up and self.processor is not None:
            self._fill_up(batch)
        if self.embed_slices is None and self.teachers is None:
            del batch["slice_ids"]
            return batch

        parts = list(map(list, map(iter_slices, conversations)))
        longest = max(map(len, parts))  # as wide as `slice_ids`, whatever rows are left out
        parts = [slices if use else [] for slices, use in zip(parts, structure)]
        counts = list(map(len, parts))
        if self.embed_slices is not None:
            slices = [part["image"] if part["type"] == "image" else part["text"] for row in parts for part in row]
            embeddings = self.embed_slices(slices)
        else:
            embeddings = self._embeddings_of_rows(examples, names, counts, flipped)
        teacher_embeddings = embeddings.new_zeros(len(parts), longest, embeddings.shape[1])
        modality = torch.full((len(parts), longest), -1)
        for row, values in enumerate(embeddings.split(counts)):
            teacher_embeddings[row, : len(values)] = values
            kinds = [IMAGE if part["type"] == "image" else TEXT for part in parts[row]]
            modality[row, : len(values)] = torch.tensor(kinds)
        return {**batch, "teacher_embeddings": teacher_embeddings, "slice_modality": modality}

    def _singles(self, examples, conversations, loss_on, structure, names) -> dict[str, Any]:
        """The sequences that stand beside the rows."""
        items, item_names, single_slices, image_index, images = [], [], [], [], 0
        for example, messages, loss, use, name in zip(examples, conversations, loss_on, structure, names):
            parts = list(iter_slices(messages))
            later = list(range(1, len(parts)))
            if loss == "answers":  # the further images alone: an answer such as "yes" says little of what it is about
                later = [n for n, part in enumerate(parts) if part["type"] == "image"][1:]
            later = later if use else []
            if len(later) > self.singles:
                # images first: hardly a sequence ends with an image and has no text, and what is searched for is often that
                text = "".join(part["text"] for part in parts if part["type"] == "text")
                random.Random(f"{self.seed} {int(self.epoch)} {text}").shuffle(later)
                later.sort(key=lambda number: parts[number]["type"] != "image")
                later = sorted(later[: self.singles])
            for number in later:
                items.append(parts[number])
                item_names.append(name)
                if parts[number]["type"] == "image":
                    image_index.append(images + sum(part["type"] == "image" for part in parts[:number]))
            images += sum(part["type"] == "image" for part in parts)
            for column, code in (("positives", POSITIVE), ("negatives", NEGATIVE)):
                for n, item in enumerate((example.get(column) or []) if use else []):
                    where = f"{name}, {column}[{n}]"
                    item = item if isinstance(item, str) else load_image(item, where)
                    kind = "text" if isinstance(item, str) else "image"
                    if kind == "text" and not item.strip():
                        raise ValueError(f"{where} is empty. Fill it or remove it.")
                    items.append({"type": kind, kind: item})
                    item_names.append(where)
                    later.append(code)
            single_slices.append(torch.tensor(later, dtype=torch.long))
        result = {"single_slices": pad_sequence(single_slices, batch_first=True, padding_value=NOTHING)}
        if items and self.processor is not None:
            conversations = [[{"role": "user", "content": [item]}] for item in items]
            singles = self.processor.encode_conversations(conversations, names=item_names, max_length=self.max_length)
            if image_index and len(image_index) == sum(item["type"] == "image" for item in items):
                singles |= {"image_index": torch.tensor(image_index), "images": images}
            result["singles"] = dict(singles)
        return result

    def _fill_up(self, batch: dict[str, Any]) -> None:
        image = {"type": "image", "image": Image.new("RGB", (32, 32))}
        blank = dict(self.processor.encode_conversations([[{"role": "user", "content": [image]}]]))
        images = {name: blank[name] for name in self.processor.image_processor.model_input_names if name in blank}
        if self.singles is not None:
            batch["singles"] = batch.get("singles", blank)
            if self.divided:  # all processes call the vision tower for them, or none
                batch["singles"] = {name: x for name, x in batch["singles"].items() if name not in _SHARED}
        for inputs in (batch, batch.get("singles", batch)):
            if not images.keys() <= inputs.keys():
                inputs.update(images, blank_image=True)

    def _embeddings_of_rows(
        self, examples: list[dict[str, Any]], names: list[str], counts: list[int], flipped: list[bool]
    ) -> torch.Tensor:
        """What the rows carry: `(slices, dim)`, both halves of length one."""
        wanted = json.loads(self.teachers)
        found = []
        for example, name, count, flip in zip(examples, names, counts, flipped):
            if example.get("teacher_embeddings") is None or example.get("teachers") is None:
                raise ValueError(f"{name} has no `teacher_embeddings`. Run `hf-sugar prepare` on the data first.")
            if example["teachers"] != self.teachers:
                check_same_teachers(json.loads(example["teachers"]), wanted["fingerprint"], wanted["description"])
            values = np.array([*example["teacher_embeddings"]], np.float32).reshape(-1, wanted["dim"])
            if count and len(values) != count:
                raise ValueError(
                    f"{name} has {len(values)} `teacher_embeddings` for {count} slices. Remove the column to compute them anew."
                )
            found.append(values[:count][:: -1 if flip else 1])
        embeddings = torch.from_numpy(np.concatenate(found))
        halves = [embeddings] if wanted["split"] is None else embeddings.tensor_split([wanted["split"]], dim=1)
        for half in halves:
            bad = ~((half.norm(dim=1) - 1).abs() < 0.01)
            if bad.any():
                row = int(torch.tensor(counts).cumsum(0).gt(int(bad.nonzero()[0])).nonzero()[0])
                raise ValueError(
                    f"{names[row]} has damaged `teacher_embeddings`, not of length one. Remove the column, or their directory."
                )
        return torch.cat([F.normalize(half, dim=1) for half in halves], dim=1)  # they were rounded to float16

    def _flips(self, messages: list[dict[str, Any]], loss_on: str) -> bool:
        """Whether a row is one image with its caption, and put into the other order."""
        parts = {part["type"]: part for part in messages[0]["content"]}
        pair = loss_on == "captions" and len(messages) == 1 and len(messages[0]["content"]) == len(parts) == 2
        if not (self.flip_captions and pair):
            return False
        text = parts["text"]["text"]
        return hashlib.blake2b(f"{self.seed} {int(self.epoch)} {text}".encode(), digest_size=1).digest()[0] % 2 == 1
