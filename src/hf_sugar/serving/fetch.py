"""Pictures from the web, for a server that must not be led into its own network."""

import asyncio
import ipaddress
import socket
from typing import Any
from urllib.parse import urljoin

import httpcore2


_UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that is given out; IPv4 behind NAT64 and the like is outside


def is_public(address: str) -> bool:
    """Whether an IP address is of the open internet, without another one inside it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and (ip not in _UNICAST or ip.sixtofour or ip.teredo):
        return False
    return ip.is_global and not ip.is_multicast


class PublicNetwork(httpcore2.AnyIOBackend):
    """Connects to public addresses alone, and to the very address that was checked: the name may mean another a moment
    later."""

    async def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> httpcore2.AsyncNetworkStream:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [entry[4][0] for entry in found]
        if not all(map(is_public, addresses)):
            raise ValueError("leads to a private address")
        return await super().connect_tcp(addresses[0], port, *args, **kwargs)


async def fetch(
    url: str, max_bytes: int, timeout: float, network: httpcore2.AsyncNetworkBackend | None = None, redirects: int = 3
) -> bytes:
    """
    What is at a web address. Every host on the way has to be public, see [`PublicNetwork`]. Proxies are not used.

    Raises:
        `ValueError`: that says why there is nothing: a private address, more than `max_bytes`, `timeout` seconds or
            `redirects`, or whatever goes wrong.
    """
    try:
        async with (
            asyncio.timeout(timeout),
            httpcore2.AsyncConnectionPool(network_backend=network or PublicNetwork()) as pool,
        ):
            for _ in range(redirects + 1):
                async with pool.stream("GET", url, headers={"User-Agent": "hf-sugar"}) as response:
                    if 300 <= response.status < 400:
                        headers = {name.lower(): value.decode("ascii") for name, value in response.headers}
                        url = urljoin(url, headers.get(b"location", ""))
                        continue
                    if response.status != 200:
                        raise ValueError(f"answers with status {response.status}")
                    content = b""
                    async for piece in response.aiter_stream():
                        content += piece
                        if len(content) > max_bytes:
                            raise ValueError(f"is larger than {max_bytes} bytes")
                    return content
    except (OSError, httpcore2.ProtocolError, httpcore2.NetworkError, httpcore2.UnsupportedProtocol) as error:
        raise ValueError(f"cannot be fetched ({type(error).__name__})") from error
    raise ValueError(f"redirects more than {redirects} times")
