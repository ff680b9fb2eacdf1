"""Which implementation of the recursion runs: a compiled one if there is one, PyTorch otherwise."""

import functools
import importlib
import importlib.util
import logging
import os
import threading
import warnings
from pathlib import Path
from types import ModuleType

import torch

from . import naive


logger = logging.getLogger(__name__)

HUB_REPOSITORY, HUB_VERSION = "hf-sugar/gak", 1
BACKENDS = ("auto", "torch", "local", "hub")

# src/hf_sugar/alignment/backends.py of a source checkout; an installed wheel has no such folder.
CHECKOUT = Path(__file__).resolve().parents[3] / "hub_kernels" / "gak"
BUILDS = "build/*/metadata.json"

# Threads that come first together must not load, test and warn each for itself.
_SELECTING = threading.RLock()


class KernelFallbackWarning(UserWarning):
    """A compiled alignment kernel that was asked for, or is there, cannot be used; PyTorch does its work."""


def compiled_kernel(device: str, backend: str = "auto") -> ModuleType | None:
    """
    The compiled alignment kernel for tensors of a device: Triton for CUDA, a build for the CPU.

    A local build must have the digests it was built with, and every candidate pass a test call. What was found is kept for the
    life of the process, and why something was not usable is said once, in a [`KernelFallbackWarning`].

    Args:
        device (`str`): Type of the tensors' device: `"cpu"`, `"cuda"`.
        backend (`str`, *optional*, defaults to `"auto"`):
            - `"auto"`: what the environment variable `HF_SUGAR_KERNELS` says, one of the following. Without it, a local
              build if there is one.
            - `"torch"`: none.
            - `"local"`: a local build, in the folder named by `HF_SUGAR_KERNEL_PATH` or under `hub_kernels` of a source
              checkout.
            - `"hub"`: a local build, or else the Hub kernel `hf-sugar/gak`, which is downloaded and run. Nothing else
              uses the network.

    Returns:
        `module` or `None`: a module with `log_kernels`, or `None` for the PyTorch path.

    Raises:
        `ValueError`: if `backend` or `HF_SUGAR_KERNELS` is none of these.
    """
    asked = (os.environ.get("HF_SUGAR_KERNELS") or "auto") if backend == "auto" else backend
    if asked not in BACKENDS:
        raise ValueError(f"`backend` (HF_SUGAR_KERNELS in the environment) must be one of {BACKENDS}, got {asked!r}.")
    if asked == "torch":
        return None
    with _SELECTING:
        return _select(device, asked, os.environ.get("HF_SUGAR_KERNEL_PATH"))


@functools.lru_cache
def _select(device: str, mode: str, path: str | None) -> ModuleType | None:
    folder = Path(path) if path else CHECKOUT
    candidates = {}
    if device == "cpu":
        # No reason to speak, unless it was asked for.
        if mode == "local" or path or any(folder.glob(BUILDS)):
            candidates[f"local build {folder}"] = lambda: _load_local(folder)
        if mode == "hub":
            candidates[f"Hub kernel {HUB_REPOSITORY}"] = _load_hub
    elif device == "cuda" and importlib.util.find_spec("triton"):
        candidates["Triton kernel"] = lambda: importlib.import_module(".triton_kernel", __package__)
    reasons, found, instead = [], None, "the PyTorch implementation is used, which gives the same values more slowly"
    for name, load in candidates.items():
        # Whatever goes wrong in a kernel that is an option must not stop the work: PyTorch does the same.
        try:
            module = load()
            _test(module, device)
        except Exception as error:
            reasons.append(f"{name}: {type(error).__name__}: {error}")
        else:
            logger.info("Alignment kernel for %s tensors: %s.", device, name)
            found, instead = module, f"{name} is used"
            break
    if reasons:
        warnings.warn(
            f"Alignment kernel for {device} tensors: {instead}. Not usable: {'; '.join(reasons)}. Run `make kernels` to "
            "build it, or set HF_SUGAR_KERNELS=torch to stop looking (docs/kernels.md).",
            KernelFallbackWarning,
            stacklevel=4,
        )
    return found


def _load_local(folder: Path) -> ModuleType:
    files = sorted(folder.glob(BUILDS))
    if not files:
        raise FileNotFoundError("nothing is built for cpu tensors")
    # Optional, and not needed unless there is a build.
    from kernels import get_local_kernel
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    for file in files:
        digest = Metadata.read_from_file(file).digest
        if digest is None:
            raise ValueError(f"{file} has no digest by which a damaged library could be told: build it again")
        # A library cut short kills the process when it is loaded; no exception could be caught.
        digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, file.parent))
    return get_local_kernel(folder, backend="cpu")


def _load_hub() -> ModuleType:
    from kernels import get_kernel

    # Asked for by name, so that this one repository is trusted and no other.
    return get_kernel(HUB_REPOSITORY, version=HUB_VERSION, backend="cpu", trust_remote_code=[HUB_REPOSITORY])


def _test(module: ModuleType, device: str):
    """Two slices at right angles with themselves and with one of them, against the definition."""
    distances = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    pairs = [torch.tensor(numbers) for numbers in ([0, 0], [0, 1], [2, 2], [2, 1], [4, 3])]
    value, expected = module.log_kernels(distances.to(device), *pairs, 1.0), naive.log_kernels(distances, *pairs, 1.0)
    if not torch.allclose(value.cpu().double(), expected, rtol=0, atol=1e-4):
        raise RuntimeError(f"the test call gave {value.tolist()} instead of {expected.tolist()}")
