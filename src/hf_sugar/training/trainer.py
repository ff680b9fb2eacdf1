import copy
import json
import warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback, set_seed
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from trl import SFTTrainer
from trl.trainer.utils import get_config_model_id

from hf_sugar.hub.card import CITATION, dataset_names, is_hub_id
from hf_sugar.inference import SugarEmbedder
from hf_sugar.models.rows_sugar import LOSSES
from hf_sugar.teachers import TripleEncoder, add_teacher_embeddings, check_same_teachers, teachers_of

from . import loading
from .cached import compare_ahead
from .collator import SugarCollator
from .config import SugarTrainingConfig
from .discriminative import ROW_COLUMNS, DiscriminativeLoss, discriminative_rows
from .eval_losses import EvalLosses, retrieval_of_rows
from .heads import add_structure_head, lays_rows
from .labels import label_statistics
from .rows import RowFilter, each, readable, require_pairs
from .sampler import train_sampler
from .saving import SavingMixin


logger = logging.get_logger(__name__)


class _TellCollator(TrainerCallback):
    """Lets the collator, and its copies in workers, know the epoch, on which it depends which captions are flipped; and
    says at the end how many rows were left out."""

    def __init__(self, collator: SugarCollator, rows: RowFilter):
        self.collator = collator
        self.rows = rows

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch.fill_(int(round(state.epoch or 0, 6)))

    def on_train_end(self, args, state, control, **kwargs):
        if self.rows.skipped:
            logger.warning("%d rows were skipped because of `on_bad_row='skip'`.", self.rows.skipped)


def _random_numbers_kept(device: torch.device):
    """The training draws the same random numbers whether it is evaluated in between or not: a data loader draws one."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


_REFUSED = {
    "data_collator": "the trainer's own marks the slices. Subclass `SugarTrainer` instead.",
    "compute_loss_func": "it would take a second forward pass. Subclass `SugarTrainer` instead.",
    "formatting_func": "it would hide the slices of a row. Format the dataset before.",
    "model_init": "pass the model, its Hub id or directory as `model`.",
}


def _require_what_can_work(args: SugarTrainingConfig, train_dataset: Dataset | IterableDataset | None) -> None:
    if args.push_to_hub and args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
        raise ValueError(
            f"`hub_strategy={args.hub_strategy.value!r}` publishes optimizer states and paths. Set it to 'every_save' or 'end'."
        )
    if args.max_batch_tokens and isinstance(train_dataset, IterableDataset):
        raise ValueError("`max_batch_tokens` has to know all rows: turn `streaming` off, or leave it out.")
    gathered = args.gather_across_devices and args.world_size > 1
    rows = args.matrix_batch_size or args.max_batch_tokens or args.per_device_train_batch_size
    if args.structure_weight > 0 and rows == 1 and not gathered:
        problem = "Every label matrix holds one sample alone: raise `per_device_train_batch_size`"
        if not args.allow_single_sample:
            raise ValueError(f"{problem}, or set `structure_weight=0` or `allow_single_sample=True`.")
        logger.warning("%s.", problem)


class SugarTrainer(SavingMixin, SFTTrainer):
    """
    [`~trl.SFTTrainer`] with the structure loss of [Sugar](https://huggingface.co/papers/2411.00304):
    `loss = generative_loss + structure_weight * (structure_loss + contrastive_weight * contrastive_loss)`.

    It takes what [`~trl.SFTTrainer`] takes for vision data, with these differences:

    - A plain image-text-to-text checkpoint or model is wrapped into [`SugarForConditionalGeneration`].
    - The generative loss covers answers (or captions, or all text of a document: the column `loss_on` says which),
      never image placeholders.
    - Under PEFT the retrieval projector is trained and saved with the adapter, and adapters are kept out of the vision
      tower unless `exclude_modules` of the PEFT configuration says otherwise.
    - Nothing is ever truncated.

    Logged are `generative_loss`, `structure_loss`, `contrastive_loss`, `labels_clamped` (the share of labels above 1),
    `samples_compared` (samples in a label matrix) and `singles_share` (tokens of the sequences beside the rows, as a share of
    the rows' tokens). An evaluation has them as `eval_...`, the same however rows are batched and divided among
    processes (`per_device_train_batch_size` rows that follow one another share a label matrix), and
    `eval_image_to_text_recall@1` and `eval_text_to_image_recall@1`.

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
            is trained on, or with a `peft_config` merged first, into a full model in `backbone` of `output_dir`.
        args ([`SugarTrainingConfig`], *optional*): Configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows in the conversational vision format: `messages` (or `prompt` and `completion`) and `images`; every
            content part is one slice. Optional columns: `loss_on` (`"answers"`, `"captions"` or `"text"`), `structure` and
            `generative` (`False` keeps a row out of the discriminative or the generative loss) and `id`, which error messages
            name.
        eval_dataset (same types, or `dict` of them, *optional*): Rows to evaluate on.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            The backbone's processor or a [`SugarProcessor`]. Defaults to the one saved with the model.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration; `target_modules` defaults to the paper's `["q_proj", "v_proj"]`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization used when the model is loaded from an id. Defaults to what `args.load_in_4bit` says.
        kwargs: Other arguments of [`~trl.SFTTrainer`].

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
        quantization_config: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ):
        # Args
        model = str(model) if isinstance(model, Path) else model
        if args is not None and not isinstance(args, SugarTrainingConfig):
            raise TypeError(f"`args` is a {type(args).__name__}. Pass a `SugarTrainingConfig`.")
        revision = ((args and args.model_init_kwargs) or {}).get("revision")
        loading.require_vision(model, revision)
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SugarTrainingConfig(f"{name.split('/')[-1]}-Sugar")
        for name, remedy in _REFUSED.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` cannot be combined with the structure loss: {remedy}")
        _require_what_can_work(args, train_dataset)
        args = copy.copy(args)  # TRL changes some, in the parts of it too
        args.gradient_checkpointing_kwargs = copy.copy(args.gradient_checkpointing_kwargs)
        args.accelerator_config = copy.copy(args.accelerator_config)
        # of a stream for evaluation too: batches of several processes have no common length by which to dispatch them
        args.accelerator_config.dispatch_batches = False
        # rows without images too are tokenised by the collator alone
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        self._structure = args.structure_weight > 0

        # Datasets
        validate = args.on_bad_row == "error"
        train_dataset = readable(train_dataset, "train_dataset", validate)
        eval_dataset = each(eval_dataset, "eval_dataset", lambda *given: readable(*given, validate))
        if self._structure:
            require_pairs(args, train_dataset.column_names)

        # Model and processor
        set_seed(args.seed)  # of a new retrieval projector
        if isinstance(model, str):
            processing_class = loading.load_processor(processing_class, model, args, revision)
            loaded = loading.load_model(model, args, quantization_config)
            args.model_init_kwargs = None
        elif quantization_config is not None or args.load_in_4bit:
            raise ValueError("`quantization_config` and `load_in_4bit` need the Hub id or directory of a model.")
        else:
            loaded = model
            processing_class = loading.load_processor(processing_class, loaded.config.name_or_path, args)
        model = loading.enter(loaded, args, peft_config)
        base = model.get_base_model() if is_peft_model(model) else model
        for name, value in loading.projector_settings(args).items():
            if value not in (args.__dataclass_fields__[name].default, getattr(base.config, name)):
                logger.warning("`%s` has no effect: the model was made with %r.", name, getattr(base.config, name))
        if self._structure:
            args.matryoshka_dims = base.config.matryoshka_dims = loading.matryoshka_dims(args, base.config)
        if peft_config is not None:
            peft_config = loading.for_language_model(peft_config, base)
        if peft_config is not None or is_peft_model(model):
            source, _ = base.backbone_source()
            if args.push_to_hub and not is_hub_id(source):
                raise ValueError(
                    f"`push_to_hub`: the backbone {source} is not on the Hub. Name it by its id, or push later with `--base_model`."
                )
            if not source and peft_config is not None and not loading.is_quantized(base):
                loading.save_backbone(base, Path(args.output_dir, "backbone").absolute(), args.process_index == 0)

        # SFTTrainer would cut at `max_length`; the collator refuses longer rows instead.
        max_length = args.max_length or base.config.get_text_config().max_position_embeddings
        args.max_length = None
        singles = args.singles_per_sample if self._structure and not args.flip_captions else None
        self._good_rows = RowFilter(SugarCollator(processing_class, max_length, singles=singles))
        if args.on_bad_row == "skip":
            train_dataset = self._good_rows.filter(train_dataset, "train_dataset")
            eval_dataset = each(eval_dataset, "eval_dataset", self._good_rows.filter)

        # SFTTrainer
        projector = base.retrieval_projector
        exact = copy.deepcopy([projector.linear_1, projector.linear_2]) if loading.is_quantized(base) else []
        padding_free, args.padding_free = args.padding_free, False  # TRL 1.16 refuses it for images
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
        args.max_length, args.padding_free = max_length, padding_free
        if is_peft_model(self.model):
            loading.require_loadable(base)
        if self.is_fsdp_enabled:
            if not self.accelerator.is_fsdp2:
                raise ValueError("FSDP 1 does not divide the losses of this trainer rightly: set `fsdp_version: 2`.")
            # accelerate 1.15 refuses names of layers that a backbone lists and does not have (CLIP's of texts)
            base._no_split_modules = {type(module).__name__ for module in base.modules()} & {*base._no_split_modules}
        if loading.is_quantized(base):
            # TRL casts all that QLoRA trains to bfloat16; the projector stays as exact as it was
            for layer, kept in zip([base.retrieval_projector.linear_1, base.retrieval_projector.linear_2], exact):
                layer.to(kept.weight.dtype).load_state_dict(kept.state_dict())
            loading.train_through_4bit(base)
        if is_peft_model(self.model) and not (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            # Upstream lets gradients start at every embedding, so that the frozen vision tower would be kept and run
            # backwards for nothing. Those of the tokens are enough, unless checkpointing is reentrant.
            base.disable_input_require_grads()
            base.enable_input_require_grads = base.vlm.get_decoder().enable_input_require_grads
        add_structure_head(base, lays_rows(base, args))

        # Teachers, collators and loss
        self.teachers: dict[str, str] = {}  # what the model card says of the run
        self.dataset_names = dataset_names(self.train_dataset)
        teachers = self._teacher_embeddings() if self._structure else {}
        self.data_collator = SugarCollator(
            processing_class,
            max_length,
            **teachers,
            flip_captions=self._structure and args.flip_captions,
            singles=singles,
            seed=args.seed,
            fill_up=self.accelerator.num_processes > 1,
            divided=self.is_fsdp_enabled or self.is_deepspeed_enabled,
        )
        self._eval_collator = replace(self.data_collator, flip_captions=False, epoch=torch.zeros((), dtype=torch.long))
        self.add_callback(_TellCollator(self.data_collator, self._good_rows))
        if self._structure:
            self.discriminative_loss = DiscriminativeLoss(args, self._split, self._label_statistics())
        self._eval_losses = EvalLosses(self.accelerator, args.per_device_train_batch_size)

    def _prepare_for_training(self, *args, **kwargs):
        # An evaluation before the training has prepared the bare model. What DDP, FSDP or DeepSpeed have wrapped stays so.
        if self.model_wrapped is self.model and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            loading.forget_preparation(self.model)
            self.accelerator._models.clear()
        return super()._prepare_for_training(*args, **kwargs)

    def _send_telemetry(self):
        # TRL reports the start of a training over the network; nobody asked for that here.
        pass

    def _teacher_embeddings(self) -> dict[str, Any]:
        """What the collators need: the function that embeds slices, or whose embeddings the datasets have as a column."""
        if self.args.teacher_mode == "online":
            self.teachers, self._split = self._encoder.checkpoints, self._encoder.split
            return {"embed_slices": self._encoder.encode}
        self._made_by: dict[str, Any] | None = None
        self.train_dataset = self._with_teachers(self.train_dataset)
        self.eval_dataset = each(self.eval_dataset, "eval_dataset", self._with_teachers)
        # embeddings found may be those of the same files in another directory
        given = self.args.teachers is not None
        self.teachers = self._encoder.checkpoints if given else self._made_by["checkpoints"]
        self._split = self._made_by["split"]
        return {"teachers": json.dumps(self._made_by)}

    def _label_statistics(self) -> torch.Tensor | None:
        """The same in every process, and when the training is resumed."""
        if self.args.label_calibration == "none" and self.args.discriminative_loss == "structure":
            return None
        dataset = self.train_dataset
        dataset = self._remove_unused_columns(dataset) if isinstance(dataset, Dataset) else dataset
        return label_statistics(dataset, self.data_collator, self.args, self._split, self._cache_dir)

    @property
    def _cache_dir(self) -> Path:
        return Path(self.args.teacher_cache_dir or Path(self.args.output_dir, "teacher_cache"))

    @property
    def encoder(self) -> TripleEncoder | None:
        """The teachers that this training embeds with; `None` if it needs none, or its data came with the embeddings."""
        return vars(self).get("_encoder")

    @cached_property
    def _encoder(self) -> TripleEncoder:
        return TripleEncoder.from_teachers(self.args.teachers, device=self.args.device)

    def _with_teachers(self, dataset, name="") -> Dataset | IterableDataset:
        """The dataset with the teachers' embeddings: of `args.teachers`, else of those that its column or that of another
        dataset of this trainer is from."""
        if not self._structure or self.args.teacher_mode == "online":
            return dataset
        made_by = teachers_of(dataset)
        if self.args.teachers is not None or made_by is None:
            for made in filter(None, (made_by, self._made_by)):
                check_same_teachers(made, self._encoder.fingerprint, self._encoder.description)
        if made_by is None:
            compute = isinstance(dataset, Dataset)  # a stream is not read before training
            dataset = add_teacher_embeddings(dataset, self._encoder, self._cache_dir, compute=compute)
            self._encoder.unload()
            made_by = teachers_of(dataset)
        self._made_by = self._made_by or made_by
        check_same_teachers(made_by, self._made_by["fingerprint"], self._made_by["description"])
        return dataset

    def _remove_unused_columns(self, dataset, description=None):
        dataset = super()._remove_unused_columns(dataset, description)
        if "teacher_embeddings" in dataset.column_names:  # as arrays: lists of numbers are slow to make
            dataset = dataset.with_format("numpy", columns=["teacher_embeddings"], output_all_columns=True)
        return dataset

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            rows = ["messages", "prompt", "completion", "image", "images"]
            self._signature_columns = [*rows, "positives", "negatives", "loss_on", *LOSSES, "id"]
            self._signature_columns += ["teacher_embeddings", "teachers"]

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        sampler = train_sampler(dataset, self.args, self.processing_class, self.data_collator.epoch)
        return super()._get_train_sampler(train_dataset) if sampler is None else sampler

    def _get_eval_sampler(self, eval_dataset):
        return None  # in order: upstream groups them by length too, and would have to collate them to know it

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, is_training=False, **kwargs):
        training_collator = self.data_collator
        if not is_training:
            self.data_collator = self._eval_collator  # rows are not flipped
        try:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, **kwargs)
        finally:
            self.data_collator = training_collator

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._window, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self._window, num_items_in_batch

    def training_step(self, model, inputs, *args, **kwargs):
        # Not in `get_batch_samples`: a run that is resumed gets its random numbers back between the two.
        if self._structure and self.args.matrix_batch_size and "compared" not in inputs:
            start = next(n for n, batch in enumerate(self._window) if batch is inputs)
            end = start + self.args.matrix_batch_size // self.args.per_device_train_batch_size
            batches = self._window[start:end]
            model.train()  # DeepSpeed's gives nothing back
            compare_ahead(model, batches, self.discriminative_loss, self.args.gather_across_devices)
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # `generative_loss` is this micro-batch's share of the accumulated batch; the discriminative loss is a value of the
        # micro-batch, so it is averaged over them.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        rows = [inputs.pop(name, None) for name in ROW_COLUMNS]
        compared = inputs.pop("compared", None)
        tokens_beside = inputs.get("singles", {}).get("attention_mask", torch.zeros(1)).sum()
        if not self.model.training:
            inputs["labels"][self._eval_losses.new_rows(len(inputs["labels"])) :] = -100
        outputs = []

        def forward(**kwargs):
            with compared.random_numbers() if compared else nullcontext():
                outputs.append(model(**kwargs))
            return outputs[-1]

        result = super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)
        generative_loss = loss = result[0] if return_outputs else result
        if self._structure:
            rows = discriminative_rows(outputs[0].embeddings, outputs[0].single_embeddings, *rows)
        if not self.model.training:  # the discriminative loss is added for all rows, in `evaluation_loop`
            self._eval_losses.add(loss, outputs[0].label_mask.sum(), *(rows if self._structure else ()))
            return result
        values = {"generative_loss": generative_loss.detach() * steps}
        if self._structure:
            compare = compared or partial(
                self.discriminative_loss, training=True, gather=self.args.gather_across_devices
            )
            discriminative_loss, found = compare(*rows)
            loss = generative_loss + self.args.structure_weight * discriminative_loss / steps
            values |= {**found, "singles_share": tokens_beside.to(loss) / inputs["attention_mask"].sum()}
        for name, value in values.items():
            self._metrics["train"][name].append(self.accelerator.gather(value).mean().item())
        return (loss, result[1]) if return_outputs else loss

    # Evaluation and prediction take one path, `evaluation_loop`.
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        if isinstance(eval_dataset, Dataset | IterableDataset):
            eval_dataset = self._prepare_rows(eval_dataset, "eval_dataset")
        with _random_numbers_kept(self.args.device):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        test_dataset = self._prepare_rows(test_dataset, "test_dataset")
        with _random_numbers_kept(self.args.device):
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def _prepare_rows(self, dataset, name):
        dataset = readable(dataset, name, self.args.on_bad_row == "error")
        if self.args.on_bad_row == "skip":
            dataset = self._good_rows.filter(dataset, name)
        return self._with_teachers(dataset)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """As upstream, with all metrics before callbacks are asked, and losses that do not depend on batches and processes:
        a label matrix is of as many rows as a process has in training."""
        size = max(2, self.args.matrix_batch_size or self.args.per_device_train_batch_size)
        self._eval_losses = EvalLosses(self.accelerator, size, self.discriminative_loss if self._structure else None)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = {name: sum(values) / len(values) for name, values in self._metrics["eval"].items()}
        self._metrics["eval"].clear()
        metrics.update(self._eval_losses.means())
        discriminative_loss = metrics.get("structure_loss", 0.0)
        discriminative_loss += self.args.contrastive_weight * metrics.get("contrastive_loss", 0.0)
        metrics["loss"] = metrics.get("generative_loss", 0.0) + self.args.structure_weight * discriminative_loss
        if self._structure and self.args.eval_retrieval_rows:
            rows, batch_size = dataloader.dataset, self.args.per_device_eval_batch_size
            rows = rows.dataset if isinstance(rows, IterableDatasetShard) else rows
            model = self.accelerator.unwrap_model(self.model)
            if self.is_fsdp_enabled and "embed_slices" not in vars(model):
                register_fsdp_forward_method(model, "embed_slices")
            embed = SugarEmbedder(model, self.processing_class, batch_size=batch_size)
            metrics |= retrieval_of_rows(rows, embed, self.args.eval_retrieval_rows)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output
