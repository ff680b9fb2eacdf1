import math
from dataclasses import InitVar, dataclass

import torch
from transformers.utils import is_torch_bf16_gpu_available, logging
from trl import SFTConfig

from ..alignment.kernel import LARGEST_DELTA, SMALLEST_DELTA
from ..settings import setting


logger = logging.get_logger(__name__)

# Settings of SFTConfig that mean nothing here, with what does.
_WITHOUT_EFFECT = {
    "packing": "A row stays by itself: the structure loss compares rows.",
    "packing_strategy": "A row stays by itself: the structure loss compares rows.",
    "eval_packing": "A row stays by itself: the structure loss compares rows.",
    "completion_only_loss": "What is learnt is said by the rows: of `prompt` and `completion` the completion, of "
    "`messages` what the column `loss_on` says.",
    "assistant_only_loss": "What is learnt is said by the rows: give them a column `loss_on` of 'answers' (its default).",
    "pad_to_multiple_of": "Batches are padded to their longest row.",
    "label_smoothing_factor": "It needs a second forward pass.",
}
# Smallest and largest value.
_RANGES = {
    "learning_rate": (0, 1e6),
    "weight_decay": (0, 1e6),
    "structure_weight": (0, 1e6),
    "contrastive_weight": (0, 1e6),
    "contrastive_temperature": (1e-3, 1e3),
    "contrastive_mask_above": (-1, math.inf),
    "delta": (SMALLEST_DELTA, LARGEST_DELTA),
    "singles_per_sample": (0, math.inf),
    "eval_retrieval_rows": (0, math.inf),
    **dict.fromkeys(
        """matrix_batch_size positions_per_sample retrieval_dim retrieval_hidden_size max_length max_batch_tokens
        per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps""".split(),
        (1, math.inf),
    ),
}


@dataclass
class LabelSettings:
    """What the labels of pairs depend on, beside teachers and data. A `ValueError` names a value out of range."""

    delta: float = setting(
        "Bandwidth of the alignment kernel: sigma = delta * sqrt((n + m) / 2) for sequences of n and m slices.", 1.0
    )
    label_kernel: str = setting(
        "'gak' aligns the slice sequences, 'mean' averages over all slice pairs (the 'w/o GAK' ablation).",
        "gak",
        choices=["gak", "mean"],
    )
    label_normalization: str = setting(
        "Normalisation of the alignment kernel.", "self+count", choices=["none", "self", "count", "self+count"]
    )
    positions_per_sample: int = setting(
        "How many slice ends of each sample are drawn at every step; a sample with fewer slices gives all.", 4
    )
    singles_per_sample: int = setting(
        "How many of the later slices of a row, images before texts, stand beside it as sequences of their own; of a "
        "conversation its further images.",
        1,
    )

    def __post_init__(self):
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name, None)
            if value is not None and not (isinstance(value, int | float) and least <= value <= most):
                raise ValueError(f"`{name}` is {value!r}; it must be from {least} to {most:g}.")
        # transformers' own fields have choices too, and hold what is made of them
        ours = [cls for cls in type(self).__mro__ if issubclass(cls, LabelSettings)]
        for name in (name for cls in ours for name in cls.__annotations__):
            choices = self.__dataclass_fields__[name].metadata.get("choices")
            if choices and getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be one of {', '.join(choices)}.")


@dataclass
class SugarTrainingConfig(LabelSettings, SFTConfig):
    """
    Configuration of [`SugarTrainer`]: everything that [`~trl.SFTConfig`] has, and the settings of the discriminative loss of
    [Sugar](https://huggingface.co/papers/2411.00304), which `hf-sugar train --help` lists with their meaning.

    Defaults that differ from [`~trl.SFTConfig`]: `learning_rate` 1e-4, `lr_scheduler_type` `"cosine"` and `warmup_steps`
    0.03, as in the paper; `max_length` `None`; and `bf16`, `use_cpu` are what the machine can do.

    Raises:
        `ValueError`: for a value out of range, and for a setting of [`~trl.SFTConfig`] that would have no effect.
    """

    learning_rate: float = setting("Peak learning rate.", 1e-4)
    lr_scheduler_type: str = setting("Learning rate schedule.", "cosine")
    warmup_steps: float = setting("Warm-up: a number of steps, or below 1 a share of all steps.", 0.03)
    max_length: int | None = setting(
        "Longest sequence allowed, image tokens included; a longer sample is an error, never cut. Defaults to what the "
        "model takes.",
        None,
    )

    padding_free: bool = setting(
        "Lay the rows of a batch end to end instead of padding them, with the same losses ('sdpa' or flash attention).",
        False,
    )
    max_batch_tokens: int | None = setting(
        "About so many tokens, images expanded, are a training batch of a device, instead of a number of rows. Needs "
        "`padding_free`.",
        None,
    )

    # Discriminative loss
    structure_weight: float | None = setting(
        "Weight of the discriminative loss (alpha in Eq. 1); 0 is plain supervised fine-tuning. Defaults to 0.01, and to "
        "0.3 for the structure loss alone.",
        None,
    )
    discriminative_loss: str = setting(
        "'structure' is the paper's loss, 'contrastive' InfoNCE of pairs that belong together, 'both' is structure_loss + "
        "contrastive_weight * contrastive_loss.",
        "both",
        choices=["structure", "contrastive", "both"],
    )
    contrastive_weight: float = setting("Weight of the contrastive loss within the discriminative loss.", 40.0)
    contrastive_temperature: float = setting("Temperature of the contrastive loss.", 0.1)
    contrastive_mask_above: float = setting(
        "Candidates that the teachers call so similar to the right one are no negatives; 0 is the mean of such pairs, 1 is "
        "equal.",
        0.95,
    )
    label_calibration: str = setting(
        "'blocks' brings each kind of pair to one mean and spread, 'none' leaves the paper's labels.",
        "blocks",
        choices=["blocks", "none"],
    )
    matrix_batch_size: int | None = setting(
        "Rows of a device that are compared with one another; `per_device_train_batch_size`, the default, are in memory at a "
        "time.",
        None,
    )
    structure_reduction: str = setting(
        "Reduction of the structure loss: 'row_mean' is Eq. 3 (1/n), 'mean' is 1/n^2, 'sum' is neither.",
        "row_mean",
        choices=["row_mean", "mean", "sum"],
    )
    gather_across_devices: bool = setting(
        "Whether to compare the positions of all processes with one another. Gradient accumulation does not enlarge "
        "the comparison.",
        True,
    )
    allow_single_sample: bool = setting(
        "Whether a label matrix may hold one sample alone, whose positions are all alike.", False
    )
    flip_captions: bool = setting(
        "Image-caption rows appear in either order at random, without generative loss where they are flipped, and no slices "
        "stand beside rows.",
        False,
    )

    # Teachers
    teachers: dict | str | None = setting(
        "Hub ids or directories of the frozen encoders: `image`, `text` and `cross` (a CLIP-like pair); `cross` alone "
        "is used for everything (the 'w/o TK' ablation). It may also hold `revisions`, `dtype`, `long_text` ('windows' or "
        "'truncate') and `batch_size`. 'tiny' stands for those in this package. Defaults to DINOv2-base, BGE-base and CLIP "
        "ViT-L/14, or to those that the embeddings in the data are from.",
        None,
    )
    teacher_mode: str = setting(
        "'cache' embeds every slice of the dataset that has no embedding once before training, 'online' batch by batch.",
        "cache",
        choices=["cache", "online"],
    )
    teacher_cache_dir: str | None = setting(
        "Where embeddings are kept. Defaults to `teacher_cache` in `output_dir`.", None
    )

    # Model
    image_pooling: str = setting(
        "What represents an image: the mean of the hidden states of its tokens, or the last one.",
        "mean",
        choices=["mean", "last"],
    )
    retrieval_dim: int = setting("Size of the embeddings, when the retrieval projector is made new.", 768)
    retrieval_hidden_size: int | None = setting(
        "Width of the hidden layer of a new retrieval projector. Defaults to the language model's hidden size.", None
    )
    freeze_vision_tower: bool = setting(
        "Whether the vision tower stays as it is where full weights are trained.", False
    )
    matryoshka_dims: list[int] | None = setting(
        "Lengths, besides the whole one, to which embeddings may be cut: the discriminative loss is the mean over all. "
        "Defaults to the model's.",
        None,
    )
    # On the command line these two are settings of `trl.ModelConfig` and of the data, so they are no fields here. QLoRA:
    # a model that is named by id is loaded with NF4 weights, double quantization and bfloat16 compute.
    load_in_4bit: InitVar[bool] = False
    # "error" stops at a row that cannot be used; "skip" leaves it out, having opened every image once more to find it.
    on_bad_row: InitVar[str] = "error"

    # Evaluation
    eval_retrieval_rows: int = setting(
        "Image-text retrieval is measured too, among the first so many rows of the evaluation dataset that have one "
        "image and one answer or caption; 0 for none.",
        512,
    )

    # parsed from JSON on the command line, as transformers does for its own dict fields
    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "teachers"]

    def __post_init__(self, load_in_4bit: bool, on_bad_row: str):
        # Defaults that the machine decides: TRL's are those of a recent GPU, and an error anywhere else.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None and not self.fp16 and (self.use_cpu or not is_torch_bf16_gpu_available()):
            self.bf16 = False
            logger.info_once("This machine has no GPU with bfloat16: `bf16` is off.")
        # TRL sets what transformers 5.23 calls `activation_checkpointing` and warns of; 5.20 has only the old name
        if "activation_checkpointing" in self.__dataclass_fields__ and self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if self.structure_weight is None:
            self.structure_weight = 0.3 if self.discriminative_loss == "structure" else 0.01
        SFTConfig.__post_init__(self)
        self.load_in_4bit = load_in_4bit
        self.on_bad_row = on_bad_row

        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"`on_bad_row` is {on_bad_row!r}; it must be error or skip.")
        for name, value in vars(self).items():
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"`{name}` is nan; it must be a number.")
        for name, remedy in _WITHOUT_EFFECT.items():
            if getattr(self, name) not in (None, self.__dataclass_fields__[name].default):
                raise ValueError(f"`{name}` would have no effect. {remedy}")
        LabelSettings.__post_init__(self)
        if self.max_batch_tokens and (self.matrix_batch_size or not self.padding_free):
            raise ValueError("`max_batch_tokens` needs `padding_free`, and no `matrix_batch_size`.")
        if self.matrix_batch_size and self.auto_find_batch_size:
            raise ValueError("`auto_find_batch_size` would change what `matrix_batch_size` compares: leave it out.")
        if self.matrix_batch_size:
            batches, rest = divmod(self.matrix_batch_size, self.per_device_train_batch_size)
            if self.gradient_accumulation_steps == 1 and not rest:
                self.gradient_accumulation_steps = batches
            if rest or self.gradient_accumulation_steps % batches:
                raise ValueError(
                    f"`matrix_batch_size` is {self.matrix_batch_size}: it must be a multiple of `per_device_train_batch_size` and "
                    f"`gradient_accumulation_steps` ({self.gradient_accumulation_steps}) 1 or a multiple of their quotient."
                )
        if self.activation_offloading and self.use_cpu:
            raise ValueError(
                "`activation_offloading` moves activations from an accelerator to the CPU: leave it out here."
            )
        if self.discriminative_loss == "structure":
            for name in ("contrastive_weight", "contrastive_temperature", "contrastive_mask_above"):
                if getattr(self, name) != self.__dataclass_fields__[name].default:
                    raise ValueError(
                        f"`{name}` would have no effect: `discriminative_loss` is 'structure'. Leave it out."
                    )
        if self.flip_captions and self.discriminative_loss != "structure":
            raise ValueError("`flip_captions` leaves no pairs to contrast: set `discriminative_loss='structure'`.")
        if self.teacher_mode == "online" and self.dataloader_num_workers > 0:
            raise ValueError("`teacher_mode='online'` needs `dataloader_num_workers=0`. Set it, or use 'cache'.")
