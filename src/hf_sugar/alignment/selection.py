"""Which implementation of the alignment kernel runs: a compiled one if there is one, PyTorch otherwise."""

import functools
import importlib.util
import logging
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch


logger = logging.getLogger(__name__)

HUB_REPOSITORY, HUB_VERSION = "hf-sugar/gak", 1
BACKENDS = ("auto", "torch", "local", "hub")

# src/hf_sugar/alignment/selection.py of a source checkout; an installed wheel has no such folder.
CHECKOUT = Path(__file__).resolve().parents[3] / "hub_kernels" / "gak"


# Threads that come first together must not load, test and warn each for itself.
_SELECTING = threading.RLock()


class KernelFallbackWarning(UserWarning):
    """A compiled alignment kernel that was asked for, or is there, cannot be used; PyTorch does its work."""


def compiled_kernel(device: str, backend: str = "auto") -> ModuleType | None:
    """
    The compiled alignment kernel for tensors of a device.

    Tried in this order: a local build, the Hub, Triton (CUDA tensors only). Nothing is looked up on the network unless
    `"hub"` is asked for. A local build must have the digests it was built with, and every candidate pass a test call;
    what was found is kept for the life of the process, and the reason why something was not usable is given once, as a
    [`KernelFallbackWarning`].

    Args:
        device (`str`):
            Type of the tensors' device: `"cpu"`, `"cuda"`.
        backend (`str`, *optional*, defaults to `"auto"`):
            - `"auto"`: what the environment variable `HF_SUGAR_KERNELS` says, one of the following. Without it, a local
              build if there is one.
            - `"torch"`: none.
            - `"local"`: a local build, in the folder named by `HF_SUGAR_KERNEL_PATH` or under `hub_kernels` of a source
              checkout.
            - `"hub"`: a local build, or else the Hub kernel `hf-sugar/gak`, which is downloaded and run.

    Returns:
        `module` or `None`: a module with `packed_alignment_kernel`, or `None` for the PyTorch path.

    Raises:
        `ValueError`: if `backend` or `HF_SUGAR_KERNELS` is none of these.
    """
    name, value = "`backend`", backend
    if backend == "auto":
        name, value = "The environment variable HF_SUGAR_KERNELS", os.environ.get("HF_SUGAR_KERNELS") or "auto"
    if value not in BACKENDS:
        raise ValueError(f"{name} must be one of {BACKENDS}, got {value!r}.")
    if value == "torch":
        return None
    with _SELECTING:
        return _select(device, value, os.environ.get("HF_SUGAR_KERNEL_PATH"))


@functools.lru_cache
def _select(device: str, mode: str, path: str | None) -> ModuleType | None:
    reasons = []
    folder = Path(path) if path else CHECKOUT
    candidates: list[tuple[str, Callable[[], ModuleType]]] = [
        (f"local build {folder}", lambda: _load_local(folder, device))
    ]
    if mode == "hub":
        candidates.append((f"Hub kernel {HUB_REPOSITORY}", lambda: _load_hub(device)))
    if device == "cuda" and importlib.util.find_spec("triton"):
        candidates.append(("Triton kernel", _load_triton))
    for name, load in candidates:
        # Whatever goes wrong in a kernel that is an option must not stop the work: PyTorch does the same.
        try:
            module = load()
            _self_test(module, device)
        except _NotBuiltError as error:
            # No reason to speak, unless it was asked for.
            if mode == "local" or path:
                reasons.append(f"{name}: {error}")
            continue
        except Exception as error:
            reasons.append(f"{name}: {type(error).__name__}: {error}")
            continue
        logger.info("Alignment kernel for %s tensors: %s.", device, name)
        _warn(device, reasons, f"{name} is used")
        return module
    _warn(device, reasons, "the PyTorch implementation is used, which gives the same values more slowly")
    return None


def _warn(device: str, reasons: list[str], instead: str):
    if reasons:
        warnings.warn(
            f"Alignment kernel for {device} tensors: {instead}. Not usable: {'; '.join(reasons)}. Run `make kernels` to "
            "build it, or set HF_SUGAR_KERNELS=torch to stop looking (docs/kernels.md).",
            KernelFallbackWarning,
            stacklevel=5,
        )


class _NotBuiltError(Exception):
    pass


def _load_local(folder: Path, device: str) -> ModuleType:
    files = sorted((folder / "build").glob("*/metadata.json"))
    if not files:
        raise _NotBuiltError(f"nothing is built for {device} tensors")
    # Optional, and not needed unless there is a build.
    from kernels import get_local_kernel
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    found = False
    for file in files:
        metadata = Metadata.read_from_file(file)
        if str(metadata.backend.backend_type).lower() != device:
            continue
        if metadata.digest is None:
            raise ValueError(f"{file} has no digest, so that a damaged library could not be told: build it again")
        # A library cut short kills the process when it is loaded; no exception could be caught.
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, file.parent))
        found = True
    if not found:
        raise _NotBuiltError(f"nothing is built for {device} tensors")
    return get_local_kernel(folder, backend=device)


def _load_hub(device: str) -> ModuleType:
    from kernels import get_kernel

    # Asked for by name, so that this one repository is trusted and no other.
    return get_kernel(HUB_REPOSITORY, version=HUB_VERSION, backend=device, trust_remote_code=[HUB_REPOSITORY])


def _load_triton() -> ModuleType:
    from . import triton_kernel

    return triton_kernel


def _self_test(module: ModuleType, device: str):
    """Two slices at right angles against themselves and against the second alone: values known by hand."""
    slices = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]], device=device)
    value = module.packed_alignment_kernel(
        slices, torch.tensor([0, 2, 3]), torch.tensor([[0, 2], [1, 1]]), delta=1.0, normalize=None, log=True
    )
    # Local kernels of slices at right angles: s / (2 - s), s = exp(-phi / (2 sigma^2)), phi = 2, sigma^2 = (n + m) / 2.
    four, three = (1 / (2 * torch.tensor(2.0 / total).exp() - 1) for total in (4, 3))
    expected = torch.stack([1 + 2 * four, three, three, torch.tensor(1.0)]).log().view(2, 2)
    if not torch.allclose(value.cpu().float(), expected, rtol=0, atol=1e-4):
        raise RuntimeError(f"the test call gave {value.tolist()} instead of {expected.tolist()}")
