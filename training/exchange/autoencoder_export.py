"""Autoencoders of ours as diffusers' folders, each opened again and compared before it is called done."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoencoder.base import Autoencoder
from ldm.noise import Noise
from training.errors import CHECKPOINT, UserError
from training.exchange.autoencoder_layouts import LAYOUTS
from training.exchange.autoencoders import VERSION, built, check_unused, read_folder
from training.exchange.diffusers_weights import WEIGHTS
from training.exchange.export_check import error, opened_whole, quiet, verdict
from training.files import write_json
from training.guarding import make_folder
from training.messages import tell
from training.models.autoencoders import load_autoencoder
from training.models.folders import find, whole_folder
from training.settings import decoding
from training.tensors import save_tensors

SIDE = 4  # latents a side of the pictures that are compared


class Errors(NamedTuple):
    """The largest difference of each part, by the largest number that is compared or 1."""

    encode: float
    decode: float
    scale: float


def export_autoencoder(path: str, output: Path) -> None:
    """Write a run's autoencoder as diffusers does, and compare it. Raises UserError for kinds diffusers has no class
    for, and where what was written answers otherwise; nothing is left of it then."""
    check_unused(output)
    if output.is_dir() and not output.is_symlink():
        output.rmdir()  # an empty one
    with whole_folder(output) as folder:
        write_autoencoder(path, folder)
        told = compare(folder, load_autoencoder(path))
    tell(told)


def write_autoencoder(path: str, folder: Path) -> None:
    """What of the latents' normaliser diffusers' pipelines cannot say is said as a note."""
    model = decoding.to_values(find(path, "autoencoder").config())["model"]
    layout = next(((name, write) for name, (kind, _, _, write) in LAYOUTS.items() if kind == model["kind"]), None)
    if layout is None:
        kinds = ", ".join(kind for kind, *_ in LAYOUTS.values())
        raise UserError(f"diffusers has no class for autoencoders of kind {model['kind']}", hint=kinds, code=CHECKPOINT)
    tensors = {key: value.clone() for key, value in load_autoencoder(path).state_dict().items()}
    shift, scale = tensors.pop("norm.shift").flatten(), tensors.pop("norm.scale").flatten()
    about, tensors = layout[1](model, tensors, shift, scale)
    make_folder(folder)
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / "config.json", {"_class_name": layout[0], "_diffusers_version": VERSION} | about)


def compare(folder: Path, ours: Autoencoder) -> str:
    """One line of how near `folder` is to a model: its moments of two pictures, pictures of its latents, its scale.

    By our own import and, where it is installed, by diffusers. Raises UserError where it is not near (`verdict`).
    """
    try:
        import diffusers
    except ImportError:
        diffusers = None
    with torch.no_grad():
        found = {"our own import": _errors(ours, _by_import(folder))}
        if diffusers:
            with quiet(diffusers):
                theirs = _by_diffusers(opened_whole(diffusers, folder))
            found[f"diffusers {diffusers.__version__}"] = _errors(ours, theirs)
    errors = Errors(*(max(one, key=lambda value: (isnan(value), value)) for one in zip(*found.values(), strict=True)))
    return verdict(errors._asdict(), " and ".join(found), "answers")


class Peer(NamedTuple):
    """What was written, opened: pictures -> moments, latents -> pictures, and what latents are to be divided by."""

    encode: Any
    decode: Any
    scale: float


def _by_import(folder: Path) -> Peer:
    _, model = built(read_folder(folder), folder)
    return Peer(model.encode, lambda z: model.decode(model.norm(z)), float(model.norm.scale.flatten()[0]))


def _by_diffusers(vae: Any) -> Peer:
    def encode(pictures: Tensor) -> Tensor:
        (told,) = vae.encode(pictures, return_dict=False)
        moments: Tensor = getattr(told, "parameters", told)  # of a posterior, or z
        return moments

    return Peer(encode, lambda z: vae.decode(z, return_dict=False)[0], 1 / vae.config.scaling_factor)


def _errors(ours: Autoencoder, peer: Peer) -> Errors:
    """A posterior's scale is written into the layers around z; of others z are as here, and the scale is beside."""
    shape = (ours.image_channels, *[SIDE * ours.factor] * 2)
    pictures = Noise.from_seeds(range(2)).fold("export").normal(shape, "picture").clamp(-2, 2) / 2
    moments, theirs, norm = ours.encode(pictures), peer.encode(pictures), ours.norm
    if norm.gaussian:
        mean, spread = moments.chunk(2, dim=1)
        z, scale = norm(mean), 1.0
        moments, wanted = torch.cat([z, spread - 2 * norm.scale.log()], dim=1), ours.decode(z)
    else:
        z = moments if ours.quantize is None else ours.quantize(moments)  # codes: rounding does not make them others
        scale, wanted = float(norm.scale.double().square().mean().sqrt()), ours.decode(norm(z))
        theirs = theirs if ours.quantize is None else ours.quantize.prepare(theirs)
    return Errors(error(moments, theirs), error(wanted, peer.decode(z)), abs(peer.scale / scale - 1))
