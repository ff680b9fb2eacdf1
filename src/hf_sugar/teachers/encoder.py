"""Frozen encoders that say how similar two slices are."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from hf_sugar.alignment import IMAGE, TEXT
from hf_sugar.data import load_image

from .checkpoint import Teacher


logger = logging.getLogger(__name__)


class TripleEncoder:
    """
    Embeds slices (whole images and whole texts) with three frozen models, as the labels of structure-induced training
    need them.

    A slice's embedding is `concat(a1, a2)`, each half of length one. `a2` comes from a dual encoder such as CLIP and
    compares an image with a text. `a1` compares slices of one modality with each other, and comes from a model that does
    this better than CLIP: a self-supervised vision model for images, a sentence encoder for texts. Where these two differ
    in width, the narrower one is padded with zeros, which leaves its inner products alone.

    One encoder may do everything: `image=None, text=None` leaves the dual encoder; a vision model alone embeds images,
    a sentence encoder alone texts, and a slice of the other kind is then an error. `split` is `None` and an embedding is
    that encoder's vector.

    Paper: [Unified Generative and Discriminative Training for Multi-modal Large Language
    Models](https://huggingface.co/papers/2411.00304), the triple kernel of section 3.

    Every checkpoint may be a Hub id or a local directory, with weights in safetensors; remote code is never run. The
    weights are read when something is first embedded, so that `fingerprint` and `description` are cheap.

    - Images go through each checkpoint's own processor with Pillow as the backend.
    - The vision model gives its pooled output, or the first token's state where it has no trained pooler.
    - The sentence encoder pools as its sentence-transformers configuration says (cls, mean, max, lasttoken, or several of
      them side by side), else by the first token. No instruction is put before a text.
    - SigLIP's texts are padded to full length without a mask, as in its training.

    Args:
        image (`str`, *optional*, defaults to `"facebook/dinov2-base"`):
            Vision model for `a1` of images. Of a dual encoder the image side is used.
        text (`str`, *optional*, defaults to `"BAAI/bge-base-en-v1.5"`):
            Text encoder for `a1` of texts. Of a dual encoder the text side is used.
        cross (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Dual encoder (CLIP, SigLIP, ...: a model with `get_image_features` and `get_text_features`) for `a2`.
        revisions (`dict[str, str]`, *optional*):
            Branch, tag or commit of the Hub checkpoints, by `"image"`, `"text"` and `"cross"`.
        device (`str` or `torch.device`, *optional*):
            Defaults to the machine's accelerator, else the CPU.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `torch.float32`):
            Data type the models run in. Embeddings are always float32.
        batch_size (`int`, *optional*, defaults to `64`):
            Images or texts in one forward pass.
        long_text (`str`, *optional*, defaults to `"windows"`):
            What happens to a text with more tokens than an encoder takes (CLIP: 77, BGE: 512). `"windows"` halves it at
            the space nearest the middle until every part fits; its embedding is the mean of the parts' embeddings,
            normalised. `"truncate"` drops what is too much. Either way such texts are counted and reported.

    Attributes:
        split (`int` or `None`): width of `a1`.
        dim (`int`): width of the whole embedding.
        checkpoints (`dict[str, str]`): Hub ids and directories by `"image"`, `"text"` and `"cross"`.
        description (`str`): the checkpoints and their versions, for messages.
        fingerprint (`str`): SHA-256 over everything that decides the embeddings: id and resolved commit of Hub
            checkpoints, the files themselves of local ones (moving a directory changes nothing), pooling, `long_text` and
            data type.
        record (`str`): the five above as JSON, as datasets carry it beside the embeddings.

    Raises:
        `ValueError`: if two of the three encoders are given, or a checkpoint lacks weights, pools in a way that is not
            known here, or is not of the kind its place needs.
        `OSError`: if a checkpoint cannot be found or has no safetensors.

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
            raise ValueError(
                f"The teachers are {paths}. Give all three (triple kernel), or one that does everything, such as `cross`."
            )
        if unknown := set(revisions or {}) - {"image", "text", "cross"}:
            raise ValueError(f"Unknown teachers in `revisions`: {sorted(unknown)}. Valid are image, text and cross.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if long_text not in ("windows", "truncate"):
            raise ValueError(f"`long_text` must be 'windows' or 'truncate', got {long_text!r}.")
        if isinstance(dtype, str):
            if not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise ValueError(f"`dtype` is {dtype!r}. Use float32, bfloat16 or float16.")
            dtype = getattr(torch, dtype)
        if device is None:
            device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        self.device = torch.device(device)
        self.dtype = dtype
        self.batch_size = batch_size
        self.long_text = long_text
        self._image, self._text, self._cross = (
            None
            if path is None
            else Teacher(role, str(path), (revisions or {}).get(role), self.device, dtype, batch_size, long_text)
            for role, path in paths.items()
        )

    @classmethod
    def from_teachers(cls, teachers: str | dict[str, Any] | None, **kwargs) -> "TripleEncoder":
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

        Returns:
            [`TripleEncoder`]

        Raises:
            `ValueError`: for another name or key, or a set of checkpoints that the constructor refuses.
        """
        roles = {"image", "text", "cross"}
        if isinstance(teachers, str):
            from hf_sugar.world import world_teachers

            sets = {"default": {}, "tiny": world_teachers()}
            if teachers not in sets:
                raise ValueError(
                    f"`teachers` is {teachers!r}. Use one of {', '.join(sets)}, or a mapping of image, text and cross to "
                    f"checkpoints; {{'cross': {teachers!r}}} uses this one for everything."
                )
            teachers = sets[teachers]
        elif not isinstance(teachers, dict | None):
            raise ValueError(f"`teachers` is {teachers!r}. Give a mapping of image, text and cross to checkpoints.")
        teachers = dict(teachers or {})
        if unknown := teachers.keys() - roles - {"revisions", "dtype", "long_text", "batch_size"}:
            raise ValueError(
                f"Unknown keys in `teachers`: {sorted(unknown)}. Valid are image, text and cross, and revisions, dtype, "
                "long_text and batch_size."
            )
        if teachers.keys() & roles:
            teachers = {**dict.fromkeys(roles), **teachers}
        return cls(**teachers, **kwargs)

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

    def modality(self, slices: Sequence[Any]) -> torch.Tensor:
        """
        Args:
            slices (`Sequence`):
                Texts and images, as [`~TripleEncoder.encode`] takes them.

        Returns:
            `torch.Tensor` of shape `(len(slices),)` and dtype `torch.int64`: `TEXT` or `IMAGE` for each slice.

        Raises:
            `TypeError`: for a slice of another type.
        """
        codes = []
        for i, item in enumerate(slices):
            if not isinstance(item, str | Image.Image | Path | bytes | dict):
                raise TypeError(f"slices[{i}] is a {type(item).__name__}. A slice is a `str` or an image.")
            codes.append(TEXT if isinstance(item, str) else IMAGE)
        return torch.tensor(codes, dtype=torch.int64)

    @torch.no_grad()
    def encode(
        self,
        slices: Sequence[Any],
        progress: bool = False,
        long_texts: Counter | None = None,
        names: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """
        Embed slices.

        Args:
            slices (`Sequence[str | PIL.Image.Image | pathlib.Path | bytes | dict]`):
                Texts (`str`) and images in any order. An image is whatever else [`~hf_sugar.data.load_image`] takes, is
                decoded when its batch comes, and brought to RGB.
            progress (`bool`, *optional*, defaults to `False`):
                Show a progress bar.
            long_texts (`collections.Counter`, *optional*):
                The number of texts that are longer than a teacher takes is logged once as a warning when the call ends;
                given this counter, it is added to it instead, by teacher, for the caller to report.
            names (`Sequence[str]`, *optional*):
                What errors call the slices. Defaults to `"slices[0]"` and so on.

        Returns:
            `torch.Tensor` of shape `(len(slices), dim)` and dtype `torch.float32`, on the CPU, in the order of `slices`.
            Both halves have length one.

        Raises:
            `TypeError`: for a slice of another type.
            `ValueError`: for an empty text, an image that cannot be decoded, a slice of a kind that the only encoder does
                not take, or one whose embedding is zero or not finite; names the slice.
        """
        codes = self.modality(slices).tolist()
        names = [f"slices[{i}]" for i in range(len(slices))] if names is None else names
        for name, item, code in zip(names, slices, codes, strict=True):
            if code == TEXT and not item.strip():
                raise ValueError(f"{name} is an empty text. Leave it out.")
            if self._cross is None and (code == TEXT) != (self._image is None):
                kind = "a text" if code == TEXT else "an image"
                raise ValueError(
                    f"{name} is {kind}, which the only teacher, {self._teachers[0]}, does not take. Name all three "
                    "teachers, or a dual encoder as `cross`."
                )
        images = [i for i, code in enumerate(codes) if code == IMAGE]
        # Texts of like length share a batch: less padding.
        texts = sorted((i for i, code in enumerate(codes) if code == TEXT), key=lambda i: len(slices[i]))
        counts = Counter()
        embeddings = torch.zeros(len(slices), self.dim)
        with (
            torch.autocast(self.device.type, enabled=False),  # labels must not depend on the trainer's precision
            tqdm(total=len(slices), desc="Embedding slices", unit="slice", disable=not progress) as bar,
        ):
            for indices in (images, texts):
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    items, batch_names = [slices[i] for i in batch], [names[i] for i in batch]
                    if indices is images:
                        items = [load_image(image, name) for image, name in zip(items, batch_names)]
                        halves = {t: t.images(items) for t in (self._image, self._cross) if t}
                    else:
                        halves = {}
                        for teacher in filter(None, (self._text, self._cross)):
                            halves[teacher], long = teacher.texts(items)
                            if long:
                                counts[teacher.role] += long
                    embeddings[batch] = self._join(halves, batch_names)
                    bar.update(len(batch))
        if long_texts is None:
            self.report_long_texts(counts, len(texts))
        else:
            long_texts.update(counts)
        return embeddings

    def unload(self) -> None:
        """Free the memory of the weights. They are loaded again when something is encoded."""
        for teacher in self._teachers:
            vars(teacher).pop("model", None)

    def report_long_texts(self, long_texts: Counter, texts: int) -> None:
        """
        Log in one warning how many texts are longer than a teacher takes, if any, and what was done with them.

        Args:
            long_texts (`collections.Counter`):
                As filled by [`~TripleEncoder.encode`].
            texts (`int`):
                Number of texts it was filled from.
        """
        if long_texts:
            parts = [
                f"{long_texts[t.role]} than the {t.max_length} tokens of the {t.role} teacher {t.path}"
                for t in self._teachers
                if long_texts[t.role]
            ]
            done = {
                "windows": "They were split into windows, whose embeddings were averaged.",
                "truncate": "They were cut, and what was cut has no influence on their embeddings.",
            }[self.long_text]
            logger.warning("Of %d texts some are longer: %s. %s", texts, ", ".join(parts), done)

    def _join(self, features: dict[Teacher, torch.Tensor], names: list[str]) -> torch.Tensor:
        """The halves side by side, each of length one, the first as wide as `split`."""
        halves = [F.normalize(half, dim=-1).cpu() for half in features.values()]
        for teacher, half in zip(features, halves):
            norms = half.norm(dim=-1)
            # what is not finite has become nan, and nothing has a length of one but a vector with a direction
            for i in (~((norms - 1).abs() < 0.01)).nonzero().flatten()[:1].tolist():
                found = "zero" if norms[i] == 0 else "not finite"
                advice = "" if teacher.dtype == torch.float32 else " Use dtype float32 or bfloat16, or"
                raise ValueError(
                    f"{names[i]}: {teacher.name} gives an embedding that is {found} in {teacher.dtype}."
                    f"{advice or ' Use'} another model, or leave this slice out."
                )
        if self.split is not None:
            halves[0] = F.pad(halves[0], (0, self.split - halves[0].shape[1]))
        return torch.cat(halves, dim=1)
