import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def distributed_state() -> PartialState:
    """The processes of this run. On its own `PartialState` does not see a launch of CPU processes."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
