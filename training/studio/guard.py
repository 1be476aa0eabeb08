"""What keeps a studio to its machine: the answers it gives, what a page may load, the place it listens at."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

from training.errors import UserError

# The browser itself then loads nothing from elsewhere, whatever the page or a library of it asks for.
POLICY = ("default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self' data: blob:; "
          "form-action 'self'; frame-ancestors 'none'; base-uri 'self'")
HEADERS = {"content-security-policy": POLICY, "referrer-policy": "no-referrer", "x-content-type-options": "nosniff"}
# Routes of Gradio that fetch an address for whoever asks.
FETCHING = re.compile(r"/(file=|proxy=|proxy/)[^/]*https?:", re.IGNORECASE)
ADDRESS = re.compile(r"\s*https?:", re.IGNORECASE)
LOCAL = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def listening(host: str, port: int) -> socket.socket:
    """A socket at that place; port 0 is any free one. Raises UserError where it cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as failure:
        why = getattr(failure, "strerror", None) or str(failure)
        hint = "choose another --port, or --host 127.0.0.1"
        raise UserError(f"--host {host} --port {port}: cannot be listened at ({why})", hint=hint) from None


class Guard:
    """ASGI: refuses other names than `hosts` for this machine, and addresses to fetch; bounds what a page may load.

    A page of another site that has its own name lead here (DNS rebinding) would read drawings. `hosts`: None, any.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], hosts: frozenset[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif self._refused(scope) or names_address(given := await _body(scope, receive)):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"refused"})
        else:
            incoming = Incoming(given, receive)
            try:
                await self.app(scope, incoming, lambda message: send(_with_headers(message)))
            except Exception:
                if not incoming.cut:  # else nobody is left to answer, and the studio has no fault to tell
                    raise

    def _refused(self, scope: dict[str, Any]) -> bool:
        name = re.sub(r":\d*$", "", _header(scope, b"host")).strip("[]").lower()
        return (self.hosts is not None and name not in self.hosts) or bool(FETCHING.search(scope["path"]))


class Incoming:
    """ASGI: the messages of a request, whose body was read already unless None. `cut`: the page left amid an upload."""

    def __init__(self, body: bytes | None, receive: Any) -> None:
        self.receive, self.cut, self.whole = receive, False, body is not None
        self.read = [] if body is None else [{"type": "http.request", "body": body}]

    async def __call__(self) -> Any:
        """The next message."""
        message = self.read.pop() if self.read else await self.receive()
        if message["type"] == "http.disconnect":
            self.cut = not self.whole
        else:
            self.whole = not message.get("more_body", False)
        return message


def names_address(body: bytes | None) -> bool:
    """Whether JSON names a file by an address, which Gradio would fetch."""
    paths: list[str] = []
    with suppress(ValueError, RecursionError):  # what is no JSON, Gradio refuses itself
        json.loads(body or b"", object_hook=lambda part: paths.append(str(part.get("path"))))
    return any(map(ADDRESS.match, paths))


async def _body(scope: dict[str, Any], receive: Any) -> bytes | None:
    """All that is posted; None for an upload, which names nothing, and is not read here."""
    if scope["method"] != "POST" or _header(scope, b"content-type").startswith("multipart/"):
        return None
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


def _header(scope: dict[str, Any], name: bytes) -> str:
    given: bytes = dict(scope["headers"]).get(name, b"")
    return given.decode("latin-1")


def _with_headers(message: dict[str, Any]) -> dict[str, Any]:
    if message["type"] != "http.response.start":
        return message
    own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    return {**message, "headers": [*message.get("headers", []), *own]}
