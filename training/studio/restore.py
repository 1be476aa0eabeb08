"""Pictures of which a measurement is given, or taken of an uploaded one first: posterior samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.drawing.restoration import FAMILIES, SIGMA_Y
from training.errors import UserError
from training.settings.families import all_kinds
from training.studio.edit import begun_from
from training.studio.model import Studio, Word, asked
from training.studio.tab import DrawingTab

if TYPE_CHECKING:
    from training.studio.page import Page


class Restore(DrawingTab):
    """What an operator left of a picture, restored."""

    title, button = "Restore", "Restore"

    def controls(self, page: Page) -> dict[str, Any]:
        """What was measured and how, and the method that restores it."""
        import gradio as gr

        image = page.source("Picture or measurement")
        choices = [("a picture: measure it first, then restore it", "image"), ("the measurement itself", "measurement")]
        given = gr.Radio(choices, value="image", label="The file is")
        with gr.Row():
            operator = gr.Dropdown(all_kinds("operator"), value="box", label="Operator", info="what was lost")
            methods = [kind for family in FAMILIES for kind in all_kinds(family)]
            method = gr.Dropdown(methods, value="ddnm", label="Method", info="what restores it")
        sigma = gr.Number(SIGMA_Y, label="Noise of the measurement", minimum=0, step=0.01,
                          info="standard deviation, of values in [-1, 1]")
        flags = {"--image": image, "given": given, "--restore": operator, "--method": method, "--sigma-y": sigma}
        flags |= page.told_caption(image) | {"--size": page.size()}
        return flags | page.amount(pictures=2) | page.sampling()

    def words(self, studio: Studio, values: Mapping[str, Any]) -> list[Word]:
        """As the controls say: a picture in the chosen size, or a measurement, whose size says that of the picture."""
        flags = {name: value for name, value in values.items() if name != "given"}
        if values["given"] == "image":
            return asked(begun_from(studio, flags))
        if not values["--image"]:
            raise UserError("no measurement is given", hint="upload it, as a picture or as y in safetensors")
        return asked({**flags, "--image": None, "--measurement": Path(values["--image"]), "--size": None})
