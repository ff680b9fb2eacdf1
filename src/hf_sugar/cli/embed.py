import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save_file

from hf_sugar.data import load_data
from hf_sugar.distributed import distributed_state
from hf_sugar.inference import SugarEmbedder
from hf_sugar.models import SugarForConditionalGeneration, SugarProcessor
from hf_sugar.retrieval import SugarIndex, find_files

from .arguments import parse


@dataclass
class ModelArguments:
    """
    The model that embeds and answers.

    Parameters:
        model_name_or_path (`str`):
            Full checkpoint or adapter repository.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision of the model.
        batch_size (`int`, *optional*, defaults to `32`):
            Items in one forward pass.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Full checkpoint or adapter repository."})
    dtype: str = field(default="auto", metadata={"help": "Precision of the model."})
    batch_size: int = field(default=32, metadata={"help": "Items in one forward pass."})

    def load(self) -> tuple[SugarForConditionalGeneration, SugarProcessor]:
        """The model, in evaluation mode on this machine's device, and its processor."""
        if self.model_name_or_path is None:
            raise ValueError("`model_name_or_path` is not set: name the checkpoint.")
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        model = SugarForConditionalGeneration.from_pretrained(self.model_name_or_path, dtype=dtype)
        return model.to(distributed_state().device).eval(), SugarProcessor.from_pretrained(self.model_name_or_path)


@dataclass
class CorpusArguments:
    """
    What to embed.

    Parameters:
        data (source or `list`, *optional*):
            Datasets: paths or Hub ids, or in YAML mappings as [`hf_sugar.data.load_data`] takes them.
        files (`list[str]`, *optional*):
            Image and text files, folders of them, or patterns.
        split (`str`, *optional*, defaults to `"train"`):
            Split of datasets that have several.
        on_bad_row (`str`, *optional*, defaults to `"error"`):
            `"error"` stops at the first malformed row, `"skip"` leaves malformed rows out and counts them.
        by (`str`, *optional*, defaults to `"auto"`):
            What of a row is embedded, as in [`SugarIndex.build`].
        every_slice (`bool`, *optional*, defaults to `False`):
            Whether to embed every prefix that ends with a slice.
    """

    data: list[str] | None = field(
        default=None,
        metadata={"help": "Datasets: paths or Hub ids, or in YAML mappings with path, format, image_root."},
    )
    files: list[str] | None = field(
        default=None, metadata={"help": "Image and text files, folders of them, or patterns."}
    )
    split: str = field(default="train", metadata={"help": "Split of datasets that have several."})
    on_bad_row: str = field(
        default="error",
        metadata={"help": "What to do with a malformed row: 'error' or 'skip'.", "choices": ["error", "skip"]},
    )
    by: str = field(
        default="auto",
        metadata={
            "help": "What of a row is embedded: the question (without answers), the whole document, its images or texts; "
            "auto is the question where there are answers.",
            "choices": ["auto", "question", "document", "images", "texts"],
        },
    )
    every_slice: bool = field(default=False, metadata={"help": "Embed every prefix that ends with a slice."})

    def items(self) -> Any:
        """Rows or files."""
        if (self.data is None) == (self.files is None):
            raise ValueError("Set one of `data` (datasets) and `files` (images and texts).")
        if self.files is not None:
            return find_files(self.files)
        return load_data(self.data, self.split, on_bad_row=self.on_bad_row)


@dataclass
class EmbedArguments:
    """
    Settings of `hf-sugar embed`.

    Parameters:
        output (`str`, *optional*, defaults to `"embeddings.safetensors"`):
            File to write.
    """

    output: str = field(default="embeddings.safetensors", metadata={"help": "File to write."})


def embed(model: ModelArguments, corpus: CorpusArguments, args: EmbedArguments) -> SugarIndex:
    """
    Embed a dataset or files and write a safetensors file: `embeddings` of shape `(items, dim)`, `document` and `slice`
    of each, and in its header the model's `fingerprint` and the documents' `metadata`.

    Args:
        model ([`ModelArguments`]), corpus ([`CorpusArguments`]), args ([`EmbedArguments`]):
            Settings.

    Returns:
        [`SugarIndex`]: the same embeddings, in memory.
    """
    embedder = SugarEmbedder(*model.load(), model.batch_size)
    index = SugarIndex.build(corpus.items(), embedder, by=corpus.by, every_slice=corpus.every_slice, progress=True)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    header = {"fingerprint": embedder.fingerprint, "metadata": json.dumps(index.metadata, ensure_ascii=False)}
    documents, slices = index.places
    save_file({"embeddings": index.embeddings, "document": documents, "slice": slices}, temporary, metadata=header)
    os.replace(temporary, output)
    return index


def main(argv: list[str]) -> None:
    model, corpus, args = parse(
        "embed", (ModelArguments, CorpusArguments, EmbedArguments), argv, "Embed a dataset or files."
    )
    index = embed(model, corpus, args)
    print(f"{len(index)} documents, embeddings of shape {index.embeddings.shape} -> {args.output}")
