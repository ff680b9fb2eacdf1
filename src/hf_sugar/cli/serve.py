"""Answer and embed over HTTP, as clients of OpenAI ask for it."""

import importlib.util
import os
import socket
from pathlib import Path

from hf_sugar.serving.config import ServeArguments

from .checkpoint import ModelArguments


def serve(model: ModelArguments, args: ServeArguments) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client")):
        raise ImportError(
            "`hf-sugar serve` needs FastAPI, uvicorn and prometheus-client: install hf_sugar with its extra `serve`."
        )
    from hf_sugar.retrieval import SugarReranker
    from hf_sugar.serving.guard import LOOPBACK
    from hf_sugar.serving.server import Server, build_app

    args.api_key = os.environ.get("HF_SUGAR_API_KEY") if args.api_key is None else args.api_key
    if args.api_key is not None and not args.api_key.strip():
        raise ValueError(
            "The API key is empty. Set `api_key` or HF_SUGAR_API_KEY, or unset it to serve without a key."
        )
    listener = socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((args.host, args.port))  # before the model is loaded
    except OSError as error:
        raise OSError(f"{args.host}, port {args.port}: {error.strerror}. Set another `port` or `host`.") from error
    index = None if args.index is None else model.load_index(args.index)
    embed = model.embedder() if index is None else index.embed
    if args.host not in LOOPBACK and args.api_key is None:
        print(f"Whoever reaches {args.host} can use this model; `--api_key` asks for a key.")
    name = args.served_model_name or Path(model.model_name_or_path).resolve().name
    reranker = SugarReranker(embed.model, embed.processor, model.batch_size) if args.rerank_with_model else None
    app = build_app(embed, name, args, index, reranker)
    print(f"{name} answers and embeds at http://{args.host}:{args.port}/v1", flush=True)
    Server(app, args).run([listener])
