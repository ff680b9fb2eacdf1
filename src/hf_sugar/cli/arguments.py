"""The data that several commands take. Nothing here imports torch."""

from dataclasses import dataclass

from hf_sugar.settings import setting


@dataclass
class DataArguments:
    """Data to train on."""

    train_data: list[str] | None = setting(
        "What to train on: paths, Hub ids, or mappings as {path: a.json, format: llava, image_root: images, weight: 1}.",
        None,
    )
    eval_data: list[str] | None = setting("What to evaluate the losses on during training.", None)
    image_root: str | None = setting("Folder that image paths are relative to, instead of that of each file.", None)
    on_bad_row: str = setting("What to do with a malformed row.", "error", choices=["error", "skip"])


@dataclass
class StreamedDataArguments(DataArguments):
    """[`DataArguments`], of which the training data may be streamed."""

    streaming: bool = setting("Read the training data while they are used instead of loading them first.", False)
