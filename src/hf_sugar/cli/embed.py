import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:  # what a command works with is imported when it works: `--help` answers at once
    from hf_sugar.inference import SugarEmbedder
    from hf_sugar.retrieval import SugarIndex


@dataclass
class ModelArguments:
    """The model that embeds and answers."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Full checkpoint or adapter repository."})
    dtype: str = field(default="auto", metadata={"help": "Precision of the model."})
    batch_size: int = field(default=32, metadata={"help": "Items in one forward pass."})

    def load(self) -> "SugarEmbedder":
        """The embedder of the model, which is in evaluation mode on this machine's device."""
        if self.model_name_or_path is None:
            raise ValueError("`model_name_or_path` is not set: name the checkpoint.")
        import torch

        from hf_sugar import SugarEmbedder, SugarForConditionalGeneration, SugarProcessor
        from hf_sugar.distributed import distributed_state

        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        model = SugarForConditionalGeneration.from_pretrained(self.model_name_or_path, dtype=dtype)
        processor = SugarProcessor.from_pretrained(self.model_name_or_path)
        return SugarEmbedder(model.to(distributed_state().device).eval(), processor, self.batch_size)


@dataclass
class CorpusArguments:
    """What to embed."""

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

        from hf_sugar.data import load_data
        from hf_sugar.retrieval import find_files

        if self.files is not None:
            return find_files(self.files)
        return load_data(self.data, self.split, on_bad_row=self.on_bad_row)


@dataclass
class EmbedArguments:
    """Settings of `hf-sugar embed`."""

    output: str = field(default="embeddings.safetensors", metadata={"help": "File to write."})


def embed(model: ModelArguments, corpus: CorpusArguments, args: EmbedArguments) -> "SugarIndex":
    """
    Embed a dataset or files and write a safetensors file: `embeddings` of shape `(items, dim)`, `document` and `slice`
    of each, and in its header the model's `fingerprint` and the documents' `metadata`.

    Args:
        model ([`ModelArguments`]), corpus ([`CorpusArguments`]), args ([`EmbedArguments`]):
            Settings.

    Returns:
        [`SugarIndex`]: the same embeddings, in memory.
    """
    from safetensors.numpy import save_file

    from hf_sugar import SugarIndex
    from hf_sugar.retrieval.storage import write_atomically

    output = Path(args.output)
    if output.is_dir():
        raise ValueError(f"`output` is the directory {args.output!r}; name a file.")
    items = corpus.items()
    output.parent.mkdir(parents=True, exist_ok=True)
    embedder = model.load()
    settings = {"by": corpus.by, "every_slice": corpus.every_slice, "on_bad_row": corpus.on_bad_row}
    index = SugarIndex.build(items, embedder, **settings, progress=True)
    header = {"fingerprint": embedder.fingerprint, "metadata": json.dumps(index.metadata, ensure_ascii=False)}
    documents, slices = index.origins
    content = {"embeddings": index.embeddings, "document": documents, "slice": slices}
    write_atomically(output, lambda path: save_file(content, path, metadata=header))
    return index


def main(model: ModelArguments, corpus: CorpusArguments, args: EmbedArguments) -> None:
    index = embed(model, corpus, args)
    print(f"{len(index)} documents, embeddings of shape {index.embeddings.shape} -> {args.output}")
