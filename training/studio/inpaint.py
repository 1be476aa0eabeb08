"""A hole in a picture, brushed by hand, drawn anew; all else stays bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageChops

from training.errors import UserError
from training.studio.edit import begun_from
from training.studio.model import Studio, Word, asked
from training.studio.shown import enlarged, uploaded
from training.studio.tab import DrawingTab

if TYPE_CHECKING:
    from training.studio.page import Page

COLOUR = "#ff2d8d"  # of the brush: no more than a mark, for what is under it is drawn anew


def hole(layers: list[Image.Image], size: tuple[int, int]) -> Image.Image:
    """The mask (width, height) of what was brushed on an enlarged copy: white where at least half of a pixel was.

    Raises UserError where nothing was.
    """
    painted = Image.new("L", layers[0].size if layers else (1, 1))
    for layer in layers:
        painted = ImageChops.lighter(painted, layer.convert("RGBA").getchannel("A"))
    mask = painted.resize(size, Image.Resampling.BOX).point(lambda share: 255 * (share >= 128))
    if not mask.getbbox():
        raise UserError("nothing is brushed", hint="brush over what is to be drawn anew")
    return mask


class Inpaint(DrawingTab):
    """The brushed hole drawn anew."""

    title, button = "Inpaint", "Fill the hole"

    def controls(self, page: Page) -> dict[str, Any]:
        """A picture, a brush over an enlarged copy of it, and what the hole is to show."""
        import gradio as gr

        image = page.source()
        brush = gr.Brush(default_size=48, colors=[COLOUR], default_color=COLOUR, color_mode="fixed")
        editor = gr.ImageEditor(label="Brush over what is to be drawn anew", type="pil", image_mode="RGBA", sources=(),
                                transforms=(), layers=False, brush=brush, eraser=gr.Eraser(default_size=48),
                                canvas_size=(512, 512), elem_classes="pixelated", height=600)
        image.change(canvas, image, editor, api_visibility="private")
        feather = gr.Slider(0, 16, 0, step=1, label="Feather", precision=0,
                            info="pixels around the hole over which old and new are blended")
        flags = {"--image": image, "--mask": editor, **page.told_caption(image), "--feather": feather}
        return flags | {"--size": page.size()} | page.amount() | page.sampling()

    def words(self, studio: Studio, values: Mapping[str, Any]) -> list[Word]:
        """As the controls say, what was brushed as a mask in the size of the picture, beside the uploaded file."""
        begun = begun_from(studio, values)
        path = begun["--image"].with_name(f"{begun['--image'].stem}-mask.png")
        hole((values["--mask"] or {}).get("layers", []), uploaded(begun["--image"]).size).save(path)
        return asked({**begun, "--mask": path})


def canvas(path: str | None) -> Any:
    """An enlarged copy of the uploaded picture, to be brushed on; nothing for what is no picture."""
    try:
        image = enlarged(uploaded(Path(path))) if path else None
    except UserError:  # the preview tells it
        image = None
    return {"background": image, "layers": [], "composite": image} if image else None
