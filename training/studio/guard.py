"""What keeps a studio to its machine: the answers it gives, what a page may load, the place it listens at."""

from __future__ import annotations

import re
import socket
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Any

from training.errors import UserError

# The browser itself then loads nothing from elsewhere, whatever the page or a library of it asks for.
POLICY = ("default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self' data: blob:; "
          "form-action 'self'; frame-ancestors 'none'; base-uri 'self'")
HEADERS = {"content-security-policy": POLICY, "referrer-policy": "no-referrer", "x-content-type-options": "nosniff"}
# Routes of Gradio that fetch an address for whoever asks.
FETCHING = re.compile(r"/(file=|proxy=|proxy/)[^/]*https?:", re.IGNORECASE)
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
        elif self._refused(scope):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"refused"})
        else:
            await self.app(scope, receive, lambda message: send(_with_headers(message)))

    def _refused(self, scope: dict[str, Any]) -> bool:
        given = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = re.sub(r":\d*$", "", given).strip("[]").lower()
        return (self.hosts is not None and name not in self.hosts) or bool(FETCHING.search(scope["path"]))


def _with_headers(message: dict[str, Any]) -> dict[str, Any]:
    if message["type"] != "http.response.start":
        return message
    own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    return {**message, "headers": [*message.get("headers", []), *own]}
