"""How far drawn pictures obey their captions: by the rules of the embedded shapes, or by a classifier of captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def sampling_errors() -> AbstractContextManager[None]:
    """Inside, what cannot be drawn so is a UserError."""
    return as_user_error(f"{door('generate --help')} lists samplers, grids and guidance")


def draw_batches(
    pipeline: Pipeline, sampling: Sampling, requests: list[Request], batch: int
) -> Iterator[tuple[Tensor, list[str]]]:
    """The pictures asked for and their captions, batch by batch. Raises UserError where they cannot be drawn so."""
    with Progress("drawing", len(requests)) as told:
        for first in range(0, len(requests), batch):
            part = requests[first : first + batch]
            captions, seeds = [r.prompt for r in part], [r.seed for r in part]
            with sampling_errors():
                pixels = next(pipeline.pixels(captions, seeds, sampling=sampling, batch_size=len(part)))
            yield pixels, captions
            told.add(len(part))


def shapes_obedience(
    pipeline: Pipeline, sampling: Sampling, args: argparse.Namespace, ledger: Ledger
) -> dict[str, Any]:
    """Share of held-out captions obeyed, for one, two and three objects, by the rule-based checker; a grid."""
    from training.shapes.checker import check
    from training.shapes.wording import held_out_prompts

    if args.count < 1:
        raise UserError("--obedience shapes draws --count pictures, which must be at least 1", hint="give --count N")
    if (channels := pipeline.autoencoder.image_channels) != 3:
        what = f"--obedience shapes judges RGB pictures, the model draws {channels} channels"
        raise UserError(what, hint="measure it with --data DIR")
    with as_user_error("lower --count"):
        prompts = {objects: held_out_prompts(args.count, objects, seed=args.seed) for objects in (1, 2, 3)}
    numbers: dict[str, Any] = {"prompts": args.count, "obedience_judge": "the rules of training/shapes/checker.py"}
    tell_reading((text for texts in prompts.values() for text in texts), ledger, pipeline.text, aloud=False)
    samples: list[Any] = []
    captions: list[str] = []
    marks: list[bool] = []
    for objects, captions_of in prompts.items():
        verdicts: list[dict[str, bool]] = []
        for pixels, texts in draw_batches(pipeline, sampling, ask(captions_of, 1, args.seed), args.batch_size):
            images = pixels.permute(0, 2, 3, 1).cpu().numpy()
            checks = [check(image, prompt) for image, prompt in zip(images, texts, strict=True)]
            if not verdicts:
                samples += grids.to_pil(pixels[:16])
                captions += texts[:16]
                marks += [verdict["obeyed"] for verdict in checks[:16]]
            verdicts += checks
        numbers |= share(f"obedience_{objects}", [verdict["obeyed"] for verdict in verdicts])
        for key in sorted(set().union(*verdicts) - {"obeyed"}):
            answers = [v[key] for v in verdicts if key in v]
            numbers[f"obedience_{objects}_{key}"] = sum(answers) / len(answers)
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
