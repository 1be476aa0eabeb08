"""Prior preservation (DreamBooth, Ruiz et al. 2023, 2208.12242): what the base draws of a class, once, and is held to.

A run keeps in prior/ the moments of what was drawn, with their captions and hash, and a sheet to look at.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from autoencoder.images import to_uint8
from autoencoder.posterior import LOGVAR_RANGE
from ldm.adapters.controlled import ControlConfig
from ldm.guidance import ClassifierFree
from ldm.noise import Noise
from ldm.text import TextEncoder
from training.data.latents import joined
from training.data.samples import Batch
from training.drawing.prompts import tell_reading
from training.encoding.shard import embeddings
from training.errors import CHECKPOINT, UserError
from training.files import write_json
from training.guarding import make_folder, read_record
from training.ledger import Ledger
from training.machine.launcher import first_process
from training.pictures import grids
from training.pictures.hints import EXTRA
from training.progress import Progress
from training.tensors import content_hash, load_tensors, save_tensors

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline
    from training.settings.decoding import DenoiserConfig
    from training.settings.sections import Prior

MOMENTS, RECORD, SHEET = "moments.safetensors", "prior.json", "prior.png"
AT_ONCE, SHOWN = 16, 32


class Drawn(NamedTuple):
    """What the base drew: moments (N, 2C, h, w), the caption of each, the embeddings of each where they are stored."""

    moments: Tensor
    captions: list[str]
    text: list[dict[str, Tensor]]
    hash: str

    def batch(self, slots: Tensor) -> Batch:
        """One sample for each slot, in turn: whatever the micro-batch and the number of processes."""
        places = (slots % len(self.captions)).tolist()
        text = joined([self.text[place] for place in places]) if self.text else None
        return Batch(self.moments[places], slots, [self.captions[place] for place in places], text)


def prior_home(prior: Prior, final: Path | None) -> Path | None:
    """Where a run keeps them, beside its `final`; None where it has none."""
    return final.parent / "prior" if final and prior.weight else None


def refuse_prior(config: DenoiserConfig, args: Any, extras: list[str]) -> None:
    """Raises UserError where prior pictures are asked for and cannot be drawn, or not be trained on beside the data."""
    prior = config.prior
    if not prior.weight:
        return
    if not prior.texts:
        raise UserError("prior.captions is empty: it says what the base is to go on drawing as it does",
                        hint="name the class of what is learned, as --prior.captions 'a dog'; or give --prior.weight 0")
    if not (getattr(args, "base", None) or args.init_from):
        raise UserError("prior.weight is above 0, but there is no base that could draw the prior pictures",
                        hint="give it with --base RUN, or with --init-from RUN to train all of it; or --prior.weight 0")
    if prior.target == "answers" and not getattr(args, "base", None):
        raise UserError("prior.target is answers, those of the base, and what --init-from trains is the base itself",
                        hint="learn an adapter upon it with --base RUN --config lora, or give --prior.target pictures")
    if prior.target == "answers" and config.backbone.learned_variance:
        raise UserError("prior.target is answers, which teach no variance, and this base has a learned one",
                        hint="give --prior.target pictures")
    shown = [EXTRA] if config.image.kind != "none" or isinstance(config.adapter, ControlConfig) else []
    if shown := shown or [name for name in extras if name != EXTRA]:  # an image that nothing reads may lie beside
        what = f"prior pictures have no {shown[0]}, which the denoiser is shown besides its captions"
        raise UserError(what, hint="give --prior.weight 0")


def tell_captions(prior: Prior, text: TextEncoder) -> Ledger:
    """Say what the base does not read of the captions that it is to draw, and write it down. Raises UserError where it
    cannot take one at all, as labels cannot."""
    ledger = Ledger()
    if prior.weight and first_process():  # which draws, and has a text encoder
        tell_reading(prior.texts, ledger, text)
    return ledger


def keep_drawn(folder: Path, prior: Prior, pipeline: Pipeline, seed: int, *, embedded: bool, begun: bool) -> None:
    """Draw the prior pictures into `folder`, each by its own number and the seed, unless they are there.

    `embedded`: with the text encoder's answer, where data are trained on whose answers are stored. Raises UserError
    where a run that has `begun` has lost them: nothing draws them again.
    """
    if (folder / RECORD).is_file():
        return
    if begun:
        raise UserError(f"{folder}: the prior pictures of this run are gone", code=CHECKPOINT,
                        hint="put the folder back, or begin another run with --output")
    make_folder(folder)
    captions = prior.texts
    latents = _draw(pipeline, captions, seed)
    norm = pipeline.autoencoder.norm
    z = norm.inverse(latents.to(pipeline.device)).cpu()
    moments = torch.cat([z, torch.full_like(z, LOGVAR_RANGE[0])], dim=1) if norm.gaussian else z
    tensors = {"moments": moments}
    rows = embeddings(pipeline.text, list(dict.fromkeys(captions))) if embedded else []
    tensors |= {f"{number}.{name}": tensor for number, row in enumerate(rows) for name, tensor in row.items()}
    save_tensors(folder / MOMENTS, tensors)
    with torch.no_grad():
        shown = to_uint8(pipeline.decode(latents[:SHOWN].to(pipeline.device))).cpu()
    grids.save(grids.grid(shown, 8, captions=captions[:SHOWN]), folder / SHEET, {"captions": captions[:SHOWN]})
    write_json(folder / RECORD, {"hash": content_hash(tensors), "seed": seed, "captions": captions})


@torch.no_grad()
def _draw(pipeline: Pipeline, captions: list[str], seed: int) -> Tensor:
    """Normalised latents (N, C, h, w), on the CPU; without guidance, so that the base is where their loss is least."""
    plan = replace(pipeline.sampling, guidance=ClassifierFree(scale=1.0))
    shape, parts = pipeline.latent_shape(pipeline.size), []
    with Progress("drawing prior pictures", len(captions)) as told:
        for first in range(0, len(captions), AT_ONCE):
            texts = captions[first : first + AT_ONCE]
            noise = Noise(torch.arange(first, first + len(texts), device=pipeline.device)).fold(seed, "prior")
            parts.append(pipeline.latents(pipeline.guided(texts, plan=plan), noise, shape, plan).cpu())
            told.add(len(texts))
    return torch.cat(parts)


def load_drawn(folder: Path) -> Drawn:
    """What `keep_drawn` kept. Raises UserError where it is not what was written there."""
    record = read_record(folder / RECORD, {"hash": str, "captions": list})
    tensors, captions = load_tensors(folder / MOMENTS), record["captions"]
    if content_hash(tensors) != record["hash"] or len(tensors["moments"]) != len(captions):
        refuse_others(folder)
    distinct = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    numbers = [distinct[caption] for caption in captions] if "0.context" in tensors else []
    return Drawn(tensors["moments"], captions, [_row(tensors, number) for number in numbers], record["hash"])


def refuse_others(folder: Path) -> None:
    """Raises UserError: the prior pictures are not the run's."""
    raise UserError(f"{folder}: the prior pictures are not those that this run was begun with", code=CHECKPOINT,
                    hint="put back the folder as it was, or begin another run with --output")


def _row(tensors: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    prefix = f"{number}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
