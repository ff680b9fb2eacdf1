"""
`hf-sugar serve` in a process of its own: 32 requests sent at once against the same one after the other, embeddings of texts
and answers to questions about a picture, and the memory of the server, without the mapped file of its weights. A tiny
model and a random one of 12 layers that are 1024 wide.

python benchmarks/serve.py
python benchmarks/serve.py --requests 4 --repeat 1 --sizes tiny   # only to see that it runs
"""

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from train_step import llava

from hf_sugar import SugarForConditionalGeneration, SugarProcessor
from hf_sugar.world import checkpoint, load_world


def save(size: str, directory: Path) -> float:
    """Write a model that can be served; its weights in MB."""
    source = checkpoint("llava")
    if size != "tiny":
        source = directory / "backbone"
        with contextlib.redirect_stdout(sys.stderr):
            llava(argparse.Namespace(hidden=1024, layers=12, image_size=56), source)
    model = SugarForConditionalGeneration.from_backbone(str(source), retrieval_dim=128, dtype="float32")
    model.config.random_projector = False  # such a model would be refused
    model.save_pretrained(directory / "model")
    SugarProcessor.from_pretrained(str(source)).save_pretrained(directory / "model")
    return sum(each.numel() * each.element_size() for each in model.parameters()) / 1e6


def post(port: int, path: str, body: dict) -> dict:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    assert response.status == 200, answer
    connection.close()
    return answer


def memory(pid: int) -> float:
    """Anonymous memory of a process, in MB: what it has beside mapped files, such as those of weights."""
    return int(Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


def requests(count: int, tokens: int) -> dict[str, tuple[str, list[dict]]]:
    stream = io.BytesIO()
    load_world("captions", "test", 1)[0]["images"][0].save(stream, "PNG")
    url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    picture = {"type": "image_url", "image_url": {"url": url}}
    asked = [[picture, {"type": "text", "text": f"What is to the left of number {n}?"}] for n in range(count)]
    chats = [{"messages": [{"role": "user", "content": content}], "max_tokens": tokens} for content in asked]
    texts = [{"input": f"a small red circle to the left of blue square {n}"} for n in range(count)]
    return {"embeddings": ("/v1/embeddings", texts), "answers": ("/v1/chat/completions", chats)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "12x1024"])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {os.environ.get('OMP_NUM_THREADS', 'all')} thread(s)\n")
    print("| model | requests | one at a time | at once | times as fast | weights | memory, idle | afterwards |")
    print("|---|---|---|---|---|---|---|---|")
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as directory, socket.socket() as free:
            weights = save(size, Path(directory))
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            command = [sys.executable, "-m", "hf_sugar.cli.main", "serve", f"{directory}/model", "--port", str(port)]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
                while server.poll() is None:
                    try:
                        socket.create_connection(("127.0.0.1", port)).close()
                        break
                    except OSError:
                        time.sleep(0.2)
                idle = memory(server.pid)
                for kind, (path, bodies) in requests(args.requests, args.tokens).items():
                    post(port, path, bodies[0])
                    one, together = [], []
                    for _ in range(args.repeat):
                        start = time.perf_counter()
                        for body in bodies:
                            post(port, path, body)
                        one.append(time.perf_counter() - start)
                        with ThreadPoolExecutor(len(bodies)) as pool:
                            start = time.perf_counter()
                            list(pool.map(lambda body: post(port, path, body), bodies))  # noqa: B023
                            together.append(time.perf_counter() - start)
                    a, b = (len(bodies) / statistics.median(times) for times in (one, together))
                    cells = f"{a:.1f} / s | {b:.1f} / s | {b / a:.1f} | {weights:.0f} MB | {idle:.0f} MB"
                    print(f"| {size} | {len(bodies)} {kind} | {cells} | {memory(server.pid):.0f} MB |", flush=True)
                server.terminate()


if __name__ == "__main__":
    main()
