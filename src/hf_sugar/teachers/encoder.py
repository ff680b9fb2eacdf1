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
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from hf_sugar.alignment import IMAGE, TEXT
from hf_sugar.data.rows import load_image


logger = logging.getLogger(__name__)

# What decides a local checkpoint's output; a model card or training state beside it does not.
_FINGERPRINTED_FILES = (
    "*.safetensors",
    "config.json",
    "*processor_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)


class _Teacher:
    """One frozen checkpoint. Construction resolves it; the weights are read when first needed."""

    def __init__(self, role: str, path: str, revision: str | None, device: torch.device, dtype: torch.dtype):
        self.role = role
        self.path = path
        self.device = device
        self.dtype = dtype
        # The resolved commit serves every later read, so that all files come from one state of the repository.
        self.revision = revision
        config_file = cached_file(path, "config.json", revision=revision)
        if not os.path.isdir(path):
            self.revision = extract_commit_hash(config_file, None)
        self.config = AutoConfig.from_pretrained(path, revision=self.revision)
        self.pooling = self._read_pooling() if role == "text" else None

    def __str__(self) -> str:
        state = self.identity.removeprefix("sha256:") if os.path.isdir(self.path) else self.revision
        return f"{self.role}={self.path}@{state[:12]}"

    @cached_property
    def identity(self) -> str:
        if not os.path.isdir(self.path):
            return f"{self.path}@{self.revision}"
        root = Path(self.path)
        digest = hashlib.sha256()
        for file in sorted({file for pattern in _FINGERPRINTED_FILES for file in root.glob(pattern)}):
            digest.update(f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\0".encode())
            with open(file, "rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
        return f"sha256:{digest.hexdigest()}"

    @cached_property
    def model(self) -> torch.nn.Module:
        model, info = AutoModel.from_pretrained(
            self.path, revision=self.revision, dtype=self.dtype, use_safetensors=True, output_loading_info=True
        )
        # A pooler that was never trained is ignored for `image` (see `images`) and not used for `text`.
        missing = [key for key in info["missing_keys"] if self.role == "cross" or not key.startswith("pooler.")]
        if missing:
            raise ValueError(
                f"The {self.role} teacher {self.path} lacks {len(missing)} weights, such as {sorted(missing)[:3]}: they "
                "would be random. Use a complete checkpoint of an architecture `AutoModel` knows."
            )
        if self.role == "cross" and not hasattr(model, "get_text_features"):
            raise ValueError(
                f"The cross teacher {self.path} is a {type(model).__name__}, which embeds only one modality. Use a dual "
                "encoder such as CLIP or SigLIP."
            )
        self.untrained_pooler = any(key.startswith("pooler.") for key in info["missing_keys"])
        return model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def image_processor(self):
        # Pillow's resizing whether torchvision is installed or not: the two differ, and cached embeddings are shared.
        return AutoImageProcessor.from_pretrained(self.path, revision=self.revision, backend="pil")

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.path, revision=self.revision)

    @cached_property
    def max_length(self) -> int:
        lengths = [self.tokenizer.model_max_length, self.config.get_text_config().max_position_embeddings]
        sentence_transformers = self._read_json("sentence_bert_config.json") or {}
        if sentence_transformers.get("max_seq_length"):
            lengths.append(sentence_transformers["max_seq_length"])
        return min(lengths)

    def _read_json(self, filename: str) -> Any:
        file = cached_file(self.path, filename, revision=self.revision, _raise_exceptions_for_missing_entries=False)
        return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))

    def _read_pooling(self) -> str:
        modules = {module["type"].rsplit(".", 1)[-1] for module in self._read_json("modules.json") or []}
        if unknown := modules - {"Transformer", "Pooling", "Normalize"}:
            raise ValueError(
                f"The text teacher {self.path} has sentence-transformers modules that are not applied here: "
                f"{', '.join(sorted(unknown))}. Use a model made of Transformer, Pooling and Normalize."
            )
        config = self._read_json("1_Pooling/config.json")
        if config is None:
            return "cls"
        modes = [
            key.removeprefix("pooling_mode_")
            for key, value in config.items()
            if key.startswith("pooling_mode_") and value is True
        ]
        if config.get("pooling_mode"):
            modes = [config["pooling_mode"]] if isinstance(config["pooling_mode"], str) else config["pooling_mode"]
        modes = [{"cls_token": "cls", "mean_tokens": "mean"}.get(mode, mode) for mode in modes]
        if len(modes) != 1 or modes[0] not in ("cls", "mean", "lasttoken"):
            raise ValueError(
                f"The text teacher {self.path} pools by {modes} (1_Pooling/config.json). Use a model that pools by one "
                "of cls, mean or lasttoken."
            )
        return modes[0]

    def images(self, images: list[Image.Image]) -> torch.Tensor:
        inputs = self.image_processor(images, return_tensors="pt")
        inputs = inputs.to(self.device, self.dtype)
        if self.role == "cross":
            return self._checked(self.model.get_image_features(**inputs).pooler_output)
        outputs = self.model(**inputs)
        if outputs.get("pooler_output") is None or self.untrained_pooler:
            return self._checked(outputs.last_hidden_state[:, 0])
        return self._checked(outputs.pooler_output.flatten(1))  # convolutional models keep (n, dim, 1, 1)

    def texts(self, texts: list[str]) -> tuple[torch.Tensor, int]:
        truncated = sum(len(ids) > self.max_length for ids in self.tokenizer(texts, verbose=False)["input_ids"])
        # SigLIP saw every text padded to its full length, without a mask.
        siglip = self.role == "cross" and self.config.model_type in ("siglip", "siglip2")
        inputs = self.tokenizer(
            texts,
            padding="max_length" if siglip else True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(self.device)
        if self.role == "cross":
            if siglip:
                inputs = {"input_ids": inputs["input_ids"]}
            return self._checked(self.model.get_text_features(**inputs).pooler_output), truncated
        hidden = self.model(**inputs).last_hidden_state
        mask = inputs["attention_mask"]
        if self.pooling == "mean":
            weights = mask[..., None].to(hidden.dtype)
            return self._checked((hidden * weights).sum(1) / weights.sum(1)), truncated
        # The position of the first or last token that is not padding, on whichever side the tokenizer pads.
        position = mask.argmax(1) if self.pooling == "cls" else mask.shape[1] - 1 - mask.flip(1).argmax(1)
        return self._checked(hidden[torch.arange(len(texts), device=self.device), position]), truncated

    def _checked(self, features: torch.Tensor) -> torch.Tensor:
        features = features.float()
        if not torch.isfinite(features).all():
            raise ValueError(
                f"The {self.role} teacher {self.path} gave values that are not finite in {self.dtype}. "
                "Use dtype=torch.float32 or torch.bfloat16."
            )
        return features


class TripleEncoder:
    """
    Embeds slices (whole images and whole texts) with three frozen models, as the labels of structure-induced training
    need them.

    A slice's embedding is `concat(a1, a2)`, each half of length one. `a2` comes from a dual encoder such as CLIP and
    compares an image with a text. `a1` compares slices of one modality with each other, and comes from a model that does
    this better than CLIP: a self-supervised vision model for images, a sentence encoder for texts. Where these two differ
    in width, the narrower one is padded with zeros, which leaves its inner products alone. With `image=None, text=None`
    the dual encoder does everything, `split` is `None` and an embedding is just its vector.

    Paper: [Unified Generative and Discriminative Training for Multi-modal Large Language
    Models](https://huggingface.co/papers/2411.00304), the triple kernel of section 3.

    Every checkpoint may be a Hub id or a local directory, with weights in safetensors; remote code is never run. The
    weights are read when something is first embedded, so that `fingerprint` and `description` are cheap. Images go
    through each checkpoint's own processor with Pillow as the backend. Texts are embedded as they are, without the
    instructions some sentence encoders put before retrieval queries; they are pooled as the checkpoint's
    sentence-transformers configuration says (first token, mean or last token), else by the first token.

    Args:
        image (`str`, *optional*, defaults to `"facebook/dinov2-base"`):
            Vision model whose pooled output is `a1` of images. The first token's state is used where the checkpoint
            has no trained pooler.
        text (`str`, *optional*, defaults to `"BAAI/bge-base-en-v1.5"`):
            Text encoder whose pooled output is `a1` of texts.
        cross (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Dual encoder (CLIP, SigLIP, ...: a model with `get_image_features` and `get_text_features`) for `a2`.
        revisions (`dict[str, str]`, *optional*):
            Branch, tag or commit of the Hub checkpoints, by `"image"`, `"text"` and `"cross"`.
        device (`str` or `torch.device`, *optional*):
            Defaults to the machine's accelerator, else the CPU.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Data type the models run in. Embeddings are always float32.
        batch_size (`int`, *optional*, defaults to `64`):
            Images or texts in one forward pass.

    Attributes:
        split (`int` or `None`): width of `a1`.
        dim (`int`): width of the whole embedding.
        description (`str`): the checkpoints and their versions, for messages.
        fingerprint (`str`): SHA-256 over everything that decides the embeddings: id and resolved commit of Hub
            checkpoints, the files themselves of local ones (moving a directory changes nothing), pooling and data type.

    Raises:
        `ValueError`: if only one of `image` and `text` is `None`, or a checkpoint lacks weights, pools in a way that is
            not known here, or is not of the kind its place needs.
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
        cross: str = "openai/clip-vit-large-patch14",
        *,
        revisions: dict[str, str] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
    ):
        if (image is None) != (text is None):
            raise ValueError(
                f"`image` is {image!r} and `text` is {text!r}: give both (triple kernel) or neither (`cross` alone)."
            )
        if unknown := set(revisions or {}) - {"image", "text", "cross"}:
            raise ValueError(f"Unknown teachers in `revisions`: {sorted(unknown)}. Valid are image, text and cross.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if device is None:
            device = torch.accelerator.current_accelerator() or "cpu"
        self.device = torch.device(device)
        self.dtype = dtype
        self.batch_size = batch_size
        self._image, self._text, self._cross = (
            None if path is None else _Teacher(role, str(path), (revisions or {}).get(role), self.device, dtype)
            for role, path in (("image", image), ("text", text), ("cross", cross))
        )

    @classmethod
    def from_teachers(cls, teachers: dict[str, str | None] | None, **kwargs) -> "TripleEncoder":
        """
        Build from the `teachers` mapping of a training configuration.

        Args:
            teachers (`dict[str, str]` or `None`):
                Checkpoints by `"image"`, `"text"` and `"cross"`. The mapping names the whole set: with `"cross"` alone it
                does everything. `None` stands for the defaults of the constructor.
            kwargs:
                Passed on to the constructor.

        Returns:
            [`TripleEncoder`]

        Raises:
            `ValueError`: for another key, a mapping without `"cross"`, or one with only one of `"image"` and `"text"`.
        """
        if teachers is None:
            return cls(**kwargs)
        if unknown := set(teachers) - {"image", "text", "cross"}:
            raise ValueError(f"Unknown keys in `teachers`: {sorted(unknown)}. Valid are image, text and cross.")
        if teachers.get("cross") is None:
            raise ValueError("`teachers` has no `cross`: name a dual encoder such as openai/clip-vit-large-patch14.")
        return cls(**{"image": None, "text": None, **teachers}, **kwargs)

    @property
    def _teachers(self) -> list[_Teacher]:
        return [teacher for teacher in (self._image, self._text, self._cross) if teacher is not None]

    @property
    def description(self) -> str:
        return f"{', '.join(map(str, self._teachers))}, {self.dtype}"

    @cached_property
    def fingerprint(self) -> str:
        parts = {teacher.role: [teacher.identity, teacher.pooling] for teacher in self._teachers}
        return hashlib.sha256(json.dumps([parts, str(self.dtype)], sort_keys=True).encode()).hexdigest()

    # Widths are taken from an actual output: configurations of different architectures name them differently.
    @cached_property
    @torch.no_grad()
    def split(self) -> int | None:
        if self._image is None:
            return None
        return max(self._image.images([Image.new("RGB", (32, 32))]).shape[1], self._text.texts(["a"])[0].shape[1])

    @cached_property
    @torch.no_grad()
    def dim(self) -> int:
        return (self.split or 0) + self._cross.texts(["a"])[0].shape[1]

    def modality(self, slices: Sequence[str | Image.Image]) -> torch.Tensor:
        """
        Args:
            slices (`Sequence[str | PIL.Image.Image]`):
                Texts and images.

        Returns:
            `torch.Tensor` of shape `(len(slices),)` and dtype `torch.int64`: `TEXT` or `IMAGE` for each slice.

        Raises:
            `TypeError`: for a slice of another type.
        """
        codes = []
        for i, item in enumerate(slices):
            if not isinstance(item, str | Image.Image):
                raise TypeError(f"slices[{i}] is a {type(item).__name__}. A slice is a `str` or a PIL image.")
            codes.append(TEXT if isinstance(item, str) else IMAGE)
        return torch.tensor(codes, dtype=torch.int64)

    @torch.no_grad()
    def encode(
        self,
        slices: Sequence[str | Image.Image],
        progress: bool = False,
        truncated: Counter | None = None,
    ) -> torch.Tensor:
        """
        Embed slices.

        Args:
            slices (`Sequence[str | PIL.Image.Image]`):
                Texts and images in any order. Images of any mode are brought to RGB.
            progress (`bool`, *optional*, defaults to `False`):
                Show a progress bar.
            truncated (`collections.Counter`, *optional*):
                Texts longer than a teacher takes are cut. Their number is logged once as a warning when the call ends;
                given this counter, it is added to it instead, by teacher, for the caller to report.

        Returns:
            `torch.Tensor` of shape `(len(slices), dim)` and dtype `torch.float32`, on the CPU, in the order of `slices`.
            Both halves have length one.

        Raises:
            `TypeError`: for a slice of another type.
            `ValueError`: for an empty text, an image that cannot be decoded, or values that are not finite in the chosen
                `dtype`.
        """
        codes = self.modality(slices).tolist()
        for i, item in enumerate(slices):
            if isinstance(item, str) and not item.strip():
                raise ValueError(f"slices[{i}] is an empty text. Leave it out.")
        images = [i for i, code in enumerate(codes) if code == IMAGE]
        # Texts of like length share a batch: less padding.
        texts = sorted((i for i, code in enumerate(codes) if code == TEXT), key=lambda i: len(slices[i]))
        counts = Counter()
        embeddings = torch.zeros(len(slices), self.dim)
        with (
            torch.autocast(self.device.type, enabled=False),  # labels must not depend on the trainer's precision
            tqdm(total=len(slices), desc="Embedding slices", unit="slice", disable=not progress) as bar,
        ):
            for indices, embed in ((images, self._embed_images), (texts, self._embed_texts)):
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    embeddings[batch] = embed([slices[i] for i in batch], counts)
                    bar.update(len(batch))
        if truncated is None:
            self.warn_truncated(counts, len(texts))
        else:
            truncated.update(counts)
        return embeddings

    def warn_truncated(self, truncated: Counter, texts: int) -> None:
        """
        Log in one warning how many texts were cut, if any.

        Args:
            truncated (`collections.Counter`):
                As filled by [`~TripleEncoder.encode`].
            texts (`int`):
                Number of texts it was filled from.
        """
        if truncated:
            parts = [
                f"{truncated[t.role]} at {t.max_length} tokens by the {t.role} teacher {t.path}"
                for t in self._teachers
                if truncated[t.role]
            ]
            logger.warning(
                "Of %d texts some were cut: %s. What was cut has no influence on their embeddings; split long texts "
                "into several slices.",
                texts,
                ", ".join(parts),
            )

    def _embed_images(self, images: list[Image.Image], truncated: Counter) -> torch.Tensor:
        images = [load_image(image) for image in images]
        return self._join(None if self._image is None else self._image.images(images), self._cross.images(images))

    def _embed_texts(self, texts: list[str], truncated: Counter) -> torch.Tensor:
        halves = []
        for teacher in (self._text, self._cross):
            if teacher is None:
                halves.append(None)
                continue
            half, cut = teacher.texts(texts)
            halves.append(half)
            if cut:
                truncated[teacher.role] += cut
        return self._join(*halves)

    def _join(self, first: torch.Tensor | None, second: torch.Tensor) -> torch.Tensor:
        second = F.normalize(second, dim=-1).cpu()
        if first is None:
            return second
        first = F.normalize(first, dim=-1).cpu()
        return torch.cat([F.pad(first, (0, self.split - first.shape[1])), second], dim=1)
