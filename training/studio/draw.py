"""Pictures from a caption."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.studio.tab import DrawingTab

if TYPE_CHECKING:
    from training.studio.page import Page


class Draw(DrawingTab):
    """Captions to pictures, by noise of their seeds."""

    title = "Draw"

    def controls(self, page: Page) -> dict[str, Any]:
        """Caption, seeds, sampler, and a size."""
        import gradio as gr

        flags = page.caption(shown=True) | page.amount() | page.sampling()
        height, width = page.studio.pipeline.size
        size = gr.Textbox(label="Size", placeholder=f"{height}x{width}", info="height x width; trained one if empty")
        return flags | {"--size": size}
