"""The checkpoint that a command works with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from hf_sugar import SugarEmbedder, SugarForConditionalGeneration, SugarIndex, SugarProcessor
from hf_sugar.distributed import distributed_state
from hf_sugar.hub.card import RUN_FILE, read_json
from hf_sugar.inference import require_sizes
from hf_sugar.retrieval.storage import stored_truncate_dim

from .arguments import setting


@dataclass
class CheckpointArguments:
    """A checkpoint that is loaded."""

    model_name_or_path: str = setting("Full checkpoint, adapter repository or plain backbone: directory or Hub id.")
    revision: str | None = setting("Branch, tag or commit of a checkpoint on the Hub.", None)
    dtype: str = setting("Precision of the model; by default that of the checkpoint.", "auto")

    def __post_init__(self):
        if self.revision not in (None, "main") and Path(self.model_name_or_path).is_dir():
            raise ValueError(f"`revision`: {self.model_name_or_path} is a directory, which has none. Leave it out.")

    def stored_config(self) -> dict[str, Any]:
        """What the checkpoint's `config.json` says. The `OSError` of one that cannot be reached names it."""
        try:
            return PreTrainedConfig.get_config_dict(self.model_name_or_path, revision=self.revision)[0]
        except OSError as error:
            raise OSError(f"The model {self.model_name_or_path!r} cannot be loaded. {error}") from error

    def training_settings(self) -> dict[str, Any]:
        """What [`SugarTrainer`] left of its settings with the checkpoint; empty for one that it did not make, or of
        the Hub where there is no network. A `ValueError` names a damaged file."""
        name, revision = self.model_name_or_path, self.revision
        file = cached_file(name, RUN_FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
        return {} if file is None else read_json(Path(file)).get("settings", {})

    def untrained_projector(self) -> str | None:
        """Why the retrieval projector is known to be random, if it is."""
        config = self.stored_config()
        if config.get("model_type") != "sugar":
            return f"{Path(self.model_name_or_path).name} is a plain {config.get('model_type')!r} model"
        if config.get("random_projector"):
            return "`random_projector` is true in its config.json: after a training of your own, set it to false"
        return None

    def require_trained_projector(self) -> None:
        """Refuse, with a `ValueError`, a model whose embeddings would be random."""
        if reason := self.untrained_projector():
            raise ValueError(
                f"The retrieval projector of {self.model_name_or_path} is not trained ({reason}). Train it with `hf-sugar train` "
                "and a `structure_weight` above 0."
            )

    def load(self, device: torch.device | str = "cpu") -> tuple[SugarForConditionalGeneration, SugarProcessor]:
        """The model, in evaluation mode, and its processor."""
        self.stored_config()
        name, revision = self.model_name_or_path, self.revision
        model = SugarForConditionalGeneration.from_pretrained(name, revision=revision, dtype=self.dtype)
        return model.to(device).eval(), SugarProcessor.from_pretrained(name, revision=revision)


@dataclass
class ModelArguments(CheckpointArguments):
    """The model that embeds and answers."""

    batch_size: int = setting("Items in one forward pass.", 32)
    max_batch_tokens: int | None = setting(
        "About the most tokens in one forward pass that embeds, images expanded; `batch_size` holds too.", None
    )
    truncate_dim: int | None = setting(
        "Length to cut embeddings to; with an index, by default that of the index.", None
    )

    def __post_init__(self):
        super().__post_init__()
        names = ("batch_size", "max_batch_tokens", "truncate_dim", "max_new_tokens")
        require_sizes(**{name: getattr(self, name, None) for name in names})

    def embedder(self) -> SugarEmbedder:
        """The model as an embedder. One whose projector is not trained is refused."""
        self.require_trained_projector()
        loaded, tokens = self.load(distributed_state().device), self.max_batch_tokens
        return SugarEmbedder(*loaded, self.batch_size, max_batch_tokens=tokens, truncate_dim=self.truncate_dim)

    def load_index(self, directory: str, k: int = 1, memory_map: bool = False) -> SugarIndex:
        """The index in a directory, of this model, which is loaded once the directory and the number of hits are right."""
        require_sizes(k=k)
        self.truncate_dim = self.truncate_dim or stored_truncate_dim(directory)
        return SugarIndex.load(directory, embed=self.embedder(), memory_map=memory_map)
