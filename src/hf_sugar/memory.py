"""What a training run needs on a GPU, computed from configurations alone: `hf-sugar train --estimate-memory`."""

import copy
import weakref
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from .models import SugarConfig, SugarForConditionalGeneration
from .training.config import SugarTrainingConfig
from .training.loading import for_language_model, freeze_vision_tower


GIB = 2**30
RESERVE = GIB  # assumed: CUDA context, cuBLAS workspaces, gaps in the allocator


@dataclass
class MemoryEstimate:
    """What one process needs on its GPU: bytes by name, parameters without adapters, trained parameters, samples in a step,
    tokens in a sample, those of its images included, and how many processes there are."""

    parts: dict[str, int]
    parameters: int
    trained: int
    batch_size: int
    length: int
    processes: int = 1

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def table(self, cards: tuple[int, ...] = (12, 16, 24, 40, 48, 80, 96, 141, 192)) -> str:
        """The parts, and which cards (sizes in GiB) they fit, in Markdown."""
        sizes = [(name, size / GIB) for name, size in {**self.parts, "**total**": self.total}.items()]
        left = [(card, card - self.total / GIB) for card in cards]
        return (
            f"{self.parameters / 1e9:.2f} billion parameters, {self.trained / 1e6:.1f} million trained; "
            f"{self.batch_size} x {self.length} tokens, image tokens included; each of {self.processes} GPU(s)\n\n"
            "| part | GiB |\n|---|---|\n"
            + "".join(f"| {name} | {gib:.2f} |\n" for name, gib in sizes)
            + "\n| card | fits | GiB left |\n|---|---|---|\n"
            + "".join(f"| {card} GB | {'yes' if gib >= 0 else 'no'} | {gib:.2f} |\n" for card, gib in left)
            + "\nAn estimate, not measured on a GPU."
        )


def estimate_memory(
    config: SugarConfig,
    args: SugarTrainingConfig,
    peft_config: PeftConfig | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    processes: int = 1,
    sharding: str | None = None,
) -> MemoryEstimate:
    """
    Memory of one process of a training run: no weights are read or allocated.

    Activations are those of a forward and a backward pass of the real language model, adapters and activation
    checkpointing included, on tensors that have shapes but no data; the peak is the most bytes that were alive at once.
    Of a vision tower that is trained too, only weights, gradients and optimizer states are counted. The sequences beside the
    rows (`singles_per_sample`) are taken to be an image each.

    Args:
        config ([`SugarConfig`]): Configuration of the model.
        args ([`SugarTrainingConfig`]): Every sample is taken to have `max_length` tokens with a label each.
        peft_config ([`~peft.PeftConfig`], *optional*): Adapters. Without it everything is trained.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): Quantization of the backbone.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of what is not quantized.
        attn_implementation (`str`, *optional*): `"eager"` keeps the attention weights; all others do not.
        processes (`int`, *optional*, defaults to 1): Of the run, one a GPU.
        sharding (`str`, *optional*): What these divide among them: `"fsdp2"`, `"zero2"`, `"zero3"`, or nothing.
    """
    with init_empty_weights():
        model = SugarForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation="eager" if attn_implementation == "eager" else "sdpa"
        )
        parameters = model.num_parameters()
        if args.freeze_vision_tower:
            freeze_vision_tower(model)
        if quantization_config is not None:
            _mark_quantized(model, quantization_config)
        trained = model if peft_config is None else get_peft_model(model, for_language_model(peft_config, model))
        for name, parameter in trained.named_parameters():  # as TRL and SugarTrainer do
            if quantization_config and parameter.requires_grad and "lora_" in name and "magnitude" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)

    quantized = [module for module in trained.modules() if isinstance(module, _QuantizedLinear)]
    full = sum(t.nbytes for t in (*trained.parameters(), *trained.buffers())) - sum(m.weight.nbytes for m in quantized)
    learned = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    learned_bytes = sum(parameter.nbytes for parameter in learned)
    length = args.max_length or config.get_text_config().max_position_embeddings
    if args.max_batch_tokens:
        args = copy.copy(args)
        args.per_device_train_batch_size = -(-args.max_batch_tokens // length)
    parts = {
        "backbone, quantized": sum(_quantized_bytes(module, quantization_config) for module in quantized),
        "backbone and projector as loaded, not quantized": full - learned_bytes,
        "trained weights (adapters, projector)": learned_bytes,
        "gradients": learned_bytes,
        f"optimizer states ({args.optim.value})": _optimizer_bytes(args.optim.value, learned),
        **({} if sharding is None else _shares(model, learned, full - learned_bytes, args, processes, sharding)),
        "activations and working space, peak": _peak(trained, model, args, length, processes),
        "CUDA context and allocator (assumed)": RESERVE,
    }
    return MemoryEstimate(
        {name: size for name, size in parts.items() if size},
        parameters,
        sum(parameter.numel() for parameter in learned),
        args.per_device_train_batch_size,
        length,
        processes,
    )


def _shares(model, learned: list[nn.Parameter], frozen: int, args: SugarTrainingConfig, processes: int, sharding: str):
    """What a process has of weights, gradients and states that are divided, and what it gathers meanwhile. In mixed precision
    accelerate makes of the weights that FSDP2 trains float32 ones, and DeepSpeed has a float32 copy of its share."""
    count = sum(parameter.numel() for parameter in learned)
    mixed = args.bf16 or args.fp16
    size = 2 if mixed and sharding != "fsdp2" else 4 if mixed else learned[0].element_size()
    name = args.optim.value
    states = _optimizer_bytes(name if "8bit" in name or not mixed else f"{name} 32bit", learned)
    parts = {"gradients": size * count // processes, f"optimizer states ({name})": states // processes}
    if mixed and sharding != "fsdp2":
        parts["float32 copy of what is trained"] = 4 * count // processes
    parts["trained weights (adapters, projector)"] = size * count // (1 if sharding == "zero2" else processes)
    if sharding == "zero2":
        return parts
    parts["backbone and projector as loaded, not quantized"] = frozen // processes
    dtype_size = 2 if mixed else learned[0].element_size()
    whole = sum(parameter.numel() for parameter in model.parameters())
    if sharding == "zero3":
        gathered = min(whole, 10**9)  # DeepSpeed's `stage3_max_live_parameters`
    else:  # a layer, the next one, and what is in no layer
        layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
        sizes = sorted(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
        gathered = whole - sum(sizes) + sum(sizes[-2:])
    return {**parts, "weights gathered from all processes": dtype_size * gathered}


class _QuantizedProduct(torch.autograd.Function):
    """Keeps for the backward pass what bitsandbytes does, the quantized weight, and makes the same copies of it."""

    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.weight = weight
        return nn.functional.linear(inputs, torch.empty_like(weight).to(inputs.dtype))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ torch.empty_like(ctx.weight).to(gradient.dtype), None


class _QuantizedLinear(nn.Linear):
    """A linear layer that counts as quantized."""

    def forward(self, inputs):
        output = _QuantizedProduct.apply(inputs.to(self.compute_dtype), self.weight)
        if self.bias is not None:
            output = output + self.bias.to(self.compute_dtype)
        return output.to(inputs.dtype)


def _mark_quantized(model: SugarForConditionalGeneration, quantization_config: BitsAndBytesConfig):
    quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
    skipped = quantizer.get_modules_to_not_convert(
        model, quantization_config.llm_int8_skip_modules, model._keep_in_fp32_modules
    )
    in_4bit = quantization_config.load_in_4bit
    for name, module in model.named_modules():
        if type(module) is nn.Linear and should_convert_module(name, skipped):
            module.__class__ = _QuantizedLinear
            module.compute_dtype = quantization_config.bnb_4bit_compute_dtype if in_4bit else torch.float16
            module.requires_grad_(False)


def _quantized_bytes(module: nn.Linear, quantization_config: BitsAndBytesConfig) -> int:
    """A quantized weight with its constants."""
    size = module.weight.numel()
    if not quantization_config.load_in_4bit:
        return size + 4 * module.out_features  # a maximum of each row
    blocks = -(-size // 64)  # with a maximum each, and the table of the 16 levels
    if not quantization_config.bnb_4bit_use_double_quant:
        return size // 2 + 4 * (blocks + 16)
    # the maxima are bytes, with a maximum of every 256, a table and their mean
    return size // 2 + blocks + 4 * (-(-blocks // 256) + 16 + 256 + 1)


def _optimizer_bytes(name: str, parameters: list[nn.Parameter]) -> int:
    """Two states a parameter, as AdamW has them: more than most others need."""
    if "sgd" in name:
        return 0
    if "8bit" in name:  # with one float32 a block of 256; small tensors stay in float32
        return sum(int(p.numel() * 2 * (1 + 4 / 256)) if p.numel() >= 4096 else 8 * p.numel() for p in parameters)
    return sum(2 * p.numel() * (4 if "32bit" in name else p.element_size()) for p in parameters)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is entered: `now` alive, and at most (`peak`)."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):  # of what was there before, a view may come out
                self._known[tensor.untyped_storage()] = True
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self._known:
                storage = tensor.untyped_storage()
                self._known[storage] = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return output

    def _free(self, size: int):
        self.now -= size


def _peak(trained: nn.Module, model: SugarForConditionalGeneration, args, length: int, processes: int) -> int:
    """Most bytes alive in one training step, beside weights, gradients and optimizer states."""
    batch_size = args.per_device_train_batch_size
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    trained.train()
    if args.gradient_checkpointing:
        # transformers 5.23 warns of the name that 5.20 has alone
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(args.gradient_checkpointing_kwargs)
    with FakeTensorMode(allow_non_fake_inputs=True):
        trained.to_empty(device="cpu")
        for parameter in trained.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        embedding = model.get_input_embeddings().weight
        with LiveBytes() as live:
            with torch.autocast("cpu", half, enabled=half is not None):
                hidden = torch.empty(batch_size, length, embedding.shape[1], dtype=embedding.dtype)
                hidden = model.vlm.get_decoder()(inputs_embeds=hidden, use_cache=False)[0]
                outputs = [_structure(model, hidden, args, processes)] if args.structure_weight else []
                labelled, gradient = _head(model, hidden, half or embedding.dtype)
                if outputs and args.singles_per_sample and not args.flip_captions:
                    size = batch_size * args.singles_per_sample, min(_image_tokens(model.config), length)
                    hidden = torch.empty(*size, embedding.shape[1], dtype=embedding.dtype)
                    hidden = model.vlm.get_decoder()(inputs_embeds=hidden, use_cache=False)[0]
                    outputs += [_structure(model, hidden, args, processes)]
                del hidden
            outputs = [labelled, *outputs]
            torch.autograd.backward(outputs, [gradient, *map(torch.empty_like, outputs[1:])])
    return live.peak


def _image_tokens(config: SugarConfig) -> int:
    vision = getattr(config.vlm_config, "vision_config", None)
    size, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
    return (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) else 576


def _structure(model: SugarForConditionalGeneration, hidden: torch.Tensor, args: SugarTrainingConfig, processes: int):
    """Embeddings, and for a moment the matrices of labels and cosines."""
    batch_size, length, size = hidden.shape
    slices = batch_size * args.positions_per_sample
    pooled = torch.zeros(slices + batch_size, size)
    pooled = pooled.index_add(0, torch.zeros(batch_size * length, dtype=torch.long), hidden.reshape(-1, size).float())
    embeddings = nn.functional.normalize(model.retrieval_projector(pooled[batch_size:]).float(), dim=-1)
    positions = slices * (processes if args.gather_across_devices else 1)
    torch.empty(4, positions, positions)
    return embeddings


def _head(model: SugarForConditionalGeneration, hidden: torch.Tensor, dtype: torch.dtype):
    """What TRL's fused LM head holds at once: the positions with a label, a tile of their logits, the weights for that
    tile, and the gradient."""
    labelled = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    weight = model.get_output_embeddings().weight[:_CHUNKED_LOGPROB_CHUNK_SIZE]
    tile = torch.empty(min(len(labelled), TOKEN_CHUNK_SIZE), _CHUNKED_LOGPROB_CHUNK_SIZE, dtype=dtype)
    gradient = torch.empty_like(labelled, dtype=torch.float32)
    weight = weight.to(dtype)
    del tile
    return labelled, gradient.to(labelled.dtype)
