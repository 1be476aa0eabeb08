"""The page itself: controls that several tabs share, and what happens between a click and its pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from training.errors import UserError
from training.messages import tell
from training.settings.net import explain
from training.studio import shown
from training.studio.model import MOST_PICTURES, Made, Stopped, Studio, Turn, Word

SLIDER = 200  # steps at the end of the slider
WAITING = 16  # clicks that wait for their turn in the studio, where a stop reaches them; more wait in Gradio's queue
PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # the page calls it, and no program by name
# What a message calls a flag that the page shows under another name.
NAMES = {
    "--prompt TEXT": "a caption", "--prompt": "Caption", "--num-images": "Pictures",
    "--guidance-scale": "Guidance scale",
    "--negative-prompt": "Negative caption", "--strength": "Strength", "--sigma-y": "Noise of the measurement",
    "--image": "the picture", "--mask": "the mask", "--measurement": "the measurement", "--size": "Size",
    "--steps": "Steps", "--sampler": "Sampler", "--seed": "Seed", "--feather": "Feather", "--method": "Method",
    "--restore": "Operator",
}


class Page:
    """A studio's page while it is built: `last` holds the path of the picture that was drawn or chosen last."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.last = studio, gr.State(None)

    def caption(self, shown: bool = False) -> dict[str, Any]:
        """The caption; with examples of the model's own and the words it knows where these are `shown`."""
        examples = self.studio.examples()
        box = gr.Textbox(label="Caption", value=examples[0] if examples else "", max_length=4000)
        if not shown:
            return {"--prompt": box}
        if examples:
            gr.Examples([[text] for text in examples], [box], label="Captions of its kind", **PRIVATE)
        if words := self.studio.words():
            with gr.Accordion(f"Words that this model knows ({len(words):,})", open=False):
                gr.HTML(f'<p class="words">{escape(", ".join(words[:400]))}{" …" if words[400:] else ""}</p>')
        return {"--prompt": box}

    def amount(self, pictures: int = 4) -> dict[str, Any]:
        """How many pictures, of which seed."""
        with gr.Row():
            count = gr.Slider(1, MOST_PICTURES, pictures, step=1, label="Pictures", precision=0)
            seed = gr.Number(0, label="Seed", info="of the first picture", precision=0)
        return {"--num-images": count, "--seed": seed}

    def sampling(self) -> dict[str, Any]:
        """Sampler, steps, guidance and negative caption, folded; the model's own to begin with."""
        own = self.studio.pipeline.sampling
        with gr.Accordion("Sampler and guidance", open=False):
            with gr.Row():
                sampler = gr.Dropdown(self.studio.samplers(), value=own.sampler.kind, label="Sampler")
                steps = gr.Slider(1, SLIDER, min(own.steps, SLIDER), step=1, label="Steps", precision=0)
            scale = gr.Slider(0, 15, getattr(own.guidance, "scale", 1.0), step=0.1, label="Guidance scale",
                              info="1 is no guidance; higher holds more to the caption")
            negative = gr.Textbox(label="Negative caption", info="what guidance moves away from", max_length=4000)
        return {"--sampler": sampler, "--steps": steps, "--guidance-scale": scale, "--negative-prompt": negative}

    def source(self, label: str = "Picture") -> Any:
        """A file to begin from, uploaded or the picture that was drawn or clicked on last, shown under it."""
        file = gr.File(label=label, type="filepath", height=120)
        gr.Button("Take the last drawn picture", size="sm").click(self.taken, self.last, file, **PRIVATE)
        preview = gr.HTML()
        file.change(self.preview, file, preview, **PRIVATE)
        return file

    def tells(self, file: Any, read: Callable[[str | None], tuple[str, str]], told: Any, command: Any) -> None:
        """Have what `read` says of an uploaded file stand in the page, with a command."""

        def run(path: str | None) -> tuple[str, Any]:
            with sentences():
                text, words = read(path)
            return text, self.there(words)

        file.change(run, file, [told, command], **PRIVATE)

    def taken(self, last: str | None) -> str:
        """The last drawn picture, named by its drawing too. Raises gr.Error where there is none."""
        with sentences():
            if last is None:
                raise UserError("nothing was drawn yet", hint="draw first, or upload a picture")
            return str(self.studio.taken(Path(last)))

    def preview(self, path: str | None) -> str:
        """An uploaded picture as it is read; what is no picture is refused."""
        if not path or path.endswith(".safetensors"):
            return ""
        with sentences():
            return shown.preview(Path(path))

    def told_caption(self, file: Any) -> dict[str, Any]:
        """A caption that becomes the one of a given picture where that says it."""
        flags = self.caption()
        file.change(lambda path: shown.caption_of(path) or gr.skip(), file, flags["--prompt"], **PRIVATE)
        return flags

    def size(self) -> Any:
        """Whether a given picture is drawn in the model's size, or in its own."""
        height, width = self.studio.pipeline.size
        choices = [(f"{width} x {height}, as the model was trained", "trained"), ("as the picture is", "own")]
        return gr.Radio(choices, value="trained", label="Size")

    def drawing(self, controls: Callable[[Page], dict[str, Any]],
                words: Callable[[Studio, Mapping[str, Any]], list[Word]], button: str) -> None:
        """Controls on the left, results on the right; the button draws what `words` makes of the controls' values."""
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                flags = controls(self)
                start, stop = self.buttons(button)
            with gr.Column(scale=3, min_width=380):
                gallery = gr.Gallery(label="Pictures", columns=2, object_fit="contain", height=None, format="png",
                                     interactive=False, buttons=["download", "fullscreen"], elem_classes="pixelated")
                told = gr.HTML()
                command = self.command("The command that draws the same")
                files, drawn = self.files(), gr.State([])
        self.on(start, stop, flags, lambda turn, values: results(turn.draw(words(self.studio, values))),
                [gallery, told, command, files, drawn, self.last])
        gallery.select(chosen, drawn, self.last, **PRIVATE)

    def on(self, start: Any, stop: Any, controls: Mapping[str, Any], work: Callable[[Turn, dict[str, Any]], Any],
           outputs: list[Any]) -> None:
        """Have a button do `work` with the values of the controls by their names, after all that was begun before;
        another one stops it."""
        names, inputs = list(controls), list(controls.values())

        def run(given: dict[Any, Any], request: gr.Request, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
            values = {name: given[component] for name, component in zip(names, inputs, strict=True)}
            with sentences(), self.studio.turn(str(request.session_hash), lambda s, w: progress(s, w)) as turn:
                return work(turn, values)

        start.click(run, set(inputs), outputs, concurrency_limit=WAITING, concurrency_id="drawing", **PRIVATE)
        stop.click(self.stopped, **PRIVATE)

    def command(self, label: str) -> Any:
        """A command to copy, hidden until there is one."""
        return gr.Textbox(label=label, interactive=False, visible=False, buttons=["copy"], lines=2, max_lines=8,
                          elem_classes="command")

    def files(self) -> Any:
        """Files to take away, hidden until there are some."""
        label = "Files to download: each PNG says how it was made"
        return gr.File(label=label, file_count="multiple", interactive=False, visible=False)

    @staticmethod
    def there(value: Any) -> Any:
        """An update that shows a value in a component that is hidden without one."""
        return gr.update(value=value, visible=bool(value))

    def buttons(self, label: str) -> tuple[Any, Any]:
        """To draw and to stop."""
        with gr.Row():
            return gr.Button(label, variant="primary", scale=3), gr.Button("Stop", variant="stop", min_width=90)

    def left(self, request: gr.Request) -> None:
        """A page that is closed wants no drawing."""
        self.studio.stop(str(request.session_hash))

    def stopped(self, request: gr.Request) -> None:
        """End what this page has begun."""
        if not self.studio.stop(str(request.session_hash)):
            gr.Info("nothing is being drawn")


def results(made: Made) -> tuple[Any, ...]:
    """What goes on the right: gallery, facts, command, files; the drawn pictures, and which is the last from now on."""
    gallery = [(str(path), f"seed {made.facts['seed'] + k}") for k, path in enumerate(made.pictures)]
    files = [str(path) for path in [*made.pictures, *made.given]]
    drawn = [str(path) for path in made.pictures]
    return gallery, shown.made(made), Page.there(made.command), Page.there(files), drawn, drawn[0]


def chosen(drawn: list[str], event: gr.SelectData) -> str:
    """The path of the drawn picture that was clicked on."""
    return str(drawn[event.index])


@contextmanager
def sentences() -> Iterator[None]:
    """Inside, whatever goes wrong becomes one sentence in the page; what nobody foresaw is told in the terminal too."""
    try:
        yield
    except UserError as problem:
        raise as_error(problem) from None
    except Exception as failure:
        tell(explain(failure))
        raise as_error(explain(failure)) from None


def as_error(problem: UserError) -> gr.Error:
    """A user's mistake in the page's own names, escaped: a message is shown as HTML."""
    title = "Stopped" if isinstance(problem, Stopped) else "Not drawn"
    said = f"{problem.what}: {problem.hint}" if problem.hint else problem.what
    return gr.Error(escape(in_names(said)), title=title, print_exception=False, duration=None)


def in_names(text: str) -> str:
    """A message with the page's names for flags."""
    for flag, name in NAMES.items():
        text = re.sub(re.escape(flag) + r"(?![\w-])", name, text)
    return text
