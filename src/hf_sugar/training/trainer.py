import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import torch.distributed.nn.functional as distributed
from accelerate.utils import is_peft_model, pad_across_processes
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput, create_model_from_path, get_config_model_id

from hf_sugar.alignment import label_matrix
from hf_sugar.data.checks import text_rows, validate_rows
from hf_sugar.data.rows import answer_to_image, conversation_row, load_image, row_name, undecoded
from hf_sugar.evaluation.tasks import embedder, image_text_retrieval
from hf_sugar.models import SugarConfig, SugarForConditionalGeneration, SugarProcessor
from hf_sugar.models.modeling_sugar import ADAPTER_SUBFOLDER
from hf_sugar.models.processing_sugar import fill_images
from hf_sugar.teachers import TeacherCache, TripleEncoder

from .collator import SugarCollator
from .config import SugarTrainingConfig
from .loss import StructureLoss


@dataclass
class FusedSugarOutput(FusedCausalLMOutput):
    """TRL's output with the slice embeddings. They are part of what forward returns, so that DDP sees the projector's
    parameters used in it."""

    embeddings: torch.Tensor | None = None
    embedding_mask: torch.Tensor | None = None


def add_structure_head(model: SugarForConditionalGeneration) -> None:
    """
    Let a model that has TRL's fused LM head also return slice embeddings from the same pass.

    Args:
        model ([`SugarForConditionalGeneration`]):
            Model patched by [`~trl.trainer.utils.add_fused_lm_head`].
    """
    fused_forward = model.forward

    def forward(self, *args, slice_ids=None, fused_lm_head=False, **kwargs):
        if slice_ids is None:
            return fused_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        if not fused_lm_head:
            return fused_forward(*args, slice_ids=slice_ids, **kwargs)
        # The fused head keeps the hidden states to itself; a hook on the module below it sees them.
        seen = []
        hook = self.base_model.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
        try:
            output = fused_forward(*args, fused_lm_head=True, **kwargs)
        finally:
            hook.remove()
        embeddings, mask = self.project_slices(seen[0], slice_ids)
        return FusedSugarOutput(**output, embeddings=embeddings, embedding_mask=mask)

    model.forward = types.MethodType(forward, model)


class _TellEpoch(TrainerCallback):
    """Lets the collator know the epoch, on which it depends which captions are flipped."""

    def __init__(self, collator: SugarCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch = int(round(state.epoch or 0, 6))


class _ShuffledLengthGroups(LengthGroupedSampler):
    """Upstream goes from long to short batches again and again, so that the kinds of rows come in turns; here the
    batches are shuffled."""

    def __iter__(self):
        indices = list(super().__iter__())
        whole = len(indices) // self.batch_size
        batches = [indices[n * self.batch_size : (n + 1) * self.batch_size] for n in range(whole)]
        order = torch.randperm(whole).tolist()
        yield from [index for n in order for index in batches[n]] + indices[whole * self.batch_size :]


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
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Hub id or directory of a plain backbone or of a full Sugar checkpoint; or a model.
        args ([`SugarTrainingConfig`], *optional*):
            Configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows in the conversational vision format: `messages` (or `prompt` and `completion`) and `images`; every
            content part is one slice. Optional columns: `loss_on` (`"answers"`, `"captions"` or `"text"`) and `id`,
            which error messages name.
        eval_dataset (same types, or `dict` of them, *optional*):
            Rows to evaluate on.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            The backbone's processor or a [`SugarProcessor`]. Defaults to the one saved with the model.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration; `target_modules` defaults to the paper's `["q_proj", "v_proj"]`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization used when the model is loaded from an id.
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
        "citation": (
            "@inproceedings{chow2024unified,\n"
            "    title     = {Unified Generative and Discriminative Training for Multi-modal Large Language Models},\n"
            "    author    = {Wei Chow and Juncheng Li and Qifan Yu and Kaihang Pan and Hao Fei and Zhiqi Ge and "
            "Shuai Yang and Siliang Tang and Hanwang Zhang and Qianru Sun},\n"
            "    booktitle = {Advances in Neural Information Processing Systems},\n"
            "    year      = 2024,\n"
            "}"
        ),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel",
        args: SugarTrainingConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: ProcessorMixin | None = None,
        quantization_config=None,
        peft_config=None,
        **kwargs,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SugarTrainingConfig(f"{name.split('/')[-1]}-Sugar")
        for name in ("data_collator", "compute_loss_func", "formatting_func"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}` cannot be combined with the structure loss: the trainer's own collator marks the slices, "
                    "and its own loss reads their embeddings from the one forward pass. Subclass `SugarTrainer` instead."
                )
        if args.label_smoothing_factor > 0:
            raise ValueError("`label_smoothing_factor` needs a second forward pass; set it to 0 with `SugarTrainer`.")

        self._structure = args.structure_weight > 0
        train_dataset = _prepared(train_dataset, "train_dataset")
        if isinstance(eval_dataset, dict):
            eval_dataset = {key: _prepared(value, f"eval_dataset[{key!r}]") for key, value in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = _prepared(eval_dataset, "eval_dataset")

        set_seed(args.seed)  # of a new retrieval projector
        model_init_kwargs = dict(args.model_init_kwargs or {})
        if isinstance(model, str):
            if processing_class is None:
                processing_class = SugarProcessor.from_pretrained(model, revision=model_init_kwargs.get("revision"))
            if quantization_config is not None:
                model_init_kwargs["quantization_config"] = quantization_config
            if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
                model_init_kwargs["device_map"] = None
            stored, _ = SugarConfig.get_config_dict(model, revision=model_init_kwargs.get("revision"))
            if stored.get("backbone_name_or_path") is not None:
                raise ValueError(
                    f"{model} is an adapter repository. To train on, load it, `merge_and_unload` it and pass the model; or "
                    "resume the run that made it (`resume_from_checkpoint`)."
                )
            if stored.keys() <= {"model_type", "vlm_config"}:  # a plain backbone: the projector is made new
                model_init_kwargs = {**_projector_settings(args), **model_init_kwargs}
            model = create_model_from_path(model, SugarForConditionalGeneration, **model_init_kwargs)
            args.model_init_kwargs = None
        elif not is_peft_model(model) and not isinstance(model, SugarForConditionalGeneration):
            model = SugarForConditionalGeneration.from_vlm(model, **_projector_settings(args))
        base = model.get_base_model() if is_peft_model(model) else model
        if not isinstance(base, SugarForConditionalGeneration):
            raise TypeError(
                f"The adapters are on a {type(base).__name__}, which has no retrieval projector. Wrap the backbone with "
                "`SugarForConditionalGeneration.from_vlm` before adding adapters, or pass `peft_config`."
            )
        if processing_class is None:
            processing_class = SugarProcessor.from_pretrained(get_config_model_id(base.config))
        processing_class = SugarProcessor.from_processor(processing_class)
        if peft_config is not None:
            peft_config = _for_language_model(peft_config, base)

        # SFTTrainer would cut at `max_length`; the collator refuses longer rows instead.
        self._max_length = args.max_length or base.config.get_text_config().max_position_embeddings
        args.max_length = None
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        args.max_length = self._max_length
        add_structure_head(self.model.get_base_model() if is_peft_model(self.model) else self.model)

        embed_slices = self._teacher_embeddings() if self._structure else None
        self.data_collator = SugarCollator(
            processing_class, self._max_length, embed_slices, self._structure and args.flip_captions, args.seed
        )
        self.add_callback(_TellEpoch(self.data_collator))
        self._eval_collator = SugarCollator(processing_class, self._max_length, embed_slices)
        self.structure_loss = StructureLoss(reduction=args.structure_reduction)

    def _send_telemetry(self):
        # TRL reports the start of a training over the network; nobody asked for that here.
        pass

    def _teacher_embeddings(self) -> Callable[[list[Any]], torch.Tensor]:
        """What embeds slices for the collator."""
        encoder = TripleEncoder.from_teachers(self.args.teachers, device=self.args.device)
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
        with self.args.main_process_first(desc="teacher embeddings"):
            for dataset in datasets:
                if isinstance(dataset, IterableDataset):
                    raise ValueError(
                        "`teacher_mode='cache'` reads the whole dataset before training, which a streaming one does not "
                        "allow: set `teacher_mode='online'`."
                    )
                cache.fill(dataset, encoder)

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = ["messages", "prompt", "completion", "image", "images", "loss_on", "id"]

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

        if self.args.gather_across_devices and self.accelerator.num_processes > 1:
            embeddings = _gather_with_gradient(self.accelerator, embeddings)
            rank = self.accelerator.process_index
            prefixes[:, 0] += rank * len(modality)
            counts = self.accelerator.gather(torch.tensor([len(prefixes)], device=prefixes.device)).tolist()
            padded = pad_across_processes(prefixes)
            gathered = self.accelerator.gather(padded).split(len(padded))
            prefixes = torch.cat([rows[:count] for rows, count in zip(gathered, counts)])
            teacher_embeddings = self.accelerator.gather(pad_across_processes(teacher_embeddings, dim=1))
            modality = self.accelerator.gather(pad_across_processes(modality, dim=1, pad_index=-1))
            present = modality >= 0

        offsets = torch.cat([present.new_zeros(1, dtype=torch.long), present.sum(dim=1).cumsum(0)])
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
        embed = embedder(model, self.processing_class, batch_size=self.args.per_device_eval_batch_size)
        results = image_text_retrieval(embed, images, texts, ks=(1,))
        return {
            "image_to_text_recall@1": results["image_to_text_recall@1"].value,
            "text_to_image_recall@1": results["text_to_image_recall@1"].value,
        }

    # Upstream restores nothing into a LLaVA resumed from full weights, because the names of the parameters in the file
    # are those of the older layout (huggingface/transformers#43701): load through the class, which converts them.
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self._load_full_weights(resume_from_checkpoint, model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if not self._load_full_weights(self.state.best_model_checkpoint, None):
            super()._load_best_model()

    def _load_full_weights(self, checkpoint: str, model) -> bool:
        model = self.model if model is None else model
        if is_peft_model(model) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        loaded = SugarForConditionalGeneration.from_pretrained(checkpoint, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())
        return True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """
        Save what [`SugarForConditionalGeneration.from_pretrained`] loads in one line: a full checkpoint, or under PEFT
        an adapter repository (configuration and processor, with the adapter and the retrieval projector in `adapter/`).

        Args:
            output_dir (`str`, *optional*):
                Directory to write to. Defaults to `args.output_dir`.
        """
        output_dir = output_dir or self.args.output_dir
        if _internal_call or not is_peft_model(self.model):
            super().save_model(output_dir, _internal_call)
            return
        super().save_model(str(Path(output_dir) / ADAPTER_SUBFOLDER), _internal_call=True)
        if self.args.should_save:
            config = self.model.get_base_model().config
            if config.backbone_name_or_path is None:
                config.backbone_name_or_path = config.name_or_path
                config.backbone_revision = getattr(config, "_commit_hash", None)
            config.save_pretrained(output_dir)
            self.processing_class.save_pretrained(output_dir)


def _prepared(dataset, name: str):
    """Refuse a dataset that cannot be trained on; leave its images undecoded, so that the collator can say which row an
    unreadable one is in."""
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(f"`{name}` must be a `datasets.Dataset` or `IterableDataset`, got {type(dataset).__name__}.")
    if isinstance(dataset, Dataset):
        validate_rows(dataset, name)
    return undecoded(dataset)


def _projector_settings(args: SugarTrainingConfig) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("retrieval_dim", "retrieval_hidden_size", "image_pooling")}


def _for_language_model(peft_config, model: SugarForConditionalGeneration):
    """The PEFT configuration with the retrieval projector among the modules saved whole, and everything outside of the
    language model excluded: `q_proj` is a name that vision towers use too."""
    decoder = model.vlm.get_decoder()
    name = next(name for name, module in model.named_modules() if module is decoder)
    if peft_config.target_modules is None:
        peft_config.target_modules = ["q_proj", "v_proj"]
    if peft_config.exclude_modules is None:
        peft_config.exclude_modules = rf"(?!{re.escape(name)}\.).*"
    peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or []), "retrieval_projector"})
    return peft_config


def _gather_with_gradient(accelerator, embeddings: torch.Tensor) -> torch.Tensor:
    """Rows of all processes in the order of their ranks; each process may have another number of them."""
    counts = accelerator.gather(torch.tensor([len(embeddings)], device=embeddings.device)).tolist()
    padded = torch.cat([embeddings, embeddings.new_zeros(max(counts) - len(embeddings), embeddings.shape[1])])
    gathered = distributed.all_gather(padded)
    return torch.cat([rows[:count] for rows, count in zip(gathered, counts)])
