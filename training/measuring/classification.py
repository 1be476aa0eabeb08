"""Held-out pictures classified by a denoiser's own errors, and how far its posterior is to be believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autoencoder.images import to_unit
from ldm.diffusion_classifier import DiffusionClassifier, posterior
from ldm.noise import Noise
from ldm.students import unguided
from ldm.weighting import ELBO, SNR
from training.drawing.prompts import listed, tell_reading
from training.errors import DATA, UserError, as_user_error
from training.measuring.distances import share
from training.measuring.held_out import by_caption, chunks, even_among, held_out, parts
from training.messages import answer
from training.models.captions_read import short
from training.pictures import grids

if TYPE_CHECKING:
    import argparse

    from ldm.pipeline import Pipeline
    from training.data.images import Images
    from training.ledger import Ledger

WEIGHTINGS = {"elbo": ELBO(), "uniform": SNR()}  # in nats; and 1 on the error of eps, as in the literature
BINS = 10  # of the reliability curve
SHOWN = 32  # pictures of --grid


def classification(
    pipeline: Pipeline, args: argparse.Namespace, device: torch.device, ledger: Ledger
) -> dict[str, Any]:
    """Accuracy, confusions and reliability of naming each held-out picture's own caption among those of a file.

    The score of a caption is E over q(z | picture) of the bound of z, whose gaps are those of the bound of the picture:
    so every draw takes its own sample of the posterior, as training did; its mean is less noisy than any data seen.
    """
    classify = asking(pipeline, args)
    captions, images = choices(Path(args.classify), pipeline, ledger), held_out(args)
    places, truth = shown(images, captions, args.count, ledger)
    cond, beliefs = pipeline.text(captions), []
    for part, pixels in parts(images, places, device, "classifying"):
        noise = Noise.from_seeds([args.seed + place for place in places[part]], device)
        beliefs.append(posterior(classify(latents_of(pipeline, pixels), noise, cond)).cpu())
    numbers: dict[str, Any] = {"classes": captions, "pictures": len(places), "draws": args.draws}
    numbers |= {"eliminate": args.eliminate, "latents": "samples of the posterior"}
    by_weighting = dict(zip(WEIGHTINGS, torch.cat(beliefs, dim=1), strict=True))
    for name, belief in by_weighting.items():
        found = judged(belief, truth)
        numbers |= {f"{key}_{name}": value for key, value in found.items()}
        answer(*table(f"by {name} weights", captions, found["confusion"], found["reliability"]))
    if args.grid:
        first = next(chunks(images, places[:SHOWN], device))
        verdicts = [verdict(row, own, captions) for row, own in zip(by_weighting["elbo"], truth.tolist(), strict=True)]
        grids.write(grids.grid(first, 8, captions=verdicts[:SHOWN]), Path(args.grid))
        numbers["grid"] = Path(args.grid).name
    return numbers


def choices(path: Path, pipeline: Pipeline, ledger: Ledger) -> list[str]:
    """The captions to choose from. Raises UserError where they are fewer than two, repeated, or not read whole."""
    captions = listed(path, ledger)
    if len(captions) < 2:
        what = f"{path}: a choice needs at least 2 captions (got {len(captions)})"
        raise UserError(what, hint="write one a line", code=DATA)
    if twice := [caption for place, caption in enumerate(captions) if caption in captions[:place]]:
        what = f"{path}: {short(twice[0])!r} stands there more than once"
        raise UserError(what, hint="name each caption once", code=DATA)
    tell_reading(captions, ledger, pipeline.text, aloud=False)
    for caption, reading in zip(captions, pipeline.text.readings(captions), strict=True):
        if reading.cut or reading.unknown:
            why = f"does not know {', '.join(map(repr, reading.unknown))}" if reading.unknown else (
                f"reads only {reading.read} of its {reading.tokens} tokens")  # fmt: skip
            what = f"{path}: the model {why}: {short(caption)!r} may be read as another caption is"
            raise UserError(what, hint="word it as the captions of training are", code=DATA)
    return captions


def shown(images: Images, captions: list[str], count: int, ledger: Ledger) -> tuple[list[int], Tensor]:
    """`count` places of pictures whose own caption is among `captions` (0: all), evenly, and which it is (N,).

    Raises UserError where there is no such picture.
    """
    there = by_caption(images)
    known = {caption: there[caption] for caption in captions if caption in there}
    others = {caption: places for caption, places in there.items() if caption not in known}
    for caption, places in others.items():
        ledger.add("left out", "pictures whose caption is not among those of --classify", short(caption), len(places))
    if not known:
        what = f"no held-out picture has one of the {len(captions)} captions of --classify"
        raise UserError(what, hint=f"name captions of the data, such as {short(min(others))!r}", code=DATA)
    places = even_among(known, count or len(images))
    own = {place: captions.index(caption) for caption, at in known.items() for place in at}
    return places, torch.tensor([own[place] for place in places])


def asking(pipeline: Pipeline, args: argparse.Namespace) -> DiffusionClassifier:
    """The classifier of the flags. Raises UserError where its stages do not fit its draws, and for a student whose
    answers are not those of a denoiser without guidance."""
    with as_user_error("measure a run that train_denoiser has trained"):
        denoiser = unguided(pipeline.student, pipeline.denoiser, "--classify")
    with as_user_error("give more --draws, or --eliminate DRAWS:KEEP after fewer"):
        return DiffusionClassifier(
            denoiser=denoiser,
            diffusion=pipeline.denoiser.diffusion,
            draws=args.draws,
            weightings=tuple(WEIGHTINGS.values()),
            keep=stages(args.eliminate),
            batch_size=args.batch_size,
        )


def stages(words: Sequence[str]) -> dict[int, int]:
    """DRAWS:KEEP ... as numbers. Raises UserError for anything else."""
    try:
        return {int(after): int(kept) for after, kept in (word.split(":") for word in words)}
    except ValueError:
        what = f"--eliminate {' '.join(words)}: expected DRAWS:KEEP, two whole numbers, as in 4:8"
        raise UserError(what, hint="leave it out to keep every caption to the end") from None


@torch.no_grad()
def latents_of(pipeline: Pipeline, pixels: Tensor) -> Callable[[Noise], Tensor]:
    """What gives normalised latents of uint8 pictures, one sample of their posterior for a noise source."""
    with as_user_error("pack pictures as those that the model was trained on"):
        shape = pipeline.latent_shape((pixels.shape[-2], pixels.shape[-1]))
        moments = pipeline.encode(to_unit(pixels))
    return lambda noise: pipeline.autoencoder.norm.latents(moments, noise.normal(shape, "posterior"))


def judged(belief: Tensor, truth: Tensor) -> dict[str, Any]:
    """What probabilities (N, C) say of the truth (N,): accuracy, confusions [truth][answer], reliability, ECE."""
    confidence, answers = belief.max(1)
    right = answers == truth
    confusion = torch.zeros(belief.shape[1], belief.shape[1], dtype=torch.int64)
    confusion.index_put_((truth, answers), torch.ones_like(truth), accumulate=True)
    curve = reliability(confidence, right)
    off = sum(one["pictures"] * abs(one["accuracy"] - one["confidence"]) for one in curve)
    return {
        **share("accuracy", right.tolist()),
        "calibration_error": off / len(right),
        "confusion": confusion.tolist(),
        "reliability": curve,
    }


def reliability(confidence: Tensor, right: Tensor) -> list[dict[str, Any]]:
    """Of each tenth of confidence that has pictures: from, to, how many, their mean confidence and accuracy.

    The mean absolute difference of the two is the expected calibration error. Guo et al. 2017 (arXiv 1706.04599).
    """
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    return [
        {
            "from": place / BINS,
            "to": (place + 1) / BINS,
            "pictures": int(inside.sum()),
            "confidence": confidence[inside].double().mean().item(),
            "accuracy": right[inside].double().mean().item(),
        }
        for place in sorted(set(bins.tolist()))
        for inside in [bins == place]
    ]


def table(title: str, captions: list[str], confusion: list[list[int]], curve: list[dict[str, Any]]) -> list[str]:
    """For people: a line a caption, with what it was taken for, and a line a bin of the reliability curve."""
    width = max(len("caption"), *map(len, map(short, captions)))
    lines = [f"{title}:", f"{'caption':{width}}  pictures  right  taken for"]
    for row, caption in enumerate(captions):
        wrong = {place: count for place, count in enumerate(confusion[row]) if count and place != row}
        order = sorted(wrong, key=lambda place: -wrong[place])
        said = ", ".join(f"{short(captions[place])} ({wrong[place]})" for place in order)
        lines.append(f"{short(caption):{width}}  {sum(confusion[row]):8}  {confusion[row][row]:5}  {said}".rstrip())
    lines.append("probability  pictures  mean   accuracy")
    for one in curve:
        bounds = f"{one['from']:.1f} to {one['to']:.1f}"
        lines.append(f"{bounds:11}  {one['pictures']:8}  {one['confidence']:.3f}  {one['accuracy']:.3f}")
    return lines


def verdict(belief: Tensor, own: int, captions: list[str]) -> str:
    """What stands under a picture: its caption, whether it is the answer, and how probable the answer is."""
    place = int(belief.argmax())
    return f"{captions[own]}: {'yes' if place == own else f'NO, {captions[place]}'} ({belief[place]:.2f})"
