"""Search and ask in the browser."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from .arguments import setting
from .checkpoint import ModelArguments


@dataclass
class AppArguments:
    index: str = setting("Directory of the index.", "index")
    k: int = setting("Documents that a search shows.", 4)
    examples: int = setting("Documents put before a question.", 1)
    max_new_tokens: int = setting("Longest answer.", 256)
    host: str = setting("Address to listen on; by default only this machine can open the page.", "127.0.0.1")
    port: int | None = setting("Port to listen on; by default the first free one from 7860.", None)
    max_file_size: str = setting("Largest picture that is accepted.", "10mb")


def app(model: ModelArguments, args: AppArguments) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("`hf-sugar app` needs Gradio: install hf_sugar with its extra `app`.")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    from hf_sugar.evaluation.plots import plot_alignment
    from hf_sugar.retrieval import SugarRAG
    from hf_sugar.retrieval.app import build_page, launch

    index = model.load_index(args.index, args.k)
    rag = SugarRAG(index.embed.model, index.embed.processor, index, args.examples, args.max_new_tokens)
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"Whoever reaches {args.host} can search this index and use this model.")
    page = build_page(rag, Path(model.model_name_or_path).name, args.k, plot_alignment)
    launch(page, args.host, args.port, args.max_file_size)
