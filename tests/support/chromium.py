"""Chromium, for tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync")


@contextmanager
def launched() -> Iterator[Any]:
    """A browser; where a part of it is not installed the test fails and says which."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("tests of pages need Chromium, Debian's package chromium: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("tests of pages need Playwright: pip install 'latent-diffusion-from-scratch[browser]'")
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=path, args=FLAGS.split())
        yield browser
        browser.close()
