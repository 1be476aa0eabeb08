"""The LPIPS network of a run: standard weights, a file, or a seeded random backbone asked for by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from autoencoder.perceptual import Perceptual, ScaledTrunk
from training.data.images import Images
from training.errors import DATA, UserError
from training.models.published import FILES, check_heads, read_weights, standard_weights
from training.tensors import check_weights

if TYPE_CHECKING:
    import argparse

RANDOM_SEED = 0
LPIPS_NEEDS = {"vgg": 16, "squeeze": 17, "alex": 31}  # pixels a side; of less, a network's pooling leaves nothing


def load_perceptual(net: str, weights: str, file: str | None = None) -> Perceptual:
    """LPIPS on `net` (vgg, alex, squeeze) with torchvision's weights in `file`, else "standard" or "random" ones.

    The linear layers of the `lpips` package weigh the channels of a trained backbone; in a random one all count 1.
    Raises UserError where standard weights cannot be had, never falling back by itself.
    """
    import lpips

    trained = file is not None or weights != "random"
    if trained:
        check_heads(net)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's deprecation of the constructor flags that lpips uses
        torch.manual_seed(RANDOM_SEED)
        network = lpips.LPIPS(net=net, pretrained=trained, pnet_rand=True, verbose=False)
    if not trained:
        return Perceptual(ScaledTrunk(network.scaling_layer, network.net))
    state = _read(Path(file)) if file else _standard(net)
    _fill(
        network.net,
        {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")},
        file or net,
    )
    return Perceptual.from_lpips(network)


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_file():
        return read_weights(path)
    what = f"{path}: no such file of LPIPS backbone weights"
    raise UserError(what, hint="name torchvision's weights of that network", code=DATA)


def _standard(net: str) -> dict[str, Tensor]:
    try:
        return standard_weights(net)
    except (OSError, RuntimeError):  # RuntimeError: what came has another hash
        raise UserError(
            f"the standard {net} weights of LPIPS are not here and cannot be downloaded",
            hint=f"download torchvision's {FILES[net]} elsewhere and give it with --lpips-weights FILE, or ask for a"
            " random backbone: --loss.perceptual_weights random",
            code=DATA,
        ) from None


def _fill(network: torch.nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """lpips cuts torchvision's `features` into slices that keep their layers' numbers: slice2.5 is features.5."""
    slots = {key: value.shape for key, value in network.state_dict().items()}
    shapes = {key: getattr(weights.get(key.partition(".")[2]), "shape", None) for key in slots}
    if odd := [key for key in slots if shapes[key] != slots[key]]:
        raise UserError(
            f"{source}: lacks features.{odd[0].partition('.')[2]} of shape {tuple(slots[odd[0]])}: another network?",
            hint="name torchvision's weights of that network",
            code=DATA,
        )
    chosen = {key: weights[key.partition(".")[2]] for key in slots}
    check_weights(chosen, network.state_dict(), source)
    network.load_state_dict(chosen)


def fitting(side: int) -> list[str]:
    """The networks whose pooling leaves something of pictures of `side` pixels."""
    return [net for net, least in LPIPS_NEEDS.items() if least <= side]


def load_distance(args: argparse.Namespace, images: Images, device: torch.device) -> Perceptual | None:
    """The LPIPS network asked for. Raises UserError for pictures too small for it."""
    if not args.lpips:
        return None
    height, width = min(images.sizes, key=min) if images.sizes else images[0].data.shape[-2:]
    if (least := LPIPS_NEEDS[args.lpips_net]) > min(height, width):
        what = f"the pictures are {width}x{height}, LPIPS on {args.lpips_net} needs {least} pixels a side"
        nets = " or ".join(fitting(min(height, width)))
        raise UserError(what, hint=(f"--lpips-net {nets}, or " if nets else "") + "leave --lpips out", code=DATA)
    named = args.lpips in ("standard", "random")
    network = load_perceptual(args.lpips_net, args.lpips if named else "", None if named else args.lpips)
    return network.to(device)
