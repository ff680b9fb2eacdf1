import torch
import torch.distributed as dist
import torch.nn.functional as F


class _AllGather(torch.autograd.Function):
    # `torch.distributed.nn.functional.all_gather`, which is deprecated in torch 2.13; what its warning names is private.
    @staticmethod
    def forward(ctx, tensor):
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, tensor)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)  # every process has used every row
        return gradient[dist.get_rank()]


def gather_rows(rows: torch.Tensor, padding: float = 0) -> torch.Tensor:
    """The rows `(n, width, ...)` of all processes, in the order of ranks: `(total, widest, ...)`. Each process may have
    another number of them, and another width, which is filled up with `padding`. Gradients go back to the process that a
    row came from. A process that is alone gets its own rows."""
    if not dist.is_initialized():
        return rows
    shapes = _AllGather.apply(torch.tensor(rows.shape[:2], device=rows.device))
    longest, widest = shapes.amax(0).tolist()
    rows = F.pad(
        rows,
        [0, 0] * (rows.ndim - 2) + [0, widest - rows.shape[1], 0, longest - rows.shape[0]],
        value=padding,
    )
    gathered = _AllGather.apply(rows.contiguous())
    return torch.cat([table[:count] for table, count in zip(gathered, shapes[:, 0].tolist())])
