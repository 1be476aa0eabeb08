"""The sources that are not a user's own files: Fashion-MNIST from its idx files, emoji from their npm package, and the
embedded generator of shapes."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.errors import DATA, UserError
from training.guarding import read_json
from training.packing.sources import Remark, Sample, Source, safe_key
from training.pictures.decoding import LARGEST_FILE, read_file
from training.shapes.rendering import render
from training.shapes.scenes import scene
from training.shapes.wording import choose_captions
from training.shards.captions import clean_captions

LARGEST = 64 << 20  # bytes of an idx file unpacked: the greatest has 47 million


class FashionMnist(Source):
    """The 70,000 pictures of Fashion-MNIST from its four idx files, gzipped or not, padded with black from 28 to 32
    pixels.

    Caption: `a photo of a CLASS`. Splits: `train` (60,000) and `val` (the 10,000 test pictures). Source: Xiao et al.
    2017.
    """

    mixed = True
    CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
    FILES: ClassVar = {"train": "train", "val": "t10k"}
    DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts them

    def __init__(self, root: Path | None) -> None:
        self.name, self.root = "fashion-mnist", self._find(root)
        self.total = sum(len(self._idx(f"{stem}-labels-idx1-ubyte")) for stem in self.FILES.values())

    def _find(self, root: Path | None) -> Path:
        places = [self.DEBIAN] if root is None else [root, root / "FashionMNIST" / "raw"]
        for place in places:
            if all(
                self._path(place, f"{stem}-{rest}")
                for stem in self.FILES.values()
                for rest in ("images-idx3-ubyte", "labels-idx1-ubyte")
            ):
                return place
        hint = "give --root FOLDER with the four idx files (Debian: apt install dataset-fashion-mnist)"
        if root is None:
            raise UserError("fashion-mnist: its files are not on this machine", hint=hint, code=DATA)
        try:
            from torchvision.datasets import FashionMNIST

            FashionMNIST(str(root), download=True)
        except Exception as error:  # torchvision raises whatever its download raised
            what = f"fashion-mnist: {root} lacks the four idx files and they could not be downloaded ({error})"
            raise UserError(what, hint=hint, code=DATA) from None
        return root / "FashionMNIST" / "raw"

    @staticmethod
    def _path(root: Path, name: str) -> Path | None:
        return next((path for path in (root / name, root / f"{name}.gz") if path.is_file()), None)

    def _idx(self, name: str) -> NDArray[np.uint8]:
        """One idx file: magic (0, 0, type 8, rank), the dimensions, the bytes."""
        path = self._path(self.root, name)
        assert path is not None, name
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                data = file.read(LARGEST + 1)
            if data[:3] != b"\0\0\x08" or len(data) > LARGEST:
                raise ValueError("not an idx file of bytes")
            shape = np.frombuffer(data, ">u4", data[3], 4)
            return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
        except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
            raise UserError(f"{path}: damaged ({error})", hint="fetch it again", code=DATA) from None

    def state(self) -> str:
        """A hash of the labels."""
        digest = hashlib.sha256()
        for stem in self.FILES.values():
            digest.update(self._idx(f"{stem}-labels-idx1-ubyte").tobytes())
        return digest.hexdigest()

    def samples(self) -> Iterator[Sample | Remark]:
        """Pictures padded from 28 to 32 pixels, in file order. UserError where images and labels do not match."""
        for split, stem in self.FILES.items():
            pictures, labels = self._idx(f"{stem}-images-idx3-ubyte"), self._idx(f"{stem}-labels-idx1-ubyte")
            if len(pictures) != len(labels) or labels.max(initial=0) >= len(self.CLASSES):
                raise UserError(f"{self.root}: {stem} images and labels do not belong together", code=DATA)
            pictures = np.pad(pictures, ((0, 0), (2, 2), (2, 2)))
            for number, (picture, label) in enumerate(zip(pictures, labels.tolist(), strict=True)):
                name = self.CLASSES[label]
                caption = f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}"
                image = Image.fromarray(picture).convert("RGB")
                yield Sample(f"{stem}-{number:05d}", image, (caption,), {"label": label}, split)


class Emoji(Source):
    """The 64 px pictures of the unpacked npm package emoji-datasource-google, skin tones too, in order of file names.

    Captions: `NAME, CATEGORY` and `NAME`, in lower case. Flags and components are left out: a flag's name says nothing
    of its picture. Raises UserError where `root` holds no such package.
    """

    def __init__(self, root: Path) -> None:
        self.name, self.root = "emoji", root
        self.captions = dict(sorted(dict(self._captions()).items())) if (root / "emoji.json").is_file() else {}
        if not self.captions:
            hint = "unpack `npm pack emoji-datasource-google` and name its folder"
            raise UserError(f"{root}: holds no emoji (emoji.json, img/google/64)", hint=hint, code=DATA)
        self.total = len(self.captions)

    def _captions(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        try:
            for emoji in read_json(self.root / "emoji.json", code=DATA):
                name, category = emoji["name"].lower(), emoji["category"]
                for variant in (emoji, *emoji.get("skin_variations", {}).values()):
                    if category not in ("Flags", "Component") and self._picture(variant["image"]).is_file():
                        yield variant["image"], clean_captions([f"{name}, {category.lower()}", name])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.root / 'emoji.json'}: not a list of emoji ({error})", code=DATA) from None

    def _picture(self, image: str) -> Path:
        return self.root / "img" / "google" / "64" / image

    def state(self) -> str:
        """A hash of names, captions and sizes of the files."""
        sizes = [self._picture(image).stat().st_size for image in self.captions]
        return hashlib.sha256(repr((self.captions, sizes)).encode()).hexdigest()

    def samples(self) -> Iterator[Sample | Remark]:
        """One sample per picture, in order of file names; a remark for each that cannot be read."""
        for image, captions in self.captions.items():
            key, picture = safe_key(image.removesuffix(".png")), self._picture(image)
            try:
                yield Sample(key, read_file(picture, LARGEST_FILE), captions, suffix=picture.suffix)
            except UserError as error:
                yield Remark(key, error.what)


class Shapes(Source):
    """`samples` training scenes of `training.shapes` and `val_samples` others, none with a held-out pair; several
    captions each."""

    exact = mixed = True
    CAPTIONS = 4  # of the twenty and more ways to say a scene

    def __init__(self, samples: int, val_samples: int, seed: int, resolution: int) -> None:
        if samples < 1 or resolution < 32:
            raise UserError(f"shapes: --samples must be >= 1 and --resolution >= 32 (got {samples}, {resolution})")
        self.counts = {"train": samples, "val": val_samples}
        self.name, self.seed, self.resolution, self.total = "shapes", seed, resolution, samples + val_samples

    def state(self) -> str:
        """Counts, seed and resolution, of which the pictures are a function."""
        return repr((self.counts, self.seed, self.resolution))

    def samples(self) -> Iterator[Sample | Remark]:
        """Scenes of even seeds for training, then of odd ones for validation: none is in both."""
        for split, count in self.counts.items():
            for number in range(count):
                seed = 2 * (self.seed * 100_000_000 + number) + (split == "val")  # even: training, odd: validation
                picture_scene = scene(seed)
                captions = choose_captions(picture_scene, self.CAPTIONS, seed)
                image = Image.fromarray(render(picture_scene, self.resolution))
                yield Sample(f"{split}-{number:08d}", image, captions, {"scene": asdict(picture_scene)}, split)
