"""Saving, resuming and publishing of [`SugarTrainer`]."""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging

from hf_sugar.hub.card import run_facts, write_card
from hf_sugar.hub.push import push_checkpoint
from hf_sugar.models import SugarForConditionalGeneration
from hf_sugar.models.adapter_sugar import ADAPTER_SUBFOLDER


logger = logging.get_logger(__name__)


def is_whole(checkpoint: str) -> bool:
    """Whether a checkpoint was written to its end: the state of the trainer is the last that is written."""
    try:
        return bool(TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))))
    except (OSError, ValueError, TypeError):
        return False


def last_whole_checkpoint(directory: str) -> str | None:
    """The newest checkpoint of a run that was written to its end; a log line says if a newer one was not."""
    steps = {path.name.rpartition("-")[2]: path for path in Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    for step in sorted(filter(str.isdigit, steps), key=int, reverse=True):
        if is_whole(str(steps[step])):
            return str(steps[step])
        logger.warning("%s was not written to its end, and is passed over.", steps[step])
    return None


class SavingMixin:
    """What a trainer writes and reads again: whole checkpoints, or under PEFT adapter repositories, which
    [`SugarForConditionalGeneration.from_pretrained`] loads in one line."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        checkpoint, directory = resume_from_checkpoint, self.args.output_dir
        if checkpoint is True and (checkpoint := last_whole_checkpoint(directory)) is None:
            raise ValueError(f"No checkpoint in {directory} is whole: start without `resume_from_checkpoint`.")
        if checkpoint and not is_whole(checkpoint):
            last = last_whole_checkpoint(directory)
            remedy = f"Resume from {last}." if last else "Start without `resume_from_checkpoint`."
            raise ValueError(f"{checkpoint} is no whole checkpoint. {remedy}")
        self.model.config.random_projector &= not self._structure
        output = super().train(checkpoint or None, *args, **kwargs)
        if self.state.global_step == 0:
            raise ValueError(
                "No step was made: `max_steps` and `num_train_epochs` have to allow one, and the dataset to hold a batch."
            )
        return output

    # Upstream restores nothing into a LLaVA resumed from full weights, because the names of the parameters in the file
    # are those of the older layout (huggingface/transformers#43701): load through the class, which converts them.
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self._load_full_weights(resume_from_checkpoint, model):
            return
        model = self.model if model is None else model
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
        if self._saves_adapter(model):
            resume_from_checkpoint = str(Path(resume_from_checkpoint) / ADAPTER_SUBFOLDER)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # PEFT turns what it loads to float32; a resumed QLoRA run goes on in bfloat16
        for name, parameter in model.named_parameters():
            if name in dtypes:
                parameter.data = parameter.data.to(dtypes[name])

    def _load_best_model(self):
        checkpoint = self.state.best_model_checkpoint
        if self._saves_adapter(self.model):
            self.model.load_adapter(str(Path(checkpoint) / ADAPTER_SUBFOLDER), self.model.active_adapters[0])
        elif not self._load_full_weights(checkpoint, None):
            super()._load_best_model()

    def _saves_adapter(self, model) -> bool:
        return is_peft_model(model) and not self.is_fsdp_enabled and not self.is_deepspeed_enabled

    def _load_full_weights(self, checkpoint: str, model) -> bool:
        model = self.model if model is None else model
        if is_peft_model(model) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        loaded = SugarForConditionalGeneration.from_pretrained(checkpoint, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())
        return True

    def save_model(self, output_dir=None, _internal_call=False):
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        # upstream saves no model where states are sharded
        self._save(output_dir, self.accelerator.get_state_dict(self.model))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    # Under PEFT every save, of a checkpoint too, is what `SugarForConditionalGeneration.from_pretrained` loads in one line:
    # an adapter repository (configuration, code and processor, with the adapter and the projector in `adapter/`).
    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            model = self.model.get_base_model() if is_peft_model(self.model) else self.model
            if isinstance(model, FSDPModule):  # a class of FSDP's: the model is saved with the code of its own
                kind = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
                whole, model = model, kind.__new__(kind)
                model.__dict__ = vars(whole)
            if self.is_deepspeed_enabled:
                # transformers 5.24 notes every renaming under ZeRO-3, and would undo those that renamed nothing
                vars(model).pop("_weight_conversions", None)
            model.save_pretrained(output_dir, state_dict=state_dict)
            self.processing_class.save_pretrained(output_dir)
            torch.save(self.args, Path(output_dir) / TRAINING_ARGS_NAME)
        if self.is_world_process_zero():
            write_card(output_dir or self.args.output_dir, run_facts(self))

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # what the first process writes next says that all have written theirs

    def create_model_card(self, model_name: str | None = None, dataset_name: Any = None, tags: Any = None) -> None:
        """Write the model card of what has been saved in `args.output_dir`, for a repository `model_name`, trained on the
        datasets `dataset_name` (or those of `trainer.dataset_names`), with more `tags`. Saving and pushing do it too."""
        if dataset_name is not None:
            self.dataset_names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name)
        # TRL calls this before each checkpoint too, when there is no model in `output_dir` yet
        if self.is_world_process_zero() and (Path(self.args.output_dir) / "config.json").is_file():
            tags = [tags] if isinstance(tags, str) else tags
            write_card(self.args.output_dir, run_facts(self), repo_id=model_name, tags=tags)

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """
        Save, and publish the result; everything else in `args.output_dir` stays where it is. Arguments are those of
        [`~hub.push_checkpoint`], and default to what `args.hub_token`, `hub_revision` and `hub_private_repo` say.

        Returns:
            [`~huggingface_hub.CommitInfo`], or a `Future` of it if `blocking=False`; `None` on other processes.
        """
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        return push_checkpoint(
            self.args.output_dir,
            self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            commit_message=commit_message,
            blocking=blocking,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            private=self.args.hub_private_repo if private is None else private,
            **kwargs,
        )

    def _push_from_checkpoint(self, checkpoint_folder):
        # Upstream uploads all of `output_dir`, the pickled arguments with their paths and tokens among it. A checkpoint is
        # a model that can be loaded, so it is published as such; this waits, because it may be deleted afterwards.
        if self.is_world_process_zero() and self.args.hub_strategy == HubStrategy.EVERY_SAVE:
            push_checkpoint(
                checkpoint_folder,
                self.hub_model_id,
                commit_message=f"Training in progress, step {self.state.global_step}",
                token=self.args.hub_token,
                revision=self.args.hub_revision,
            )
