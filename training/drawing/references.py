"""A picture drawn beside each, whose attention it shares: prompt-to-prompt and MasaCtrl, on top of any start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.drawing.inversions import coupling_of
from training.drawing.start import Group
from training.errors import UserError, as_user_error
from training.settings import decoding

if TYPE_CHECKING:
    import argparse

    from ldm.coupling import Coupling
    from ldm.pipeline import Pipeline
    from training.drawing.requests import Request

FACT = "coupling"


@dataclass(frozen=True)
class Referring:
    """How pictures are coupled with those of `prompt`."""

    coupling: Coupling
    prompt: str

    def facts(self) -> dict[str, Any]:
        """What a picture says of it."""
        return {"prompt": self.prompt, "settings": decoding.values_of(self.coupling)}

    def around(self, pipeline: Pipeline,
               groups: Callable[[list[Request]], Iterator[Group]]) -> Callable[[list[Request]], Iterator[Group]]:
        """The tasks of a start, each picture beside its reference. Raises UserError for prompts that cannot be."""
        from ldm.coupling import PromptToPrompt, swapped_words
        from ldm.image_tasks import referring

        def coupled(requests: list[Request]) -> Iterator[Group]:
            for group, task in groups(requests):
                if isinstance(self.coupling, PromptToPrompt):
                    with as_user_error("change words of --source-prompt, one for one"):
                        for request in group:
                            swapped_words(pipeline.text, self.prompt, request.prompt)
                yield group, referring(task, self.coupling, [self.prompt])

        return coupled


def add_flags(group: Any) -> None:
    """Add `--coupling` and `--source-prompt`."""
    add = group.add_argument
    text = "draw each picture beside that of --source-prompt and share its attention: prompt-to-prompt or masactrl"
    add("--coupling", metavar="KIND", help=text)
    text = "what the picture beside shows (default: --invert-prompt): its words are swapped for those of --prompt"
    add("--source-prompt", metavar="TEXT", help=text)


def referring_of(args: argparse.Namespace) -> Referring | None:
    """What `--coupling` asks for, or what `--like` read; None where a style or nothing is drawn beside."""
    if not args.coupling or args.style:
        return None
    kind = args.coupling["kind"] if isinstance(args.coupling, dict) else args.coupling
    if kind == "style":
        raise UserError("--coupling style is what --style FILE asks for", hint="give the picture with --style")
    prompt = args.invert_prompt if args.source_prompt is None else args.source_prompt
    if not prompt:
        hint = "give --source-prompt TEXT, or --invert FILE --invert-prompt TEXT"
        raise UserError(f"--coupling {kind}: nothing says what the picture beside shows", hint=hint)
    return Referring(coupling_of(args, kind), prompt)


def recall(args: argparse.Namespace, facts: Any) -> None:
    """Put what a picture tells where flags would put it."""
    args.coupling, args.source_prompt = facts["settings"], facts["prompt"]


def sound(facts: Any) -> bool:
    """Whether the facts in a picture are of the kinds that `facts` gives."""
    return (isinstance(facts, dict) and isinstance(facts.get("prompt"), str)
            and isinstance(facts.get("settings"), dict) and isinstance(facts["settings"].get("kind"), str))
