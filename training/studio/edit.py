"""A picture drawn again from some noise on: image to image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import UserError
from training.studio.model import Studio, Word, asked
from training.studio.shown import size_of
from training.studio.tab import DrawingTab

if TYPE_CHECKING:
    from training.studio.page import Page


def begun_from(studio: Studio, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the given picture as a file and the chosen size in pixels. Raises UserError without a picture."""
    if not values["--image"]:
        raise UserError("no picture is given", hint="upload one, or take the last drawn picture")
    path = Path(values["--image"])
    height, width = studio.pipeline.size if values["--size"] == "trained" else size_of(path)
    return {**values, "--image": path, "--size": f"{height}x{width}"}


class Edit(DrawingTab):
    """Image to image."""

    title, button = "Edit", "Draw it again"

    def controls(self, page: Page) -> dict[str, Any]:
        """A picture, a caption, and how far it may go from the picture."""
        import gradio as gr

        image = page.source()
        strength = gr.Slider(0, 1, 0.6, step=0.01, label="Strength",
                             info="0 gives the picture back as the autoencoder has it, 1 is the caption alone")
        flags = {"--image": image, **page.told_caption(image), "--strength": strength, "--size": page.size()}
        return flags | page.amount() | page.sampling()

    def words(self, studio: Studio, values: Mapping[str, Any]) -> list[Word]:
        """As the controls say, with the picture as a file."""
        return asked(begun_from(studio, values))
