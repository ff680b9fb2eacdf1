"""What `hf-sugar serve` can be told. Nothing here imports torch."""

import math
from dataclasses import dataclass

from ..settings import setting


@dataclass
class ServeArguments:
    index: str | None = setting("Index to search, and whose answered questions a chat may ask to see first.", None)
    host: str = setting("Address to listen on; by default only this machine can connect.", "127.0.0.1")
    port: int = setting("Port to listen on.", 8000)
    rerank_with_model: bool = setting(
        "Score in /v1/rerank by a second look of the model, as `search --rerank` does, not by the cosine.", False
    )
    api_key: str | None = setting("Key that requests send; by default HF_SUGAR_API_KEY of the environment.", None)
    served_model_name: str | None = setting("What requests call the model; by default the end of its path.", None)
    allow_urls: bool = setting("Fetch pictures from web addresses in requests, of public hosts alone.", False)
    max_new_tokens: int = setting("Longest answer that a request may ask for.", 1024)
    max_pixels: int = setting("Pixels of all pictures of one request.", 40_000_000)
    max_body_mb: float = setting("Largest body of a request, and most of all its pictures, in megabytes.", 32)
    max_requests: int = setting("Requests at work or waiting; others are told to come again (status 429).", 256)
    body_timeout: float = setting("Seconds in which a request has to arrive, and a picture from the web.", 30)
    request_timeout: float = setting("Seconds that a request may take after that.", 300)
    shutdown_timeout: float = setting("Seconds that answers have to end in, once the server is to stop.", 30)

    def __post_init__(self):
        if not 0 <= self.port < 2**16:
            raise ValueError(f"`port` is {self.port}; it must be from 0 to 65535.")
        for name, value in vars(self).items():
            limit = name.startswith("max_") or name in ("body_timeout", "request_timeout")
            if limit and not 0 < value < math.inf:
                raise ValueError(f"`{name}` is {value}; it must be a number above 0.")

    @property
    def max_body(self) -> int:
        return int(self.max_body_mb * 1e6)
