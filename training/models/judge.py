"""A small classifier of packed pictures: names the class a caption states, and gives features to measure in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.images import as_rgb, to_unit
from training.commands import door
from training.data.images import Images
from training.errors import DATA, UserError
from training.guarding import read_record, refuse_links
from training.models.folders import fill
from training.tensors import load_tensors


def plain(width: int) -> list[nn.Module]:
    """Six convolutions with batch norm, halved twice by the maximum: (B, 3, H, W) -> (B, 4 width, H // 4, W // 4)."""

    def block(into: int, out: int) -> list[nn.Module]:
        conv = nn.Conv2d(into, out, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(out), nn.ReLU()]

    return [
        *block(3, width),
        *block(width, width),
        nn.MaxPool2d(2),
        *block(width, 2 * width),
        *block(2 * width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 4 * width),
        *block(4 * width, 4 * width),
    ]


class Residual(nn.Module):
    """skip(x) + conv(gelu(norm(conv(gelu(norm(x)))))), of (B, into, H, W); halved by a stride of 2."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, into), nn.GroupNorm(1, out)
        self.conv1 = nn.Conv2d(into, out, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(into, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, into, H, W) of any size -> (B, out, H / stride, W / stride), rounded up."""
        y: Tensor = self.skip(x) + self.conv2(F.gelu(self.norm2(self.conv1(F.gelu(self.norm1(x))))))
        return y


def residual(width: int) -> list[nn.Module]:
    """Three residual blocks with group norm, two of them halving (He et al. 2016, identity mappings): as `plain`."""
    first = nn.Conv2d(3, width, 3, padding=1)
    blocks = [Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2), Residual(4 * width, 4 * width, 1)]
    return [first, *blocks, nn.GroupNorm(1, 4 * width), nn.GELU()]


KINDS = {"plain": plain, "residual": residual}  # networks unlike each other, so that one may check the other's verdict


class Classifier(nn.Module):
    """Pictures (B,C,H,W), uint8 or in [-1, 1] -> logits (B, classes); `features`: the maps before them (B, 4 width)."""

    def __init__(self, classes: tuple[str, ...], width: int = 32, kind: str = "plain") -> None:
        super().__init__()
        self.classes, self.width, self.kind = classes, width, kind
        self.maps = nn.Sequential(*KINDS[kind](width), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4 * width, len(classes))

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 4 * width)."""
        return self._through(self.maps, pixels)

    def places(self, pixels: Tensor) -> Tensor:
        """The maps before their mean over all places, (B, 4 * width, H // 4, W // 4)."""
        return self._through(self.maps[:-2], pixels)

    def _through(self, layers: nn.Module, pixels: Tensor) -> Tensor:
        images = as_rgb(pixels if pixels.is_floating_point() else to_unit(pixels))
        found: Tensor = layers(images.contiguous(memory_format=torch.channels_last))
        return found

    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures (B, C, H, W), uint8 or in [-1, 1] -> logits (B, classes)."""
        logits: Tensor = self.head(F.dropout(self.features(pixels), 0.3, self.training))
        return logits


@dataclass(frozen=True)
class Judge:
    """log p(caption | image) (B,) of images (B,3,H,W) in [-1, 1]; ValueError for a caption that is not a class."""

    model: Classifier

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        places = {caption: row for row, caption in enumerate(self.model.classes)}
        for caption in captions:
            if caption not in places:
                known = ", ".join(map(repr, self.model.classes[:3]))
                raise ValueError(f"{caption!r} is not one of the classifier's {len(places)} classes ({known} ...)")
        chosen = torch.tensor([places[caption] for caption in captions], device=images.device)
        belief: Tensor = self.model(images).log_softmax(dim=1)
        return belief.gather(1, chosen[:, None])[:, 0]


def load_classifier(folder: str | Path, device: torch.device | str = "cpu") -> Classifier:
    """A stored classifier, frozen. Raises UserError for a folder that is none."""
    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        hint = f"make one: {door('train_classifier --data PICTURES --output DIR')}"
        raise UserError(f"{folder} holds no classifier", hint=hint, code=DATA)
    refuse_links(folder)
    about = {"kind": "plain"} | read_record(folder / "config.json", {"classes": list, "width": int}, code=DATA)
    classes, width, kind = about["classes"], about["width"], about["kind"]
    named = classes and all(isinstance(name, str) for name in classes)
    if not (named and 1 <= width <= 4096 and isinstance(kind, str) and kind in KINDS):
        hint = "the file is damaged; use another copy"
        raise UserError(f"{folder / 'config.json'}: not the config of a classifier", hint=hint, code=DATA)
    tensors = load_tensors(folder / "model.safetensors")
    with torch.device("meta"):  # its size is that of the file's tensors, or nothing is allocated
        model = Classifier(tuple(classes), width, kind)
    fill(model, tensors, folder / "model.safetensors", assign=True)
    return model.to(device, torch.float32).eval().requires_grad_(False)


def caption(images: Images, index: int) -> str:
    """The first caption of a packed picture: its class."""
    return str(images.shards.read_field(index, "txt").decode("utf-8").strip())
