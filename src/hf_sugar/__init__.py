"""One multimodal LLM that answers and retrieves: Sugar (https://huggingface.co/papers/2411.00304) for any LLaVA
checkpoint. Names are imported when they are first touched, so `import hf_sugar` is cheap and does not import torch."""

import importlib
import logging
from typing import TYPE_CHECKING


__version__ = "0.1.0.dev0"

# Where `kernels` is installed, bitsandbytes 0.50 asks the Hub for a CPU kernel when PEFT or transformers import it, and
# warns if it gets none. Nothing here uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
logging.getLogger("kernels.hf_hub").addFilter(lambda record: "quantization-bitsandbytes" not in record.getMessage())

_NAMES = {
    "models": "SugarConfig SugarForConditionalGeneration SugarOutput SugarProcessor",
    "training": "SugarTrainer SugarTrainingConfig StructureLoss",
    "alignment": "global_alignment_kernel",
    "teachers": "TripleEncoder",
    "inference": "SugarEmbedder SugarGenerator",
    "retrieval": "SugarIndex SugarRAG",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *_MODULE_OF]

if TYPE_CHECKING:  # the same for type checkers
    from .alignment import global_alignment_kernel as global_alignment_kernel
    from .inference import SugarEmbedder as SugarEmbedder
    from .inference import SugarGenerator as SugarGenerator
    from .models import SugarConfig as SugarConfig
    from .models import SugarForConditionalGeneration as SugarForConditionalGeneration
    from .models import SugarOutput as SugarOutput
    from .models import SugarProcessor as SugarProcessor
    from .retrieval.index import SugarIndex as SugarIndex
    from .retrieval.rag import SugarRAG as SugarRAG
    from .teachers import TripleEncoder as TripleEncoder
    from .training import StructureLoss as StructureLoss
    from .training import SugarTrainer as SugarTrainer
    from .training import SugarTrainingConfig as SugarTrainingConfig


def __getattr__(name: str):
    if name == "RAG":  # former name of `SugarRAG`, for one release
        name = "SugarRAG"
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hf_sugar' has no attribute '{name}'")
    return getattr(importlib.import_module(f"hf_sugar.{_MODULE_OF[name]}"), name)


def __dir__():
    return __all__
