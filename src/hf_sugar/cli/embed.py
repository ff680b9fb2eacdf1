"""Embeddings of a dataset or of files, into a safetensors file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from safetensors.numpy import save_file

from hf_sugar.data import load_data
from hf_sugar.distributed import distributed_state
from hf_sugar.files import replacing
from hf_sugar.retrieval import SugarIndex, find_files

from .arguments import setting
from .checkpoint import ModelArguments


@dataclass
class CorpusArguments:
    """What to embed."""

    data: list[str] | None = setting("Datasets: paths, Hub ids, or mappings as {path: a.json, image_root: b}.", None)
    files: list[str] | None = setting("Image and text files, folders of them, or patterns.", None)
    split: str = setting("Split of datasets that have several.", "train")
    on_bad_row: str = setting("What to do with a malformed row.", "error", choices=["error", "skip"])
    by: str = setting(
        "What of a row is embedded: the question (without answers), the whole document, its images or texts; "
        "auto is the question where there are answers.",
        "auto",
        choices=["auto", "question", "document", "images", "texts"],
    )
    every_slice: bool = setting("Embed every prefix that ends with a slice.", False)

    def items(self) -> Any:
        """Rows or files."""
        if (self.data is None) == (self.files is None):
            raise ValueError("Set one of `data` (datasets) and `files` (images and texts).")
        if self.files and self.split != "train":
            raise ValueError("`split` is of datasets, and `files` have none. Leave it out.")
        return find_files(self.files) if self.files else load_data(self.data, self.split, on_bad_row=self.on_bad_row)


@dataclass
class EmbedArguments:
    output: str = setting(
        "File to write. Several processes write one each, NAME-00000-of-00016.safetensors: their rows one after the other "
        "are those of one process.",
        "embeddings.safetensors",
    )


def embed(model: ModelArguments, corpus: CorpusArguments, args: EmbedArguments) -> SugarIndex:
    """Write a safetensors file: `embeddings` of shape `(items, dim)`, `document` and `slice` of each, and in its header the
    model's `fingerprint` and the documents' `metadata`. Returns the same as an index, in memory. Under `accelerate launch`
    each process embeds its share."""
    output = Path(args.output)
    if output.is_dir():
        raise ValueError(f"`output` is the directory {args.output!r}; name a file.")
    items, state = corpus.items(), distributed_state()
    if state.num_processes > 1:
        if len(items) < state.num_processes:
            raise ValueError(f"There are {len(items)} items for {state.num_processes} processes. Start fewer.")
        start, end = (len(items) * (state.process_index + n) // state.num_processes for n in (0, 1))
        items = items.select(range(start, end)) if isinstance(items, Dataset) else items[start:end]
        share = f"{output.stem}-{state.process_index:05d}-of-{state.num_processes:05d}{output.suffix}"
        output = output.with_name(share)
    output.parent.mkdir(parents=True, exist_ok=True)
    embedder = model.embedder()
    settings = {"by": corpus.by, "every_slice": corpus.every_slice, "on_bad_row": corpus.on_bad_row}
    index = SugarIndex.build(items, embedder, **settings, progress=True)
    header = {"fingerprint": embedder.fingerprint, "metadata": json.dumps(index.metadata, ensure_ascii=False)}
    documents, slices = index.origins
    before = sum(gather_object([len(index)])[: state.process_index])  # of other processes, less what they left out
    content = {"embeddings": index.embeddings, "document": documents + before, "slice": slices}
    with replacing(output) as path:
        save_file(content, path, metadata=header)
    print(f"{len(index)} documents, embeddings of shape {index.embeddings.shape} -> {output}")
    return index
