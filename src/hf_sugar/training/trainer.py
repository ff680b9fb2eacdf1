import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback, set_seed
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import HubStrategy
from trl import SFTTrainer
from trl.trainer.utils import get_config_model_id

from hf_sugar.alignment import label_matrix
from hf_sugar.data.checks import text_rows, validate_rows
from hf_sugar.data.rows import answer_to_image, load_image, undecoded
from hf_sugar.evaluation.tasks import image_text_retrieval
from hf_sugar.hub.card import CITATION, dataset_names, is_hub_id, run_facts, write_card
from hf_sugar.hub.push import push_checkpoint
from hf_sugar.inference import SugarEmbedder
from hf_sugar.models import SugarForConditionalGeneration
from hf_sugar.models.modeling_sugar import ADAPTER_SUBFOLDER
from hf_sugar.models.rows_sugar import conversation_row, fill_images, row_name
from hf_sugar.teachers import TeacherCache, TripleEncoder

from .collator import RowFilter, SugarCollator
from .config import SugarTrainingConfig
from .gather import gather_rows
from .loading import (
    add_structure_head,
    enter,
    for_language_model,
    forget_preparation,
    is_quantized,
    load_model,
    load_processor,
    require_vision,
    train_through_4bit,
)
from .loss import StructureLoss


logger = logging.getLogger(__name__)


class _TellEpoch(TrainerCallback):
    """Lets the collator know the epoch, on which it depends which captions are flipped."""

    def __init__(self, collator: SugarCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch = int(round(state.epoch or 0, 6))


class _TellSkipped(TrainerCallback):
    """Says at the end of the training how many rows were left out."""

    def __init__(self, rows: RowFilter):
        self.rows = rows

    def on_train_end(self, args, state, control, **kwargs):
        if self.rows.skipped:
            logger.warning("%d rows were skipped because of `on_bad_row='skip'`.", self.rows.skipped)


class _ShuffledLengthGroups(LengthGroupedSampler):
    """Upstream goes from long to short batches again and again, so that the kinds of rows come in turns; here the
    batches are shuffled."""

    def __iter__(self):
        indices = list(super().__iter__())
        whole = len(indices) // self.batch_size
        batches = [indices[n * self.batch_size : (n + 1) * self.batch_size] for n in range(whole)]
        order = torch.randperm(whole).tolist()
        yield from [index for n in order for index in batches[n]] + indices[whole * self.batch_size :]


_REFUSED = {
    "data_collator": "the trainer's own marks the slices. Subclass `SugarTrainer` instead.",
    "compute_loss_func": "it would take a second forward pass. Subclass `SugarTrainer` instead.",
    "formatting_func": "it would hide the slices of a row. Format the dataset before.",
    "model_init": "pass the model, its Hub id or directory as `model`.",
}


class SugarTrainer(SFTTrainer):
    """
    [`~trl.SFTTrainer`] with the structure loss of [Sugar](https://huggingface.co/papers/2411.00304):
    `loss = generative_loss + structure_weight * structure_loss`.

    It takes what [`~trl.SFTTrainer`] takes for vision data, with these differences:

    - A plain image-text-to-text checkpoint or model is wrapped into [`SugarForConditionalGeneration`].
    - The generative loss covers answers (or captions, or all text of a document: the column `loss_on` says which),
      never image placeholders.
    - Under PEFT the retrieval projector is trained and saved with the adapter, and adapters are kept out of the vision
      tower unless `exclude_modules` of the PEFT configuration says otherwise.
    - Nothing is ever truncated.

    Example:

    ```python
    >>> from hf_sugar import SugarTrainer, SugarTrainingConfig
    >>> from peft import LoraConfig

    >>> trainer = SugarTrainer(
    ...     model="llava-hf/llava-1.5-7b-hf",
    ...     args=SugarTrainingConfig(output_dir="sugar"),
    ...     train_dataset=dataset,
    ...     peft_config=LoraConfig(r=128, lora_alpha=256, target_modules=["q_proj", "v_proj"]),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or `Path` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Hub id or directory of a plain backbone, a full Sugar checkpoint or an adapter repository; or a model. An adapter
            is trained on, or with a `peft_config` merged first, into a full model in `merged` of `output_dir`.
        args ([`SugarTrainingConfig`], *optional*):
            Configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows in the conversational vision format: `messages` (or `prompt` and `completion`) and `images`; every
            content part is one slice. Optional columns: `loss_on` (`"answers"`, `"captions"` or `"text"`), `structure` (`False`
            keeps a row out of the structure loss) and `id`, which error messages name.
        eval_dataset (same types, or `dict` of them, *optional*):
            Rows to evaluate on.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            The backbone's processor or a [`SugarProcessor`]. Defaults to the one saved with the model.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration; `target_modules` defaults to the paper's `["q_proj", "v_proj"]`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization used when the model is loaded from an id. Defaults to what `args.load_in_4bit` says.
        kwargs:
            Other arguments of [`~trl.SFTTrainer`].

    Raises:
        `ValueError`: before training, for rows that cannot be used (naming them), and for settings that cannot work
            with the structure loss.
    """

    _tag_names = ["hf_sugar", "sugar"]
    _name = "Sugar"
    _paper = {
        "title": "Unified Generative and Discriminative Training for Multi-modal Large Language Models",
        "id": "2411.00304",
        "citation": CITATION,
    }

    def __init__(
        self,
        model: "str | Path | PreTrainedModel | PeftModel",
        args: SugarTrainingConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: ProcessorMixin | None = None,
        quantization_config=None,
        peft_config=None,
        **kwargs,
    ):
        # Args
        if isinstance(model, Path):
            model = str(model)
        if not isinstance(model, str):
            require_vision(model)
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SugarTrainingConfig(f"{name.split('/')[-1]}-Sugar")
        elif not isinstance(args, SugarTrainingConfig):
            raise TypeError(
                f"`args` is a {type(args).__name__}. Pass a `SugarTrainingConfig`, which has all settings of `SFTConfig` and "
                "those of the structure loss."
            )
        for name, remedy in _REFUSED.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` cannot be combined with the structure loss: {remedy}")
        if args.label_smoothing_factor > 0:
            raise ValueError("`label_smoothing_factor` needs a second forward pass; set it to 0 with `SugarTrainer`.")
        if args.push_to_hub and args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise ValueError(
                f"`hub_strategy={args.hub_strategy.value!r}` publishes optimizer states and training_args.bin, a pickle with the "
                "paths and tokens of this machine. Set it to 'every_save' or 'end'."
            )
        args = copy.copy(args)  # TRL changes some, in the parts of it too
        args.accelerator_config = copy.copy(args.accelerator_config)
        args.gradient_checkpointing_kwargs = copy.copy(args.gradient_checkpointing_kwargs)

        # Datasets
        self._structure = args.structure_weight > 0
        validate = args.on_bad_row == "error"
        train_dataset = _prepared(train_dataset, "train_dataset", validate)
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                key: _prepared(value, f"eval_dataset[{key!r}]", validate) for key, value in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = _prepared(eval_dataset, "eval_dataset", validate)

        # Model and processor
        set_seed(args.seed)  # of a new retrieval projector
        if isinstance(model, str):
            revision = (args.model_init_kwargs or {}).get("revision")
            loaded = load_model(model, args, quantization_config)
            processing_class = load_processor(processing_class, model, args, revision)
            args.model_init_kwargs = None
        elif quantization_config is not None or args.load_in_4bit:
            raise ValueError(
                "`quantization_config` and `load_in_4bit` apply while a model is loaded, and this one is. Pass its Hub id or "
                "directory, or pass the quantization to its `from_pretrained`."
            )
        else:
            loaded = model
            processing_class = load_processor(processing_class, loaded.config.name_or_path, args)
        model = enter(loaded, args, peft_config)
        base = model.get_base_model() if is_peft_model(model) else model
        if peft_config is not None:
            peft_config = for_language_model(peft_config, base)
        adapter = peft_config is not None or is_peft_model(model)
        if args.push_to_hub and adapter and not is_hub_id(base.config.name_or_path):
            raise ValueError(
                f"`push_to_hub`: the backbone {base.config.name_or_path} is not on the Hub, so nobody else could load an "
                "adapter of it. Name the backbone by its Hub id, or push after training: `hf-sugar push` with `--base_model`."
            )

        # SFTTrainer would cut at `max_length`; the collator refuses longer rows instead.
        max_length = args.max_length or base.config.get_text_config().max_position_embeddings
        args.max_length = None
        if args.on_bad_row == "skip":
            good_rows = RowFilter(SugarCollator(processing_class, max_length))
            train_dataset = good_rows.filter(train_dataset, "train_dataset")
            if isinstance(eval_dataset, dict):
                eval_dataset = {key: good_rows.filter(value, key) for key, value in eval_dataset.items()}
            elif eval_dataset is not None:
                eval_dataset = good_rows.filter(eval_dataset, "eval_dataset")

        projector = base.retrieval_projector
        exact = copy.deepcopy([projector.linear_1, projector.linear_2])
        with warnings.catch_warnings():
            # PEFT 0.21 reads it by the name that transformers 5.23 warns of
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                peft_config=peft_config,
                **kwargs,
            )
        args.max_length = max_length

        # What TRL does to a model that is otherwise here
        if is_quantized(base):
            # TRL casts all that QLoRA trains to bfloat16; the projector stays as exact as it was
            for layer, kept in zip([base.retrieval_projector.linear_1, base.retrieval_projector.linear_2], exact):
                layer.to(kept.weight.dtype).load_state_dict(kept.state_dict())
            train_through_4bit(base)
        if is_peft_model(self.model) and not (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            # Upstream lets gradients start at every embedding, so that the frozen vision tower would be kept and run
            # backwards for nothing. Those of the tokens are enough, unless checkpointing is reentrant.
            base.disable_input_require_grads()
            base.enable_input_require_grads = base.vlm.get_decoder().enable_input_require_grads
        add_structure_head(base)

        # Teachers, collators and loss
        self.teachers: dict[str, str] = {}  # what the model card says of the run
        self.dataset_names = dataset_names(self.train_dataset)
        embed_slices = self._teacher_embeddings() if self._structure else None
        self.data_collator = SugarCollator(
            processing_class, max_length, embed_slices, self._structure and args.flip_captions, args.seed
        )
        self.add_callback(_TellEpoch(self.data_collator))
        if args.on_bad_row == "skip":
            self.add_callback(_TellSkipped(good_rows))
        self._eval_collator = SugarCollator(processing_class, max_length, embed_slices)
        self.structure_loss = StructureLoss(reduction=args.structure_reduction)

    def _prepare_for_training(self, *args, **kwargs):
        # An evaluation before the training has prepared the bare model. What DDP, FSDP or DeepSpeed have wrapped stays so.
        if self.model_wrapped is self.model and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            forget_preparation(self.model)
            self.accelerator._models.clear()
        return super()._prepare_for_training(*args, **kwargs)

    def _send_telemetry(self):
        # TRL reports the start of a training over the network; nobody asked for that here.
        pass

    def _teacher_embeddings(self) -> Callable[[list[Any]], torch.Tensor]:
        """What embeds slices for the collator."""
        encoder = TripleEncoder.from_teachers(self.args.teachers, device=self.args.device)
        self.teachers = encoder.checkpoints
        if self.args.teacher_mode == "online":
            self._split = encoder.split
            return encoder.encode
        directory = self.args.teacher_cache_dir or Path(self.args.output_dir) / "teacher_cache"
        cache = TeacherCache.for_encoder(directory, encoder)
        self._split = cache.split
        self._teachers = cache, encoder
        datasets = [self.train_dataset]
        if self.eval_dataset is not None:
            datasets += self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        self._embed_ahead(datasets)
        return self._teachers[0].lookup

    def _embed_ahead(self, datasets: list[Dataset | IterableDataset]):
        """Put the slices of the datasets into the teacher cache, if there is one."""
        if not self._structure or self.args.teacher_mode == "online":
            return
        cache, encoder = self._teachers
        for dataset in datasets:
            if not isinstance(dataset, IterableDataset):
                cache.fill(dataset, encoder)
            elif not len(cache):
                raise ValueError(
                    f"A streaming dataset is not read before training, and the teacher cache {cache.directory} is empty: run "
                    "`hf-sugar prepare` on it, or set `teacher_mode='online'`."
                )
        encoder.unload()

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = [
                "messages",
                "prompt",
                "completion",
                "image",
                "images",
                "loss_on",
                "structure",
                "id",
            ]

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(dataset, Dataset):
            return super()._get_train_sampler(train_dataset)
        # Rows are tokenised when they are collated; what groups them is an estimate that is good enough. It is rounded
        # up to a power of two, so that rows of about the same length stay mixed: the structure loss compares them.
        image_tokens = self.processing_class.embed_inputs([PIL.Image.new("RGB", (336, 336))])["slice_ids"].eq(0).sum()
        lengths = []
        for row, images in text_rows(dataset):
            parts = [
                part for message in fill_images(row["messages"], [None] * images, "") for part in message["content"]
            ]
            characters = sum(len(part["text"]) for part in parts if part["type"] == "text")
            lengths.append(1 << int(characters / 4 + images * int(image_tokens)).bit_length())
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return _ShuffledLengthGroups(batch_size, lengths=lengths)

    def _get_eval_sampler(self, eval_dataset):
        # Upstream groups evaluation rows by length too, and would have to collate them all to know theirs.
        strategy, self.args.train_sampling_strategy = self.args.train_sampling_strategy, "random"
        try:
            return super()._get_eval_sampler(eval_dataset)
        finally:
            self.args.train_sampling_strategy = strategy

    def get_eval_dataloader(self, eval_dataset=None):
        # evaluation is the same every time: rows are not flipped
        training_collator, self.data_collator = self.data_collator, self._eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        # `generative_loss` is this micro-batch's share of the accumulated batch; the structure loss is a value of the
        # micro-batch, so it is averaged over them.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        teacher_embeddings = inputs.pop("teacher_embeddings", None)
        modality = inputs.pop("slice_modality", None)
        outputs = []

        def forward(**kwargs):
            outputs.append(model(**kwargs))
            return outputs[-1]

        result = super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)
        generative_loss = loss = result[0] if return_outputs else result
        logged = {"generative_loss": generative_loss.detach() * steps}
        if self._structure:
            embeddings, labels, clamped = self._positions(outputs[0].embeddings, teacher_embeddings, modality)
            structure_loss = self.structure_loss(embeddings, labels)
            loss = generative_loss + self.args.structure_weight * structure_loss / steps
            logged["structure_loss"] = structure_loss.detach()
            logged["labels_clamped"] = torch.tensor(clamped, device=loss.device)
        for name, value in logged.items():
            self._metrics[mode][name].append(self.accelerator.gather(value).mean().item())
        return (loss, result[1]) if return_outputs else loss

    def _positions(self, embeddings, teacher_embeddings, modality):
        """Draw positions and give their embeddings `(n, dim)`, the label matrix `(n, n)` and the share clamped; over
        all processes when `gather_across_devices`."""
        present = modality >= 0
        # the largest random numbers of each row, absent slices last
        order = torch.rand(modality.shape, device=modality.device).masked_fill(~present, -1)
        kept = order.argsort(dim=1, descending=True).argsort(dim=1) < self.args.positions_per_sample
        sample, place = (kept & present).nonzero(as_tuple=True)
        embeddings = embeddings[sample, place]
        prefixes = torch.stack([sample, place + 1], dim=1)

        if self.args.gather_across_devices:
            samples = gather_rows(sample.new_tensor([[len(modality)]]))  # of each process
            prefixes[:, 0] += samples[: self.accelerator.process_index].sum()
            embeddings, prefixes = gather_rows(embeddings), gather_rows(prefixes)
            teacher_embeddings, modality = gather_rows(teacher_embeddings), gather_rows(modality, padding=-1)
            present = modality >= 0

        # rows that stay out of the structure loss have no slices here, and the labels know only those that have
        counts = present.sum(dim=1)
        if not counts.any():
            return embeddings, embeddings.new_zeros(0, 0), 0.0
        prefixes[:, 0] = (counts > 0).cumsum(0)[prefixes[:, 0]] - 1
        offsets = torch.cat([counts.new_zeros(1), counts[counts > 0].cumsum(0)])
        labels, clamped = label_matrix(
            teacher_embeddings[present],
            offsets,
            prefixes,
            delta=self.args.delta,
            normalize=None if self.args.label_normalization == "none" else self.args.label_normalization,
            label_kernel=self.args.label_kernel,
            modality=None if self._split is None else modality[present],
            split=self._split,
        )
        return embeddings, labels, clamped

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        if isinstance(eval_dataset, Dataset | IterableDataset):
            eval_dataset = _prepared(eval_dataset, "eval_dataset")
            self._embed_ahead([eval_dataset])
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        # a dict of datasets comes back here, dataset by dataset
        if self._structure and self.args.eval_retrieval_rows and not isinstance(dataset, dict):
            found = self._retrieval(dataset)
            if found:
                found = {f"{metric_key_prefix}_{key}": value for key, value in found.items()}
                metrics.update(found)
                self.log(dict(found))
        return metrics

    def _retrieval(self, dataset) -> dict[str, float]:
        """Recall@1 between the images and the answers (or captions) of the rows that have one of each."""
        images, texts = [], []
        for index, row in enumerate(map(conversation_row, dataset)):
            text = answer_to_image(row)
            if text is not None:
                images.append(load_image(row["images"][0], row_name(row, index)))
                texts.append(text)
            if len(images) == self.args.eval_retrieval_rows:
                break
        if len(images) < 2:
            return {}
        model = self.accelerator.unwrap_model(self.model)
        embed = SugarEmbedder(model, self.processing_class, batch_size=self.args.per_device_eval_batch_size)
        results = image_text_retrieval(embed, images, texts, ks=(1,))
        return {
            "image_to_text_recall@1": results["image_to_text_recall@1"].value,
            "text_to_image_recall@1": results["text_to_image_recall@1"].value,
        }

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

    # Under PEFT every save, of a checkpoint too, is what `SugarForConditionalGeneration.from_pretrained` loads in one line:
    # an adapter repository (configuration, code and processor, with the adapter and the projector in `adapter/`).
    def _save(self, output_dir=None, state_dict=None):
        if not is_peft_model(self.model):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            self.model.get_base_model().save_pretrained(output_dir, state_dict=state_dict)
            self.processing_class.save_pretrained(output_dir)
            torch.save(self.args, Path(output_dir) / TRAINING_ARGS_NAME)
        if self.is_world_process_zero():
            write_card(output_dir or self.args.output_dir, run_facts(self))

    def create_model_card(self, model_name: str | None = None, dataset_name=None, tags=None):
        """
        Write the model card of what has been saved in `args.output_dir`. Saving and pushing do this by themselves.

        Args:
            model_name (`str`, *optional*):
                Where the model is going to be on the Hub.
            dataset_name (`str` or `list[str]`, *optional*):
                Hub ids and paths of the training data. Defaults to `trainer.dataset_names`.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
        """
        if dataset_name is not None:
            self.dataset_names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name)
        # TRL calls this before each checkpoint too, when there is no model in `output_dir` yet
        if self.is_world_process_zero() and (Path(self.args.output_dir) / "config.json").is_file():
            tags = [tags] if isinstance(tags, str) else tags
            write_card(self.args.output_dir, run_facts(self), repo_id=model_name, tags=tags)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """
        Save, and publish the result: see [`~hub.push_checkpoint`]. Optimizer states, training arguments and
        everything else in `args.output_dir` stay where they are.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Title of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait for the upload.
            token (`str`, *optional*):
                Access token. Defaults to `args.hub_token`, else to the one of `hf auth login` or `HF_TOKEN`.
            revision (`str`, *optional*):
                Branch. Defaults to `args.hub_revision`.
            private (`bool`, *optional*):
                Whether a new repository is private. Defaults to `args.hub_private_repo`.
            kwargs:
                `base_model`, `license`, `tags` and `create_pr` of [`~hub.push_checkpoint`].

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


def _prepared(dataset, name: str, validate: bool = True):
    """Refuse a dataset that cannot be trained on; leave its images undecoded, so that the collator can say which row an
    unreadable one is in."""
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(f"`{name}` must be a `datasets.Dataset` or `IterableDataset`, got {type(dataset).__name__}.")
    if validate and isinstance(dataset, Dataset):
        validate_rows(dataset, name)
    return undecoded(dataset)
