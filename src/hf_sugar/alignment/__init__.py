from .backends import KernelFallbackWarning, compiled_kernel
from .kernel import expected_alignment, global_alignment_kernel, log_delannoy, packed_alignment_kernel
from .labels import label_matrix
from .slices import IMAGE, TEXT


__all__ = [
    "IMAGE",
    "TEXT",
    "KernelFallbackWarning",
    "compiled_kernel",
    "expected_alignment",
    "global_alignment_kernel",
    "label_matrix",
    "log_delannoy",
    "packed_alignment_kernel",
]
