from dataclasses import InitVar, dataclass, field

import torch
from transformers.utils import is_torch_bf16_gpu_available, logging
from trl import SFTConfig

from ..alignment.kernel import _check_delta


logger = logging.get_logger(__name__)


@dataclass
class SugarTrainingConfig(SFTConfig):
    r"""
    Configuration of [`SugarTrainer`]: everything that [`~trl.SFTConfig`] has, and the settings of the structure loss
    of [Sugar](https://huggingface.co/papers/2411.00304).

    Defaults that differ from [`~trl.SFTConfig`]: `learning_rate` 1e-4, `lr_scheduler_type` `"cosine"` and
    `warmup_steps` 0.03 (a share of all steps), as in the paper; and `max_length` `None`, which stands for the longest
    sequence that the model takes. A longer sample is an error, never cut.

    Parameters:
        > Parameters that control the structure loss

        structure_weight (`float`, *optional*, defaults to `0.3`):
            Weight of the structure loss (alpha in Eq. 1; the paper does not publish its value). With `0.0` the trainer
            is plain supervised fine-tuning.
        delta (`float`, *optional*, defaults to `1.0`):
            Bandwidth of the alignment kernel: sigma = delta * sqrt((n + m) / 2) for sequences of n and m slices.
        positions_per_sample (`int`, *optional*, defaults to `4`):
            How many slice ends of each sample are drawn at every step. A sample with fewer slices gives all of them.
        label_kernel (`str`, *optional*, defaults to `"gak"`):
            `"gak"` aligns the slice sequences; `"mean"` averages the similarity over all slice pairs (the "w/o GAK"
            ablation).
        label_normalization (`str`, *optional*, defaults to `"self+count"`):
            Normalisation of the alignment kernel: `"none"`, `"self"`, `"count"` or `"self+count"`.
        structure_reduction (`str`, *optional*, defaults to `"row_mean"`):
            Reduction of the structure loss, see [`StructureLoss`].
        gather_across_devices (`bool`, *optional*, defaults to `True`):
            Whether to compare the positions of all processes with one another. Gradient accumulation does not enlarge
            the comparison.
        flip_captions (`bool`, *optional*, defaults to `True`):
            Whether image-caption rows appear in both orders at random, so that text that has not seen its image is
            trained too. A flipped row carries no generative loss.

        > Parameters that control the teachers

        teachers (`dict[str, str]`, *optional*):
            Hub ids or directories of the frozen encoders: `image`, `text` and `cross` (a CLIP-like pair). With `cross`
            alone it is used for everything (the "w/o TK" ablation). Defaults to DINOv2-base, BGE-base and CLIP
            ViT-L/14.
        teacher_mode (`str`, *optional*, defaults to `"cache"`):
            `"cache"` embeds every slice of the dataset once, before training; `"online"` embeds batch by batch.
        teacher_cache_dir (`str`, *optional*):
            Where the cache is kept. Defaults to `teacher_cache` in `output_dir`.

        > Parameters that control the model

        image_pooling (`str`, *optional*, defaults to `"mean"`):
            What represents an image: the `"mean"` of the hidden states of its tokens, or the `"last"` one.
        retrieval_dim (`int`, *optional*, defaults to `768`):
            Size of the embeddings, when the retrieval projector is made new.
        retrieval_hidden_size (`int`, *optional*):
            Width of the hidden layer of a new retrieval projector. Defaults to the hidden size of the language model.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            QLoRA: load a model that is named by id with NF4 weights, double quantization and bfloat16 compute
            (bitsandbytes). For anything else pass `quantization_config` to the trainer. On the command line it is a
            setting of the model ([`~trl.ModelConfig`]), not of the training.

        > Parameters that control the data

        on_bad_row (`str`, *optional*, defaults to `"error"`):
            What is done with a row that cannot be used (an unreadable image, too many tokens, a malformed conversation):
            `"error"` stops and names it, `"skip"` leaves it out, logs the first few, and says at the end how many there
            were. To find them, every image is opened once more. On the command line it is a setting of the data.

        > Parameters that control the evaluation

        eval_retrieval_rows (`int`, *optional*, defaults to `512`):
            Evaluation also measures image-text retrieval among the first so many rows of the evaluation dataset that
            have one image and one answer or caption. `0` turns it off.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Warm-up: a number of steps, or below 1 a share of all steps."}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest sequence allowed, image tokens included; a longer sample is an error. Defaults to what the "
            "model takes."
        },
    )

    # Parameters that control the structure loss
    structure_weight: float = field(
        default=0.3,
        metadata={"help": "Weight of the structure loss (alpha in Eq. 1). 0 is plain supervised fine-tuning."},
    )
    delta: float = field(
        default=1.0, metadata={"help": "Bandwidth of the alignment kernel: sigma = delta * sqrt((n + m) / 2)."}
    )
    positions_per_sample: int = field(
        default=4, metadata={"help": "How many slice ends of each sample are drawn at every step."}
    )
    label_kernel: str = field(
        default="gak",
        metadata={
            "help": "'gak' aligns the slice sequences, 'mean' averages over all slice pairs.",
            "choices": ["gak", "mean"],
        },
    )
    label_normalization: str = field(
        default="self+count",
        metadata={
            "help": "Normalisation of the alignment kernel.",
            "choices": ["none", "self", "count", "self+count"],
        },
    )
    structure_reduction: str = field(
        default="row_mean",
        metadata={
            "help": "Reduction of the structure loss: 'row_mean' is Eq. 3 (1/n), 'mean' is 1/n^2, 'sum' is neither.",
            "choices": ["row_mean", "mean", "sum"],
        },
    )
    gather_across_devices: bool = field(
        default=True, metadata={"help": "Whether to compare the positions of all processes with one another."}
    )
    flip_captions: bool = field(
        default=True, metadata={"help": "Whether image-caption rows appear in both orders at random."}
    )

    # Parameters that control the teachers
    teachers: dict | str | None = field(
        default=None,
        metadata={
            "help": "Hub ids or directories of the frozen encoders: `image`, `text` and `cross`; `cross` alone is used "
            "for everything. It may also hold `revisions`, `dtype`, `long_text` ('windows' or 'truncate') and "
            "`batch_size`."
        },
    )
    teacher_mode: str = field(
        default="cache",
        metadata={
            "help": "'cache' embeds every slice of the dataset once before training, 'online' batch by batch.",
            "choices": ["cache", "online"],
        },
    )
    teacher_cache_dir: str | None = field(
        default=None, metadata={"help": "Where the cache is kept. Defaults to `teacher_cache` in `output_dir`."}
    )

    # Parameters that control the model
    image_pooling: str = field(
        default="mean",
        metadata={
            "help": "What represents an image: the mean of the hidden states of its tokens, or the last one.",
            "choices": ["mean", "last"],
        },
    )
    retrieval_dim: int = field(
        default=768, metadata={"help": "Size of the embeddings, when the retrieval projector is made new."}
    )
    retrieval_hidden_size: int | None = field(
        default=None,
        metadata={
            "help": "Width of the hidden layer of a new retrieval projector. Defaults to the language model's hidden size."
        },
    )

    # Not a field: parsers that take this class together with `trl.ModelConfig` have `--load_in_4bit` from there.
    load_in_4bit: InitVar[bool] = False
    on_bad_row: InitVar[str] = "error"  # likewise, from `hf_sugar.cli.arguments.DataArguments`

    # Parameters that control the evaluation
    eval_retrieval_rows: int = field(
        default=512,
        metadata={"help": "Rows of the evaluation dataset among which image-text retrieval is measured; 0 for none."},
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
        super().__post_init__()
        self.load_in_4bit = load_in_4bit
        self.on_bad_row = on_bad_row
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"`on_bad_row` is {on_bad_row!r}; it must be error or skip.")
        if self.structure_weight < 0:
            raise ValueError(f"`structure_weight` is {self.structure_weight}; it must be 0 or more.")
        _check_delta(self.delta)
        if self.positions_per_sample < 1:
            raise ValueError(f"`positions_per_sample` is {self.positions_per_sample}; it must be 1 or more.")
        for name in ("label_kernel", "label_normalization", "structure_reduction", "teacher_mode", "image_pooling"):
            choices = self.__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be one of {', '.join(choices)}.")
        if self.teacher_mode == "online" and self.dataloader_num_workers > 0:
            raise ValueError(
                "`teacher_mode='online'` runs the teachers in the training process: set `dataloader_num_workers=0`, or "
                "use `teacher_mode='cache'`."
            )
