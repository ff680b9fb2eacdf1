"""One frozen checkpoint: how it is loaded, checked, and made to embed images or texts."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash


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

# How sentence-transformers calls them in its older configurations.
_POOLING_NAMES = {
    "cls_token": "cls",
    "mean_tokens": "mean",
    "max_tokens": "max",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
}


def _nothing(record: logging.LogRecord) -> bool:
    return False


class Teacher:
    """One frozen checkpoint. Construction resolves it; the weights are read when first needed."""

    def __init__(
        self,
        role: str,
        path: str,
        revision: str | None,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        long_text: str,
    ):
        self.role = role
        self.path = path
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.long_text = long_text
        self.name = f"the {role} teacher {path!r} (setting `teachers`)"
        # The resolved commit serves every later read, so that all files come from one state of the repository.
        self.revision = revision
        with self._loading():
            config_file = cached_file(path, "config.json", revision=revision)
            if not os.path.isdir(path):
                self.revision = extract_commit_hash(config_file, None)
            self.config = AutoConfig.from_pretrained(path, revision=self.revision)
        self.pooling = self._read_pooling() if role == "text" else None

    def __str__(self) -> str:
        state = self.identity.removeprefix("sha256:") if os.path.isdir(self.path) else self.revision
        return f"{self.role}={self.path}@{state[:12]}"

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Errors of the libraries below name neither the setting nor what the checkpoint is for."""
        try:
            yield
        except Exception as error:
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"cannot load {self.name}: {error}") from error

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
        # what is missing is judged below: a report that calls a pooler random would only worry
        report = logging.getLogger("transformers.modeling_utils")
        report.addFilter(_nothing)
        try:
            with self._loading():
                model, info = AutoModel.from_pretrained(
                    self.path, revision=self.revision, dtype=self.dtype, use_safetensors=True, output_loading_info=True
                )
        finally:
            report.removeFilter(_nothing)
        self.dual = all(hasattr(model, f"get_{modality}_features") for modality in ("image", "text"))
        # A pooler that was never trained is ignored for `image` (see `images`) and not used for `text`.
        missing = [key for key in info["missing_keys"] if self.dual or not key.startswith("pooler.")]
        if missing:
            raise ValueError(
                f"cannot load {self.name}: it lacks {len(missing)} weights, such as {sorted(missing)[:3]}, which would be "
                "random. Use a complete checkpoint of an architecture `AutoModel` knows."
            )
        kinds = {model.input_modalities} if isinstance(model.input_modalities, str) else set(model.input_modalities)
        wanted, advice = {
            "image": ("pixel_values", "a vision model such as DINOv2, or a dual encoder such as CLIP"),
            "text": ("input_ids", "a text encoder such as BGE, or a dual encoder such as CLIP"),
            "cross": (None, "a dual encoder of images and texts, such as CLIP or SigLIP"),
        }[self.role]
        single = model.main_input_name == wanted and len(kinds) == 1 and not model.config.is_encoder_decoder
        if not self.dual and not single:
            raise ValueError(
                f"{self.name} is a {type(model).__name__}, which does not embed what this teacher has to. Use {advice}."
            )
        self.untrained_pooler = any(key.startswith("pooler.") for key in info["missing_keys"])
        return model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def width(self) -> int:
        # Taken from an actual output: configurations of different architectures name it differently.
        kind = type(self.model).__name__  # a model of a wrong kind is refused before its processor is missed
        if self.role == "cross":
            return self.texts(["a"])[0].shape[1]
        if self.role == "text":
            one, longer = (self.texts([text])[0] for text in ("a", "a a"))
            if self.pooling == ["cls"] and not self.dual and torch.allclose(one, longer, rtol=1e-4, atol=1e-5):
                raise ValueError(
                    f"{self.name}, a {kind}, is pooled by its first token, which does not see the text "
                    "after it. Use a text encoder such as BGE, or a model whose 1_Pooling/config.json says how it pools."
                )
            return one.shape[1]
        first, second = (self.images([Image.linear_gradient("L").convert("RGB")]) for _ in range(2))
        if not torch.allclose(first, second, rtol=1e-4, atol=1e-5):
            raise ValueError(
                f"{self.name}, a {kind}, gives another embedding each time (does it mask patches at "
                "random?). Use a model that does not."
            )
        return first.shape[1]

    @cached_property
    def image_processor(self):
        # Pillow's resizing whether torchvision is installed or not: the two differ, and stored embeddings are shared.
        with self._loading():
            return AutoImageProcessor.from_pretrained(self.path, revision=self.revision, backend="pil")

    @cached_property
    def tokenizer(self):
        with self._loading():
            return AutoTokenizer.from_pretrained(self.path, revision=self.revision)

    @cached_property
    def max_length(self) -> int:
        lengths = [
            self.tokenizer.model_max_length,
            self.config.get_text_config().to_dict().get("max_position_embeddings"),
            self._sentence_transformers.get("max_seq_length"),
        ]
        return min(length for length in lengths if length)

    @cached_property
    def _sentence_transformers(self) -> dict[str, Any]:
        return self._read_json("sentence_bert_config.json") or {}

    def _read_json(self, filename: str) -> Any:
        file = cached_file(self.path, filename, revision=self.revision, _raise_exceptions_for_missing_entries=False)
        return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))

    def _read_pooling(self) -> list[str]:
        modules = {
            module["type"].rsplit(".", 1)[-1]: module["path"] for module in self._read_json("modules.json") or []
        }
        if unknown := modules.keys() - {"Transformer", "Pooling", "Normalize"}:
            raise ValueError(
                f"{self.name} has sentence-transformers modules that are not applied here: "
                f"{', '.join(sorted(unknown))}. Use a model made of Transformer, Pooling and Normalize."
            )
        file = f"{modules.get('Pooling', '1_Pooling')}/config.json"
        config = self._read_json(file)
        if config is None:
            return ["cls"]
        modes = [
            key.removeprefix("pooling_mode_")
            for key, value in config.items()
            if key.startswith("pooling_mode_") and value is True
        ]
        if config.get("pooling_mode"):
            modes = [config["pooling_mode"]] if isinstance(config["pooling_mode"], str) else config["pooling_mode"]
        modes = [_POOLING_NAMES.get(mode, mode) for mode in modes]
        if not modes or not set(modes) <= {"cls", "mean", "mean_sqrt_len", "max", "lasttoken"}:
            raise ValueError(
                f"{self.name} pools by {modes} ({file}). Use a model that pools by cls, mean, "
                "mean_sqrt_len, max or lasttoken."
            )
        return modes

    def images(self, images: list[Image.Image]) -> torch.Tensor:
        inputs = self.image_processor(images, return_tensors="pt")
        inputs = inputs.to(self.device, self.dtype)
        model = self.model
        if self.dual:
            return model.get_image_features(**inputs).pooler_output.float()
        outputs = model(**inputs)
        if outputs.get("pooler_output") is not None and not self.untrained_pooler:
            return outputs.pooler_output.flatten(1).float()  # convolutional models keep (n, dim, 1, 1)
        if outputs.last_hidden_state.ndim != 3:
            raise ValueError(
                f"{self.name}, a {type(model).__name__}, has neither a pooled output nor a first token. Use a vision model "
                "with one of them, such as DINOv2."
            )
        return outputs.last_hidden_state[:, 0].float()

    def texts(self, texts: list[str]) -> tuple[torch.Tensor, int]:
        """Embeddings, each of length one, and how many texts are longer than the model takes."""
        if self.role == "text":  # what sentence-transformers does before tokenizing
            lower = self._sentence_transformers.get("do_lower_case")
            texts = [text.strip().lower() if lower else text.strip() for text in texts]
        long = [length > self.max_length for length in self._lengths(texts)]
        split = self.long_text == "windows" and any(long)
        parts = [self._windows(text) if split and over else [text] for text, over in zip(texts, long, strict=True)]
        flat = [window for windows in parts for window in windows]
        features = [
            F.normalize(self._features(flat[start : start + self.batch_size]), dim=-1)
            for start in range(0, len(flat), self.batch_size)
        ]
        means = [windows.mean(0) for windows in torch.cat(features).split([len(windows) for windows in parts])]
        return F.normalize(torch.stack(means), dim=-1), sum(long)

    def _lengths(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]

    def _windows(self, text: str) -> list[str]:
        """Halves at the space nearest the middle, and halves of these, until each part fits."""
        if self._lengths([text])[0] <= self.max_length or len(text) < 2:
            return [text]
        middle = len(text) // 2
        spaces = [
            match.start() for match in re.finditer(r"\s+", text) if 0 < match.start() and match.end() < len(text)
        ]
        cut = min(spaces, key=lambda place: abs(place - middle), default=middle)
        return self._windows(text[:cut].strip()) + self._windows(text[cut:].strip())

    def _features(self, texts: list[str]) -> torch.Tensor:
        # SigLIP saw every text padded to its full length, without a mask.
        siglip = self.config.model_type in ("siglip", "siglip2")
        inputs = self.tokenizer(
            texts,
            padding="max_length" if siglip else True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(self.device)
        model = self.model
        if self.dual:
            if siglip:
                inputs = {"input_ids": inputs["input_ids"]}
            return model.get_text_features(**inputs).pooler_output.float()
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].bool()
        rows = torch.arange(len(texts), device=self.device)
        pooled = []
        for mode in self.pooling:
            if mode == "max":
                pooled.append(hidden.masked_fill(~mask[..., None], float("-inf")).amax(1))
            elif mode in ("mean", "mean_sqrt_len"):
                total = (hidden * mask[..., None]).sum(1)
                count = mask.sum(1, keepdim=True)
                pooled.append(total / (count if mode == "mean" else count.sqrt()))
            else:  # the first or last token that is not padding, on whichever side the tokenizer pads
                last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
                pooled.append(hidden[rows, mask.int().argmax(1) if mode == "cls" else last])
        return torch.cat(pooled, dim=1).float()
