"""Addresses of data as people may see them: without user, password and query, which may be secret."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from training.commands import HIDDEN, hide_secrets
from training.errors import UserError
from training.guarding import make_folder


def redact(address: str) -> str:
    """An address without what may be secret: user, password and query."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def without_secrets(text: str, address: str) -> str:
    """A message that may repeat the secrets of `address`, without them."""
    parts = urlsplit(address)
    for secret in filter(None, (parts.netloc.rpartition("@")[0], parts.password, parts.query)):
        text = text.replace(secret, "…")
    return text


def repeat_command(words: Iterable[str]) -> str:
    """A command line to repeat, quoted for a shell; where addresses in it hold secrets, HIDDEN stands for each, and a
    note says so."""
    told = list(words)
    kept = [hide_secrets(word) for word in told]
    note = f"\nnote: put user, password or query of the address back where {HIDDEN} stands; or give credentials in the"
    note += " environment, where no command repeats them (such as FSSPEC_S3_KEY and FSSPEC_S3_SECRET)"
    return shlex.join(kept) + (note if kept != told else "")


def cache_folder(given: str | Path | None) -> Path:
    """Where shards of addresses are kept: as `given`, else in the user's cache. Raises UserError where it cannot be."""
    try:
        cache = Path(given or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latent-diffusion")
    except RuntimeError:
        raise UserError("no home folder, where shards could be kept", hint="name a folder: --cache-dir DIR") from None
    try:
        make_folder(cache)
    except UserError as problem:
        raise UserError(problem.what, hint="name another folder: --cache-dir DIR", code=problem.code) from None
    return cache
