"""How far drawn pictures obey their captions: by the rules of the embedded shapes, or by a classifier of captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.commands import door
from training.drawing.prompts import tell_reading
from training.drawing.requests import Request, ask
from training.errors import UserError, as_user_error
from training.measuring.distances import share
from training.models.judge import Classifier, load_classifier
from training.pictures import grids
from training.progress import Progress

if TYPE_CHECKING:
    import argparse

    from ldm.pipeline import Pipeline, Sampling
    from training.ledger import Ledger


OBJECTS = (1, 2, 3)  # of a caption of the embedded shapes
RULES = "the rules of training/shapes/checker.py"


def sampling_errors() -> AbstractContextManager[None]:
    """Inside, what cannot be drawn so is a UserError."""
    return as_user_error(f"{door('generate --help')} lists samplers, grids and guidance")


def draw(pipeline: Pipeline, sampling: Sampling, part: Sequence[Request]) -> tuple[Tensor, list[str]]:
    """One batch: the pictures asked for and their captions. Raises UserError where they cannot be drawn so."""
    captions, seeds = [r.prompt for r in part], [r.seed for r in part]
    with sampling_errors():
        return next(pipeline.pixels(captions, seeds, sampling=sampling, batch_size=len(part))), captions


def batches(requests: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    """What is drawn at once."""
    return (requests[first : first + size] for first in range(0, len(requests), size))


def draw_batches(
    pipeline: Pipeline, sampling: Sampling, requests: list[Request], batch: int
) -> Iterator[tuple[Tensor, list[str]]]:
    """`draw` of each batch."""
    with Progress("drawing", len(requests)) as told:
        for part in batches(requests, batch):
            yield draw(pipeline, sampling, part)
            told.add(len(part))


def shapes_prompts(pipeline: Pipeline, count: int, seed: int) -> dict[int, list[str]]:
    """`count` held-out captions each of one, two and three objects. Raises UserError where there are not so many, or
    the rules cannot judge what the model draws."""
    from training.shapes.wording import held_out_prompts

    if count < 1:
        raise UserError("--obedience shapes draws --count pictures, which must be at least 1", hint="give --count N")
    if (channels := pipeline.autoencoder.image_channels) != 3:
        what = f"--obedience shapes judges RGB pictures, the model draws {channels} channels"
        raise UserError(what, hint="measure it with --data DIR")
    with as_user_error("lower --count"):
        return {objects: held_out_prompts(count, objects, seed=seed) for objects in OBJECTS}


class Rules:
    """The verdicts of the rule-based checker, by how many objects a caption has."""

    def __init__(self) -> None:
        self.verdicts: dict[int, list[dict[str, bool]]] = {objects: [] for objects in OBJECTS}

    def see(self, objects: int, pixels: Tensor, captions: Sequence[str]) -> list[bool]:
        """Judge pictures by their captions of so many objects: whether each is as its caption says."""
        from training.shapes.checker import check

        images = pixels.permute(0, 2, 3, 1).cpu().numpy()
        checks = [check(image, prompt) for image, prompt in zip(images, captions, strict=True)]
        self.verdicts[objects] += checks
        return [verdict["obeyed"] for verdict in checks]

    def obeyed(self) -> list[bool]:
        """Of every picture."""
        return [verdict["obeyed"] for verdicts in self.verdicts.values() for verdict in verdicts]

    def numbers(self) -> dict[str, Any]:
        """The share obeyed of one, two and three objects, and of each thing that a caption says."""
        numbers: dict[str, Any] = {"prompts": len(self.verdicts[OBJECTS[0]]), "obedience_judge": RULES}
        for objects, verdicts in self.verdicts.items():
            numbers |= share(f"obedience_{objects}", [verdict["obeyed"] for verdict in verdicts])
            for key in sorted(set().union(*verdicts) - {"obeyed"}):
                answers = [v[key] for v in verdicts if key in v]
                numbers[f"obedience_{objects}_{key}"] = sum(answers) / len(answers)
        return numbers


def shapes_obedience(
    pipeline: Pipeline, sampling: Sampling, args: argparse.Namespace, ledger: Ledger
) -> dict[str, Any]:
    """Share of held-out captions obeyed, for one, two and three objects, by the rule-based checker; a grid."""
    prompts, rules = shapes_prompts(pipeline, args.count, args.seed), Rules()
    tell_reading((text for texts in prompts.values() for text in texts), ledger, pipeline.text, aloud=False)
    samples: list[Any] = []
    captions: list[str] = []
    marks: list[bool] = []
    for objects, captions_of in prompts.items():
        drawn = draw_batches(pipeline, sampling, ask(captions_of, 1, args.seed), args.batch_size)
        for number, (pixels, texts) in enumerate(drawn):
            obeyed = rules.see(objects, pixels, texts)
            if not number:
                samples += grids.to_pil(pixels[:16])
                captions += texts[:16]
                marks += obeyed[:16]
    numbers = rules.numbers()
    if args.grid:
        grids.write(grids.grid(samples, 8, captions=captions, marks=marks), Path(args.grid))
        numbers["grid"] = Path(args.grid).name
    return numbers


@torch.no_grad()
def obeyed_by_classifier(judge: Classifier, pixels: Tensor, captions: list[str]) -> list[bool]:
    """Whether the classifier gives each picture the class its caption states."""
    answers = judge(pixels).argmax(1).tolist()
    return [judge.classes[a] == c for a, c in zip(answers, captions, strict=True)]


def verdicts_by(name: str | None, device: torch.device) -> Callable[[Tensor, list[str]], list[bool]] | None:
    """Whether each of uint8 pictures (B, C, H, W) is as its caption says, by the judge of `--obedience`, if any."""
    if name is None:
        return None
    if name != "shapes":
        judge = load_classifier(name, device)
        return lambda pixels, captions: obeyed_by_classifier(judge, pixels, captions)
    from training.measuring.edit_scores import obeyed

    def by_rules(pixels: Tensor, captions: list[str]) -> list[bool]:
        with as_user_error("give captions of the embedded shapes, or the folder of a classifier"):
            return obeyed(pixels, captions)

    return by_rules
