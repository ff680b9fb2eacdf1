"""What tells models apart, whatever precision they are loaded in."""

import base64
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


PREFIX = "weights:"
SAMPLES = 4  # of each weight in a fingerprint
SAMPLE = np.dtype([("name", "<u4"), ("values", "<i2", SAMPLES)])
SAMPLED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fingerprint(model: nn.Module, adapters: bool = False) -> str:
    """What tells models (or backbones) apart, to be compared by [`same_fingerprint`]: a few numbers of every weight, each
    beside a checksum of the weight's name, as 16 characters; with `adapters` those of the active adapter too. Quantized
    weights and those that are not whole on this process (sharded, offloaded) are left out."""
    weights = dict(_weights(model))
    if adapters and (adapter := model._active_adapter()) is not None:
        if not any(module.disable_adapters for _, module in model._adapter_modules()):
            # with the trained projector in the place of the one that it was made from
            weights |= model._adapter_weights(adapter)
    names, samples, seen = [], [], set()
    for name, weight in weights.items():
        # a quantized or sharded weight is of another class or dtype
        plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.dtype in SAMPLED_DTYPES
        if not plain or weight.is_meta or weight.numel() == 0 or id(weight) in seen:
            continue
        seen.add(id(weight))
        places = [weight.numel() * n // (SAMPLES + 1) for n in range(1, SAMPLES + 1)]
        names.append(zlib.crc32(name.encode()))
        samples.append(weight.detach().flatten()[places].to(torch.bfloat16).cpu())
    records = np.empty(len(names), SAMPLE)
    if names:
        records["name"], records["values"] = names, torch.stack(samples).view(torch.int16).numpy()
    return PREFIX + base64.b64encode(records.tobytes()).decode()


def same_fingerprint(first: str, second: str) -> bool:
    """Whether two [`fingerprint`]s are of the same weights, in whatever precision each was loaded. What only one of them
    has, because the other was quantized, is not compared."""
    if not (first.startswith(PREFIX) and second.startswith(PREFIX)):
        return first == second
    tables = []
    for text in (first, second):
        records = np.frombuffer(base64.b64decode(text.removeprefix(PREFIX)), SAMPLE)
        tables.append(dict(zip(records["name"].tolist(), records["values"])))
    common = tables[0].keys() & tables[1].keys()
    if not common:
        return not all(tables)  # of one of them, nothing is known
    values = (np.stack([table[name] for name in common]) for table in tables)
    ours, theirs = (torch.from_numpy(array).view(torch.bfloat16).float() for array in values)
    # a unit in the last place, because float16 is rounded twice, and the smallest that float16 has
    return torch.allclose(ours, theirs, rtol=2**-7, atol=1e-7, equal_nan=True)


def _weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Weights of the model without adapters, by the names that they have there."""
    if (inner := unwrapped(module)) is not module:
        yield from _weights(inner, prefix)
        return
    yield from ((prefix + name, weight) for name, weight in module._parameters.items() if weight is not None)
    for name, child in module._modules.items():
        if child is not None:
            yield from _weights(child, f"{prefix}{name}.")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself where PEFT has put one of its own around it."""
    for name in ("base_layer", "original_module", "token_adapter"):
        if module._modules.get(name) is not None:
            return unwrapped(module._modules[name])
    return module
