"""What a PNG says of how it was made, and the command that draws it again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from training.drawing.replay import told_by
from training.errors import UserError
from training.pictures import grids, html
from training.runs.ingredients import difference
from training.studio import shown
from training.studio.model import Studio
from training.studio.tab import Tab

if TYPE_CHECKING:
    from training.studio.page import Page

FOREIGN = "Other programs drop what a PNG says when they save, and a screenshot has never had it."

WHOLE = {
    True: "It or its facts were changed after it was made.",
    False: "It is as it was made, facts and pixels.",
    None: "An earlier version made it, which does not tell whether it was changed.",
}


class Facts(Tab):
    """A picture dropped in, its facts told."""

    title = "Facts"

    def build(self, page: Page) -> None:
        """A place to drop a PNG, what it says, and the command."""
        import gradio as gr

        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                file = page.source("A PNG that was drawn here or by generate")
            with gr.Column(scale=3, min_width=380):
                told = gr.HTML()
                command = page.command("The command that draws it again")
        page.tells(file, lambda path: read(page.studio, path), told, command)


def read(studio: Studio, path: str | None) -> tuple[str, str]:
    """What a picture says, as HTML, and the command that draws it again; without one, what is in the way."""
    if not path:
        return "", ""
    file = Path(path)
    try:
        facts = told_by(file)
    except UserError as problem:
        what = problem.what.replace(str(file), file.name)
        return html.paragraph(f"{what}. {FOREIGN}"), ""
    made = html.paragraph(WHOLE[grids.changed(file)]) + html.paragraph(by_this_model(studio, facts["hashes"]))
    return made + shown.facts(facts), studio.command_again(file.name, facts)


def by_this_model(studio: Studio, hashes: dict[str, str]) -> str:
    """Whether the model that is open made it, else the first part that is another."""
    own = studio.pipeline.hashes
    if change := difference(hashes, own, sorted(set(hashes) & set(own))):
        return f"Another model made it: its {change.name} is {change.before}, that of the open model {change.now}."
    return "The open model made it."
