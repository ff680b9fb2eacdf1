"""Exact search by cosine, with metadata, on one machine."""

import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from safetensors.numpy import load_file, save_file


FORMAT_VERSION = 1


@dataclass(frozen=True)
class Hit:
    """
    One found item.

    Args:
        index (`int`):
            Position of the item in the index.
        score (`float`):
            Cosine with the query.
        metadata (`dict[str, Any]`):
            What was stored with the item.
    """

    index: int
    score: float
    metadata: dict[str, Any]


class SugarIndex:
    """
    Embedded items with their metadata, searched exactly with FAISS.

    Args:
        embeddings (`np.ndarray` of shape `(items, dim)`):
            L2-normalised embeddings.
        metadata (`Sequence[dict[str, Any]]`, *optional*):
            One JSON-serialisable `dict` for each item, such as its path. Empty ones by default.
        fingerprint (`str`, *optional*, defaults to `""`):
            Identifies the model the embeddings come from. An index loads only with the fingerprint it was saved with,
            for embeddings of two models cannot be compared.
        embed (`Callable`, *optional*):
            Turns a list of items into L2-normalised float32 embeddings, see [`hf_sugar.evaluation.embedder`]. Needed
            only to search with queries that are not embedded yet.

    Raises:
        `ValueError`: if there are no embeddings, they are not L2-normalised, or the number of metadata differs.

    Example:

    ```python
    >>> index = SugarIndex.build(images, embed, metadata=[{"path": path} for path in paths], fingerprint="my-sugar@4f1c")
    >>> index.search(["a red circle to the left of a blue square"], k=5)[0][0].metadata["path"]
    >>> index.save("index")
    >>> index = SugarIndex.load("index", fingerprint="my-sugar@4f1c", embed=embed)
    ```
    """

    def __init__(
        self,
        embeddings: np.ndarray,
        metadata: Sequence[dict[str, Any]] | None = None,
        fingerprint: str = "",
        embed: Callable[[Sequence[Any]], np.ndarray] | None = None,
    ):
        if len(embeddings) == 0:
            raise ValueError("`embeddings` is empty. An index needs at least one item.")
        self.embeddings = _checked(embeddings, "embeddings")
        self.metadata = [{} for _ in range(len(embeddings))] if metadata is None else list(metadata)
        if len(self.metadata) != len(embeddings):
            raise ValueError(f"{len(self.metadata)} `metadata` for {len(embeddings)} items. Give one for each item.")
        self.fingerprint = fingerprint
        self.embed = embed
        self._faiss = faiss.IndexFlatIP(self.dim)
        self._faiss.add(self.embeddings)

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def dim(self) -> int:
        """`int`: dimension of the embeddings."""
        return self.embeddings.shape[1]

    @classmethod
    def build(
        cls,
        items: Sequence[Any],
        embed: Callable[[Sequence[Any]], np.ndarray],
        metadata: Sequence[dict[str, Any]] | None = None,
        fingerprint: str = "",
    ) -> "SugarIndex":
        """
        Embed items and index them.

        Args:
            items (`Sequence[str | PIL.Image.Image | list]`):
                What is to be found: texts, images, or interleaved lists of both.
            embed (`Callable`):
                Turns a list of items into L2-normalised float32 embeddings. The index keeps it for queries.
            metadata (`Sequence[dict[str, Any]]`, *optional*):
                One JSON-serialisable `dict` for each item.
            fingerprint (`str`, *optional*, defaults to `""`):
                Identifies the model.

        Returns:
            [`SugarIndex`]

        Raises:
            `ValueError`: if there are no items, or as in the constructor.
        """
        if len(items) == 0:
            raise ValueError("`items` is empty. An index needs at least one item.")
        return cls(embed(items), metadata, fingerprint, embed)

    def search(self, queries: Sequence[Any] | np.ndarray, k: int = 5) -> list[list[Hit]]:
        """
        The k most similar items of each query, best first.

        Args:
            queries (`Sequence[str | PIL.Image.Image | list]` or `np.ndarray` of shape `(queries, dim)`):
                Queries, or their L2-normalised embeddings.
            k (`int`, *optional*, defaults to `5`):
                Hits for each query. An index of fewer items gives all of them.

        Returns:
            `list[list[Hit]]`: a list for each query.

        Raises:
            `TypeError`: if `queries` is a single query.
            `ValueError`: if `k` is below 1, the dimensions differ, embeddings are not L2-normalised, or queries are not
                embedded and the index has no embedding function.
        """
        if k < 1:
            raise ValueError(f"`k` is {k}; ask for at least 1 hit.")
        if not isinstance(queries, np.ndarray):
            if not isinstance(queries, Sequence) or isinstance(queries, str):
                raise TypeError(f"`queries` is a single {type(queries).__name__}. Put it in a list.")
            if self.embed is None:
                raise ValueError(
                    "The index has no `embed` function. Pass one to `SugarIndex.load`, or embed the queries."
                )
            queries = self.embed(queries)
        queries = _checked(queries, "queries")
        if queries.shape[1] != self.dim:
            raise ValueError(
                f"`queries` have dimension {queries.shape[1]} but the index has {self.dim}. Embed them with the model the "
                "index was built with."
            )
        scores, positions = self._faiss.search(queries, min(k, len(self)))
        return [
            [Hit(int(position), float(score), self.metadata[position]) for score, position in zip(*row, strict=True)]
            for row in zip(scores, positions, strict=True)
        ]

    def save(self, directory: str | os.PathLike) -> None:
        """
        Write the index to a directory: `index.json` and a safetensors file with the embeddings.

        An index that stands in the directory already is replaced in one step: whenever the write is interrupted, either
        the old or the new one is there, whole.

        Args:
            directory (`str` or `os.PathLike`):
                Directory, created if it does not exist.
        """
        # A new name every time: index.json names the embeddings it belongs to, and replacing it is the one step.
        embeddings = f"embeddings-{uuid.uuid4().hex}.safetensors"
        content = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "embeddings": embeddings,
            "metadata": self.metadata,
        }
        text = json.dumps(content, ensure_ascii=False)
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_file({"embeddings": self.embeddings}, directory / embeddings)
        temporary = directory / "index.json.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, directory / "index.json")
        for left_over in directory.glob("embeddings-*.safetensors"):
            if left_over.name != embeddings:
                left_over.unlink()

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        fingerprint: str,
        embed: Callable[[Sequence[Any]], np.ndarray] | None = None,
    ) -> "SugarIndex":
        """
        Load a saved index.

        Args:
            directory (`str` or `os.PathLike`):
                Directory [`~SugarIndex.save`] wrote to.
            fingerprint (`str`):
                Fingerprint of the model that will embed the queries.
            embed (`Callable`, *optional*):
                Embedding function of that model.

        Returns:
            [`SugarIndex`]

        Raises:
            `FileNotFoundError`: if the directory holds no index.
            `ValueError`: if the index is of another format version, or of another model.
        """
        file = Path(directory) / "index.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist. Write an index there with `SugarIndex.save`.")
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{file} has format version {content['format_version']}, this version of hf_sugar reads {FORMAT_VERSION}. "
                "Build the index anew."
            )
        if content["fingerprint"] != fingerprint:
            raise ValueError(
                f"{file} was built with the model {content['fingerprint']!r}, not {fingerprint!r}. Load that model, or "
                "build the index anew."
            )
        return cls(
            load_file(file.with_name(content["embeddings"]))["embeddings"], content["metadata"], fingerprint, embed
        )


def _checked(embeddings: np.ndarray, name: str) -> np.ndarray:
    if embeddings.ndim != 2:
        raise ValueError(f"`{name}` has shape {embeddings.shape}; expected (items, dim).")
    embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
    norms = np.linalg.norm(embeddings, axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) < 1e-2))  # bfloat16 normalises to about 4e-3; NaN is bad as well
    if len(bad) > 0:
        raise ValueError(
            f"`{name}[{bad[0]}]` has norm {norms[bad[0]]:.4g}, and so {len(bad)} of {len(norms)} are not L2-normalised. "
            "Divide each by its norm."
        )
    return embeddings
