"""Frozen encoders that say how similar two slices are."""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from hf_sugar.data import load_image

from .checkpoint import Teacher


class TripleEncoder:
    """
    Embeds slices (whole images and whole texts) with three frozen models, as the labels of structure-induced training
    need them.

    A slice's embedding is `concat(a1, a2)`, each half of length one. `a2` comes from a dual encoder such as CLIP and
    compares an image with a text. `a1` compares slices of one modality with each other, and comes from a model that does
    this better than CLIP: a self-supervised vision model for images, a sentence encoder for texts, the narrower padded with
    zeros. One encoder may do everything (`image=None, text=None` leaves the dual encoder; a slice of a kind that it does not
    take is an error): `split` is then `None`, and an embedding is that encoder's vector.

    Checkpoints are Hub ids or local directories with safetensors, whose weights are read when something is first embedded;
    remote code is never run. Images go through each checkpoint's own processor, on Pillow. The vision model gives its pooled
    output, or the first token's state where it has no trained pooler; the sentence encoder pools as its sentence-transformers
    configuration says (cls, mean or lasttoken), else by the first token. No instruction is put before a text.

    Args:
        image (`str`, *optional*, defaults to `"facebook/dinov2-base"`):
            Vision model for `a1` of images. Of a dual encoder the image side is used.
        text (`str`, *optional*, defaults to `"BAAI/bge-base-en-v1.5"`):
            Text encoder for `a1` of texts. Of a dual encoder the text side is used.
        cross (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Dual encoder (CLIP, SigLIP, ...: a model with `get_image_features` and `get_text_features`) for `a2`.
        revisions (`dict[str, str]`, *optional*):
            Branch, tag or commit of the Hub checkpoints, by `"image"`, `"text"` and `"cross"`.
        device (`str` or `torch.device`, *optional*): Defaults to the machine's accelerator, else the CPU.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `torch.float32`):
            Data type the models run in. Embeddings are always float32.
        batch_size (`int`, *optional*, defaults to `64`): Images or texts in one forward pass.
        long_text (`str`, *optional*, defaults to `"windows"`):
            What happens to a text with more tokens than an encoder takes (CLIP: 77, BGE: 512). `"windows"` halves it at
            the space nearest the middle until every part fits; its embedding is the normalised mean of theirs.
            `"truncate"` drops what is too much. Either way the first such text brings a warning.

    Attributes:
        split (`int` or `None`): width of `a1`.
        dim (`int`): width of the whole embedding.
        checkpoints (`dict[str, str]`): Hub ids and directories by `"image"`, `"text"` and `"cross"`.
        description (`str`): the checkpoints and their versions, for messages.
        fingerprint (`str`): SHA-256 over everything that decides the embeddings: id and resolved commit of Hub
            checkpoints, the files themselves of local ones, pooling, `long_text` and data type.
        record (`str`): the five above as JSON, as datasets carry it beside the embeddings.

    Raises:
        `ValueError`: if two of the three encoders are given, or a checkpoint lacks weights, pools in a way that is not
            known here, or is not of the kind its place needs.
        `OSError`: if a checkpoint cannot be found or has no safetensors.

    Source: the triple kernel in section 3 of [Sugar](https://huggingface.co/papers/2411.00304).

    Example:

    ```python
    >>> from PIL import Image
    >>> from hf_sugar import TripleEncoder

    >>> encoder = TripleEncoder()
    >>> encoder.encode([Image.open("cat.jpg"), "a cat on a sofa"]).shape
    torch.Size([2, 1536])
    ```
    """

    def __init__(
        self,
        image: str | None = "facebook/dinov2-base",
        text: str | None = "BAAI/bge-base-en-v1.5",
        cross: str | None = "openai/clip-vit-large-patch14",
        *,
        revisions: dict[str, str] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = torch.float32,
        batch_size: int = 64,
        long_text: str = "windows",
    ):
        paths = {"image": image, "text": text, "cross": cross}
        if sum(path is not None for path in paths.values()) not in (1, 3):
            raise ValueError(f"The teachers are {paths}. Give all three, or one for everything, such as `cross`.")
        revisions = revisions or {}
        if unknown := revisions.keys() - paths:
            raise ValueError(f"Unknown teachers in `revisions`: {sorted(unknown)}. Valid are image, text and cross.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if long_text not in ("windows", "truncate"):
            raise ValueError(f"`long_text` must be 'windows' or 'truncate', got {long_text!r}.")
        dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"`dtype` is {dtype!r}. Use float32, bfloat16 or float16.")
        self.device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        self.dtype, self.batch_size, self.long_text = dtype, batch_size, long_text
        self._image, self._text, self._cross = (
            None
            if path is None
            else Teacher(role, str(path), revisions.get(role), self.device, dtype, batch_size, long_text)
            for role, path in paths.items()
        )

    @classmethod
    def from_teachers(cls, teachers: str | dict[str, Any] | None, **kwargs: Any) -> "TripleEncoder":
        """
        Build from the `teachers` setting of a training configuration.

        Args:
            teachers (`str` or `dict[str, Any]` or `None`):
                `"default"` (the constructor's defaults, as does `None`), `"tiny"` (the encoders in this package, trained
                on its rendered world alone: for trying things out), or checkpoints by `"image"`, `"text"` and `"cross"`.
                A mapping names the whole set: with `"cross"` alone it does everything. It may also hold `revisions`,
                `dtype`, `long_text` and `batch_size` of the constructor.
            kwargs:
                Passed on to the constructor.
        """
        if teachers == "tiny":
            from hf_sugar.world import world_teachers

            teachers = world_teachers()
        settings = {} if teachers in (None, "default") else teachers
        if not isinstance(settings, dict):
            mapping = f"a mapping of image, text and cross to checkpoints, as {{'cross': {teachers!r}}}"
            raise ValueError(f"`teachers` is {teachers!r}. Use one of default, tiny, or {mapping}.")
        roles, others = ("image", "text", "cross"), ("revisions", "dtype", "long_text", "batch_size")
        if unknown := settings.keys() - {*roles, *others}:
            raise ValueError(f"Unknown keys in `teachers`: {sorted(unknown)}. Valid are {', '.join(roles + others)}.")
        if settings.keys() & {*roles}:
            settings = {**dict.fromkeys(roles), **settings}
        return cls(**settings, **kwargs)

    @property
    def _teachers(self) -> list[Teacher]:
        return [teacher for teacher in (self._image, self._text, self._cross) if teacher is not None]

    @property
    def checkpoints(self) -> dict[str, str]:
        return {teacher.role: teacher.path for teacher in self._teachers}

    @property
    def description(self) -> str:
        return f"{', '.join(map(str, self._teachers))}, {self.dtype}, long_text={self.long_text}"

    @cached_property
    def fingerprint(self) -> str:
        parts = {teacher.role: [teacher.identity, teacher.pooling] for teacher in self._teachers}
        settings = [parts, str(self.dtype), self.long_text]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @property
    def record(self) -> str:
        record = {name: getattr(self, name) for name in ("fingerprint", "description", "checkpoints", "dim", "split")}
        for role, path in self.checkpoints.items():
            if os.path.isdir(path):  # it may be published with the data: where this directory was tells nothing
                name = Path(path).name
                record["checkpoints"][role] = name
                record["description"] = record["description"].replace(f"{role}={path}@", f"{role}={name}@")
        return json.dumps(record)

    @cached_property
    @torch.no_grad()
    def split(self) -> int | None:
        return max(self._image.width, self._text.width) if len(self._teachers) == 3 else None

    @cached_property
    @torch.no_grad()
    def dim(self) -> int:
        return (self.split or 0) + self._teachers[-1].width

    @torch.no_grad()
    def encode(self, slices: Sequence[Any], *, names: Sequence[str] | None = None) -> torch.Tensor:
        """
        Embed slices.

        Args:
            slices (`Sequence[str | PIL.Image.Image | pathlib.Path | bytes | dict]`):
                Texts (`str`) and images in any order. An image is whatever else [`~hf_sugar.data.load_image`] takes, is
                decoded when its batch comes, and brought to RGB.
            names (`Sequence[str]`, *optional*): What errors call the slices. Defaults to `"slices[0]"` and so on.

        Returns:
            `torch.Tensor` of shape `(len(slices), dim)` and dtype `torch.float32`, on the CPU, in the order of `slices`.

        Raises:
            `TypeError`: for a slice of another type.
            `ValueError`: for an empty text, an image that cannot be decoded, a slice of a kind that the only encoder does
                not take, or one whose embedding is zero or not finite; names the slice.
        """
        names = [f"slices[{i}]" for i in range(len(slices))] if names is None else names
        images, texts = [], []
        for i, (name, item) in enumerate(zip(names, slices, strict=True)):
            if not isinstance(item, str | Image.Image | Path | bytes | dict):
                raise TypeError(f"{name} is a {type(item).__name__}. A slice is a `str` or an image.")
            is_text = isinstance(item, str)
            if is_text and not item.strip():
                raise ValueError(f"{name} is an empty text. Leave it out.")
            if self._cross is None and is_text != (self._image is None):
                refused = f"is {'a text' if is_text else 'an image'}, which the only teacher, {self._teachers[0]}"
                raise ValueError(f"{name} {refused}, does not take. Name all three, or a dual encoder as `cross`.")
            (texts if is_text else images).append(i)
        texts.sort(key=lambda i: len(slices[i]))  # texts of like length share a batch: less padding
        embeddings = torch.zeros(len(slices), self.dim)
        with torch.autocast(self.device.type, enabled=False):  # labels must not depend on the trainer's precision
            for indices, first in ((images, self._image), (texts, self._text)):
                teachers = [teacher for teacher in (first, self._cross) if teacher]
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    batch_names = [names[i] for i in batch]
                    if indices is images:
                        items = [load_image(slices[i], name) for i, name in zip(batch, batch_names)]
                        halves = {teacher: teacher.images(items) for teacher in teachers}
                    else:
                        halves = {teacher: teacher.texts([slices[i] for i in batch]) for teacher in teachers}
                    embeddings[batch] = self._join(halves, batch_names)
        return embeddings

    def unload(self) -> None:
        """Free the memory of the weights. They are loaded again when something is encoded."""
        for teacher in self._teachers:
            vars(teacher).pop("model", None)

    def _join(self, features: dict[Teacher, torch.Tensor], names: list[str]) -> torch.Tensor:
        """The halves side by side, each of length one, the first as wide as `split`."""
        halves = [F.normalize(half, dim=-1).cpu() for half in features.values()]
        for teacher, half in zip(features, halves):
            norms = half.norm(dim=-1)
            # what is not finite has become nan, and nothing has a length of one but a vector with a direction
            for i in (~((norms - 1).abs() < 0.01)).nonzero().flatten()[:1].tolist():
                found = f"{'zero' if norms[i] == 0 else 'not finite'} in {teacher.dtype}"
                advice = "" if teacher.dtype == torch.float32 else "dtype float32 or bfloat16, or "
                remedy = f"Use {advice}another model, or leave this slice out."
                raise ValueError(f"{names[i]}: {teacher.name} gives an embedding that is {found}. {remedy}")
        if self.split is not None:
            halves[0] = F.pad(halves[0], (0, self.split - halves[0].shape[1]))
        return torch.cat(halves, dim=1)
