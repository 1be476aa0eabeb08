"""One caption and its seeds under several samplers and scales of guidance, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import UserError
from training.files import copy_file
from training.guarding import make_folder
from training.pictures import html
from training.studio import shown
from training.studio.model import Made, Stopped, Turn, asked
from training.studio.tab import Tab

if TYPE_CHECKING:
    from training.studio.page import Page

MOST_CELLS = 36


class Compare(Tab):
    """A table of drawings: samplers downwards, scales across."""

    title = "Compare"

    def build(self, page: Page) -> None:
        """Controls above, the table below."""
        import gradio as gr

        own, fit = page.studio.pipeline.sampling, page.studio.samplers()
        flags = page.caption(shown=True)
        with gr.Row():
            own_scales = ", ".join(f"{scale:g}" for scale in page.studio.scales())
            scales = gr.Textbox(own_scales, label="Guidance scales", info="numbers, with commas between")
            samplers = gr.Dropdown(fit, value=[kind for kind in fit if kind in (own.sampler.kind, "euler")],
                                   multiselect=True, label="Samplers")
            steps = gr.Slider(1, 200, own.steps, step=1, label="Steps", precision=0)
        controls = flags | page.amount(pictures=2) | {"--steps": steps, "scales": scales, "samplers": samplers}
        start, stop = page.buttons("Compare")
        outputs = [gr.HTML(), page.files()]

        def work(turn: Turn, values: dict[str, Any]) -> tuple[str, Any]:
            table, files = compare(turn, values)
            return table, page.there(files)

        page.on(start, stop, controls, work, outputs)


def numbers(text: str) -> list[str]:
    """The scales as they are spelled, each once. Raises UserError for what is no finite number."""
    spelled = [part.strip() for part in text.split(",") if part.strip()]
    for part in spelled:
        try:
            sound = math.isfinite(float(part))
        except ValueError:
            sound = False
        if not sound:
            raise UserError(f"Guidance scales: {part} is no finite number", hint="give numbers, as 1, 3, 6")
    return list(dict.fromkeys(spelled))


def compare(turn: Turn, values: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Every sampler with every scale: the table as HTML, and the files. A refusal stands in its cell.

    Raises UserError where there is nothing to compare, or too much, and where every cell is refused.
    """
    flags = {name: value for name, value in values.items() if name.startswith("--")}
    columns, samplers = numbers(values["scales"]), values["samplers"]
    if not columns or not samplers:
        raise UserError("nothing to compare", hint="give at least one guidance scale and one sampler")
    if len(columns) * len(samplers) > MOST_CELLS:
        raise UserError(f"{len(columns) * len(samplers)} drawings are more than {MOST_CELLS}", hint="choose fewer")
    cells: dict[tuple[str, str], Made | str] = {}
    refused: list[UserError] = []
    pairs = [(row, column) for row in samplers for column in columns]
    for index, (row, column) in enumerate(pairs):
        words = asked({**flags, "--sampler": row, "--guidance-scale": column})
        try:
            cells[row, column] = turn.draw(words, index / len(pairs), 1 / len(pairs))
        except Stopped:
            raise
        except UserError as problem:
            cells[row, column] = problem.what
            refused.append(problem)
    made = [drawn for drawn in cells.values() if isinstance(drawn, Made)]
    if not made:
        raise refused[0]
    told = list(dict.fromkeys(line for drawn in made for line in drawn.told))
    calls, seconds = sum(drawn.calls for drawn in made), sum(drawn.seconds for drawn in made)
    total = html.paragraph(f"{len(made)} drawings, {calls} network calls, {seconds:.1f} s")
    table = total + shown.compared(samplers, columns, cells) + shown.notes(told)
    sheet = shown.sheet(cells, made[0].pictures[0].with_name("comparison.png"))
    return table, [str(path) for path in (sheet, *named(cells, sheet.parent / "compared"))]


def named(cells: Mapping[tuple[str, str], Made | str], folder: Path) -> list[Path]:
    """Copies of the pictures whose names say their sampler and scale."""
    make_folder(folder)
    files = []
    for (sampler, scale), drawn in cells.items():
        for path in drawn.pictures if isinstance(drawn, Made) else ():
            files.append(folder / f"{sampler}-{scale}-{path.name}")
            copy_file(path, files[-1])
    return files
