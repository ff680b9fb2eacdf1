from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)


def is_whole(checkpoint: str) -> bool:
    """Whether a checkpoint was written to its end: the state of the trainer is the last that is written."""
    try:
        TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    except (OSError, ValueError, TypeError):
        return False
    return True


def last_whole_checkpoint(directory: str) -> str | None:
    """The newest checkpoint of a run that was written to its end; a log line says if a newer one was not."""
    steps = {path.name.rpartition("-")[2]: path for path in Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    for step in sorted(filter(str.isdigit, steps), key=int, reverse=True):
        if is_whole(str(steps[step])):
            return str(steps[step])
        logger.warning("%s was not written to its end, and is passed over.", steps[step])
    return None


def to_resume_from(checkpoint: str | bool | None, directory: str) -> str | None:
    """The checkpoint that a run goes on from: the one named, or for `True` the newest in `directory` that is whole. A
    `ValueError` if there is none, or it was not written to its end."""
    if checkpoint is True:
        checkpoint = last_whole_checkpoint(directory)
        if checkpoint is None:
            raise ValueError(f"No checkpoint in {directory} is whole: start without `resume_from_checkpoint`.")
    elif checkpoint and not is_whole(checkpoint):
        raise ValueError(f"{checkpoint} is no whole checkpoint. The last one is {last_whole_checkpoint(directory)}.")
    return checkpoint or None
