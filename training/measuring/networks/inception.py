"""Two Inception networks: TensorFlow's of 2015, in which FID is defined, and torchvision's, in which it is not."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.images import to_unit
from training.errors import DATA, UserError, missing_extra
from training.files import file_sha256
from training.measuring.networks.base import Features
from training.models.published import FILES, read_weights
from training.tensors import check_weights, content_hash

DIM = 2048
FID_FILE = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names it; pytorch-fid: pt_inception-...
FID_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def load_fid(file: str, device: torch.device | str) -> Features:
    """`inception:FILE`, the network of FID and KID (Heusel et al. 2017), as torch-fidelity keeps it: the 2048 pooled
    features of the weights of 2015-12-05, of pictures resized to 299 x 299 as TensorFlow 1 does (bilinear, without
    antialiasing), (x - 128) / 128. Raises UserError for any other file, by its sha256, and without torch-fidelity."""
    _check_file(file, "inception", f"{FID_FILE} or pt_inception-2015-12-05-6726825d.pth, which are the same bytes")
    if file_sha256(Path(file)) != FID_SHA256:
        what = f"{file}: not the weights in which FID is defined (its sha256 does not begin with {FID_SHA256[:8]})"
        raise UserError(what, hint="torchvision's network is --features torchvision-inception:FILE", code=DATA)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise missing_extra("torch-fidelity", "metrics", "--features inception:FILE") from None
    state, memory = torch.load(file, map_location="cpu", weights_only=True), BytesIO()
    torch.save(state, memory)  # torch-fidelity unpickles what it is given; so it is given tensors alone
    memory.seek(0)
    network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=memory).to(device)

    def extract(pixels: Tensor) -> Tensor:
        features: Tensor = network(pixels)[0]
        return features

    facts = {"weights": content_hash(state), "file": f"sha256 {FID_SHA256}"}
    facts["preprocessing"] = "299x299 as TensorFlow 1 resizes (bilinear, no antialiasing), (x - 128) / 128"
    names = {"frechet": "fid", "kernel_distance": "kid"}
    return Features("Inception 2015-12-05 (FID), pool3", DIM, extract, facts, names)


def load_torchvision(file: str, device: torch.device | str) -> Features:
    """`torchvision-inception:FILE`: the 2048 pooled features of torchvision's inception_v3, of pictures resized to
    299 x 299 (bilinear, antialiased), in [-1, 1]. Not FID: other weights, and another resizing."""
    _check_file(file, "torchvision-inception", f"torchvision's {FILES['inception']}")
    from torchvision.models import inception_v3

    network = inception_v3(weights=None, init_weights=False, aux_logits=True)
    state = read_weights(Path(file))
    try:
        check_weights(state, network.state_dict(), file)
        network.load_state_dict(state)
    except RuntimeError:
        raise UserError(
            f"{file}: not the weights of torchvision's inception_v3",
            hint=f"its file is {FILES['inception']}, or the same tensors as safetensors",
            code=DATA,
        ) from None
    network.fc = nn.Identity()
    network.to(device).eval().requires_grad_(False)

    def extract(pixels: Tensor) -> Tensor:
        resized = F.interpolate(to_unit(pixels), (299, 299), mode="bilinear", antialias=True, align_corners=False)
        features: Tensor = network(resized)
        return features

    weights = content_hash(state)
    facts = {"weights": weights, "preprocessing": "299x299 bilinear, antialiased, [-1, 1]"}
    return Features(f"torchvision inception_v3 {weights[:12]} (not FID)", DIM, extract, facts)


def _check_file(file: str, kind: str, wanted: str) -> None:
    if not file or not Path(file).is_file():
        hint = f"give {wanted}, as {kind}:FILE, or use --features random"
        raise UserError(f"--features {kind}: no weights at '{file}'", hint=hint, code=DATA)
