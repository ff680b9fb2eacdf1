from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers.integrations import deepspeed


def distributed_state() -> PartialState:
    """The processes of this run. On its own `PartialState` does not see a launch of CPU processes."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Under ZeRO-3 transformers (seen in 5.24) divides every model that is loaded among all processes, and a process that loads
    one alone would wait for the others for ever: meanwhile it does not."""
    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept
