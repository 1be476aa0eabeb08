"""From flags to a page that is served until it is interrupted."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import closing, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from training.errors import missing_extra
from training.guarding import make_folder
from training.messages import answer, tell, warn
from training.studio import guard
from training.studio.model import Studio
from training.studio.tabs import TABS

if TYPE_CHECKING:
    import argparse

LARGEST_UPLOAD = 64 << 20  # bytes of a file
STYLE = """
.pixelated img, .told img, .compare img, .html-container img { image-rendering: pixelated; }
.pixelated img { width: 100%; }
.pixelated .grid-wrap { max-height: none; height: auto; }
.prose td, .prose th { padding: .1em .8em; }
.compare { overflow-x: auto; }
.compare img { width: 112px; margin: 2px; display: inline-block; }
.compare td, .compare th { padding: .3em .8em; text-align: left; vertical-align: top; }
.told { border-left: 4px solid #d97706; padding: .2em .8em; margin: .5em 0; }
.command textarea { font-family: var(--font-mono); }
.words { color: var(--body-text-color-subdued); }
"""


def serve(args: argparse.Namespace) -> None:
    """Open the model, and serve its page. Raises UserError without Gradio, and as opening a model does."""
    if find_spec("gradio") is None:
        raise missing_extra("gradio", "studio", "the studio's page")
    loopback = guard.is_loopback(args.host)
    for number in (signal.SIGTERM, signal.SIGHUP):  # else the temporary folder would outlive the process
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda given, frame: sys.exit(128 + given))
    keep = Path(args.output).absolute() if args.output else None
    with TemporaryDirectory(prefix="studio-") as scratch, guard.listening(args.host, args.port) as place:
        if keep:
            make_folder(keep)
        offline(Path(scratch, "uploads"))
        studio = Studio.opened(args.model, Path(scratch, "drawn"), keep, args.device, args.text_encoder)
        if not loopback:
            warn(f"--host {args.host}: whoever reaches this address can draw here and see what others drew")
        names = frozenset({*guard.LOCAL, args.host.lower()}) if loopback else None
        guarded = guard.Guard(page(studio), names)
        with closing(studio), suppress(KeyboardInterrupt):
            host, port = place.getsockname()[:2]
            answer(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            tell("Ctrl-C closes the studio" + ("" if keep else "; what was drawn is removed then (--output keeps it)"))
            run(guarded, place)


def offline(uploads: Path) -> None:
    """Have Gradio, which is not loaded yet, keep its files in `uploads` and call nobody."""
    os.environ |= {"GRADIO_TEMP_DIR": str(uploads), "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False",
                   "HF_HUB_OFFLINE": "1", "GRADIO_SSR_MODE": "False"}


def page(studio: Studio) -> Any:
    """The page's application: every tab of `TABS`."""
    import gradio as gr
    from fastapi import FastAPI

    from training.studio.page import Page

    with gr.Blocks(title=f"Studio: {studio.model}", analytics_enabled=False) as blocks:
        gr.HTML(f"<h1>Studio</h1><p>{described(studio)}</p>")
        shared = Page(studio)
        for kind in TABS:
            with gr.Tab(kind.title):
                kind().build(shared)
        blocks.unload(shared.left)
    blocks.queue(default_concurrency_limit=4)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(FastAPI(openapi_url=None), blocks, path="", theme=theme, css=STYLE, footer_links=[],
                               allowed_paths=[], max_file_size=LARGEST_UPLOAD, run_history=False,
                               ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False)


def described(studio: Studio) -> str:
    """The open model in a line of HTML."""
    from html import escape

    (height, width), device = studio.pipeline.size, studio.pipeline.device.type
    where = f"Drawings are kept in {studio.keep}." if studio.keep else "Drawings are removed when it closes."
    return escape(f"{studio.model} draws {width} x {height} pixels, here on {device}. {where}")


def run(app: Any, place: Any) -> None:
    """Serve until Ctrl-C, or another signal that ends the program."""
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[place])
