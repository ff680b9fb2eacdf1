"""One frozen checkpoint: how it is loaded, checked, and made to embed images or texts."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from hf_sugar.distributed import loaded_whole
from hf_sugar.models.packing_sugar import lay_rows, unlay_rows, why_padded


logger = logging.getLogger(__name__)

# What decides a local checkpoint's output; a model card or training state beside it does not.
_FINGERPRINTED_FILES = (
    *("*.safetensors", "config.json", "*processor_config.json", "modules.json", "sentence_bert_config.json"),
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model"),
    "1_Pooling/config.json",
)

# sentence-transformers writes `pooling_mode`, and wrote a flag for each mode before.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
}

# By role, the only input of a model that is not a dual encoder, and what to use.
_KINDS = {
    "image": ("pixel_values", "a vision model such as DINOv2, or a dual encoder such as CLIP"),
    "text": ("input_ids", "a text encoder such as BGE, or a dual encoder such as CLIP"),
    "cross": (None, "a dual encoder of images and texts, such as CLIP or SigLIP"),
}


@dataclass(eq=False)
class Teacher:
    """One frozen checkpoint. Construction resolves it; the weights are read when first needed."""

    role: str
    path: str
    revision: str | None
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    long_text: str

    def __post_init__(self):
        self.name = f"the {self.role} teacher {self.path!r} (setting `teachers`)"
        self.has_met_long_text = False
        # The resolved commit serves every later read, so that all files come from one state of the repository.
        with self._loading():
            config_file = cached_file(self.path, "config.json", revision=self.revision)
            if not os.path.isdir(self.path):
                self.revision = extract_commit_hash(config_file, None)
            self.config = AutoConfig.from_pretrained(self.path, revision=self.revision)
        self.pooling = self._read_pooling() if self.role == "text" else None

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
        root, digest = Path(self.path), hashlib.sha256()
        for file in sorted({file for pattern in _FINGERPRINTED_FILES for file in root.glob(pattern)}):
            with open(file, "rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{file.relative_to(root).as_posix()}\0{content}\0".encode())
        return f"sha256:{digest.hexdigest()}"

    @cached_property
    def model(self) -> torch.nn.Module:
        # What is missing is judged below: a report that calls a pooler random would only worry.
        report = logging.getLogger("transformers.modeling_utils")
        report.addFilter(silence := lambda record: False)
        try:
            with self._loading(), loaded_whole():
                model, info = AutoModel.from_pretrained(
                    self.path, revision=self.revision, dtype=self.dtype, use_safetensors=True, output_loading_info=True
                )
        finally:
            report.removeFilter(silence)
        self.dual = all(hasattr(model, f"get_{modality}_features") for modality in ("image", "text"))
        # A pooler that was never trained is ignored for `image` (see `images`) and not used for `text`.
        missing = [key for key in info["missing_keys"] if self.dual or not key.startswith("pooler.")]
        if missing:
            lacking = f"{len(missing)} weights, such as {sorted(missing)[:3]}, which would be random"
            raise ValueError(f"cannot load {self.name}: it lacks {lacking}. Use a complete checkpoint.")
        self.untrained_pooler = any(key.startswith("pooler.") for key in info["missing_keys"])
        kinds = {model.input_modalities} if isinstance(model.input_modalities, str) else set(model.input_modalities)
        only_input, advice = _KINDS[self.role]
        single = model.main_input_name == only_input and len(kinds) == 1 and not model.config.is_encoder_decoder
        if not self.dual and not single:
            kind = type(model).__name__
            raise ValueError(f"{self.name} is a {kind}, which does not embed what this teacher has to. Use {advice}.")
        return model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def width(self) -> int:
        """Of an actual output: configurations of different architectures name it differently. What gives no definite
        embedding is refused."""
        kind = type(self.model).__name__  # a model of a wrong kind is refused before its processor is missed
        if self.role == "image":
            first, second = (self.images([Image.linear_gradient("L").convert("RGB")]) for _ in range(2))
            if not torch.allclose(first, second, rtol=1e-4, atol=1e-5):
                problem = "gives another embedding each time (does it mask patches at random?)"
                raise ValueError(f"{self.name}, a {kind}, {problem}. Use a model that does not.")
            return first.shape[1]
        first, second = self.texts(["a"]), self.texts(["a a"])
        # zeros are named with their slice
        alike = bool(first.any()) and torch.allclose(first, second, rtol=1e-4, atol=1e-5)
        if alike and self.dual:
            # CLIP pools the first token where its `eos_token_id` is not in a text, and the highest number where that is 2
            problem = "gives 'a' and 'a a' the same embedding"
            remedy = f"CLIP's text configuration needs the `eos_token_id` of its tokenizer, {self.tokenizer.eos_token_id}, not 2."
            raise ValueError(f"{self.name}, a {kind}, {problem}. {remedy}")
        if alike and self.pooling == "cls":
            problem = "is pooled by its first token, which does not see the text after it"
            remedy = "Use a text encoder such as BGE, or a model whose 1_Pooling/config.json says how it pools."
            raise ValueError(f"{self.name}, a {kind}, {problem}. {remedy}")
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

    def _read_pooling(self) -> str:
        modules = self._read_json("modules.json") or []
        paths = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in modules}
        file = f"{paths.get('Pooling', '1_Pooling')}/config.json"
        config = self._read_json(file)
        if config is None:
            config = {"pooling_mode": "cls"}
        modes = config.get("pooling_mode") or [key for key in config if config[key] is True and "pooling_mode_" in key]
        modes = [_POOLING_FLAGS.get(mode, mode) for mode in ([modes] if isinstance(modes, str) else modes)]
        if modes not in (["cls"], ["mean"], ["lasttoken"]) or paths.keys() - {"Transformer", "Pooling", "Normalize"}:
            has = f"pools by {modes} ({file}) and has the sentence-transformers modules {list(paths)}"
            wanted = "pools by one of cls, mean and lasttoken, made of Transformer, Pooling and Normalize"
            raise ValueError(f"{self.name} {has}. Use a model that {wanted}.")
        return modes[0]

    def images(self, images: list[Image.Image]) -> torch.Tensor:
        inputs = self.image_processor(images, return_tensors="pt").to(self.device, self.dtype)
        model = self.model
        if self.dual:
            return model.get_image_features(**inputs).pooler_output.float()
        outputs = model(**inputs)
        if outputs.get("pooler_output") is not None and not self.untrained_pooler:
            return outputs.pooler_output.flatten(1).float()  # convolutional models keep (n, dim, 1, 1)
        if outputs.last_hidden_state.ndim != 3:
            lacking = "has neither a pooled output nor a first token. Use a vision model with one, such as DINOv2."
            raise ValueError(f"{self.name}, a {type(model).__name__}, {lacking}")
        return outputs.last_hidden_state[:, 0].float()

    def texts(self, texts: list[str]) -> torch.Tensor:
        if self.role == "text":  # what sentence-transformers does before tokenizing
            lower = self._sentence_transformers.get("do_lower_case")
            texts = [text.strip().lower() if lower else text.strip() for text in texts]
        windows = [[text] for text in texts]
        for i, length in enumerate(self._lengths(texts)):
            if length <= self.max_length:
                continue
            if self.long_text == "windows":
                windows[i] = self._windows(texts[i])
            if not self.has_met_long_text:
                self.has_met_long_text = True
                done = "split into windows, whose embeddings are averaged" if windows[i][1:] else "cut at their ends"
                logger.warning("Texts longer than the %d tokens of %s are %s.", self.max_length, self.name, done)
        flat = [window for parts in windows for window in parts]
        features = [
            F.normalize(self._features(flat[start : start + self.batch_size]), dim=-1)
            for start in range(0, len(flat), self.batch_size)
        ]
        means = [parts.mean(0) for parts in torch.cat(features).split([len(parts) for parts in windows])]
        return F.normalize(torch.stack(means), dim=-1)

    def _lengths(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]

    def _windows(self, text: str) -> list[str]:
        """Halves at the space nearest the middle, and halves of these, until each part fits."""
        text = text.strip()
        if self._lengths([text])[0] <= self.max_length or len(text) < 2:
            return [text]
        middle = len(text) // 2
        spaces = [match.start() for match in re.finditer(r"\s+", text)]
        cut = min(spaces, key=lambda position: abs(position - middle), default=middle)
        return self._windows(text[:cut]) + self._windows(text[cut:])

    def _features(self, texts: list[str]) -> torch.Tensor:
        # SigLIP saw every text padded to its full length, without a mask.
        siglip = self.config.model_type in ("siglip", "siglip2")
        padding = "max_length" if siglip else True
        lengths = {"padding": padding, "truncation": True, "max_length": self.max_length}
        inputs = self.tokenizer(texts, return_tensors="pt", **lengths).to(self.device)
        if self.dual:
            inputs = {"input_ids": inputs["input_ids"]} if siglip else inputs
            return self.model.get_text_features(**inputs).pooler_output.float()
        return self._pooled(inputs, self.padding_free)

    @cached_property
    def padding_free(self) -> bool:
        """Whether texts laid end to end get the embeddings that they get padded, which is tried. Of short texts on a GPU a call
        of attention for each would cost more than the padding."""
        if self.device.type != "cpu":
            return False
        if not (reason := why_padded(self.model)):
            inputs = self.tokenizer(["a", "a a a a a a a a"], return_tensors="pt", padding=True).to(self.device)
            padded, laid = (F.normalize(self._pooled(inputs, padding_free), dim=-1) for padding_free in (False, True))
            if not (padded - laid).norm(dim=-1).max() < torch.finfo(self.dtype).eps ** 0.5:
                reason = "it counts positions in a way of its own"
        if reason:
            logger.warning("The texts of %s are padded: %s.", self.name, reason)
        return not reason

    def _pooled(self, inputs, padding_free: bool) -> torch.Tensor:
        mask = inputs["attention_mask"]
        inputs, rows = lay_rows(self.model, inputs, padding_free)
        hidden = unlay_rows(self.model(**inputs).last_hidden_state, rows)
        if self.pooling == "mean":
            return ((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).float()
        # the first or last token that is not padding, on whichever side the tokenizer pads
        first, last = mask.argmax(1), mask.shape[1] - 1 - mask.flip(1).argmax(1)
        return hidden[torch.arange(len(mask)), first if self.pooling == "cls" else last].float()
