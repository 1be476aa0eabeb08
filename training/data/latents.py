"""Encoded latents, their captions and further fields of conditions, read by slot of the data order."""

from __future__ import annotations

import io
import json
import math
import re
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.backbones.image import SIZE
from ldm.conditioning import Cond
from ldm.representation import VISION
from training.commands import door
from training.data.order import Slot
from training.data.samples import Batch, Policy, Samples, coin, ids, or_error, uniform
from training.errors import DATA, NUMERICAL, UserError
from training.pictures.frames import stored_frame
from training.shards.remote import NULL, refuse_without_null

if TYPE_CHECKING:
    from training.shards.reading import ShardSet
    from training.shards.streaming import StreamedShards

EXTRA = re.compile(r"extra-([a-z0-9_-]+)\.npy")  # a further field of latents, by the name that a condition gives it

BITS = {"<f2": (np.uint16, 0x7FFF, 0x7C00), "<f4": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000)}  # all but the sign; infinity


class Latent(NamedTuple):
    """One sample of `Latents`."""

    moments: np.ndarray
    caption: str
    text: dict[str, Tensor] | None
    extras: dict[str, np.ndarray]
    size: tuple[int, ...]  # as `Frame.numbers` has them, where they are asked for


class Latents(Samples[Latent]):
    """Encoded moments and a caption by slot; caption and mirrored variant are chosen by (seed, epoch, sample).

    Fields `extra-NAME.npy` are handed on as `Batch.extras`, with a mirrored variant those of `mirror-NAME.npy`: of
    uint8, which is a picture, in [0, 1], any other numbers as they are. Features of a `vision` model, `features`
    channels, are read where they are asked for alone, and stay in float16: they are many. With `sizes` the extra
    "size" (B, 6) says how each picture was cut, mirrored ones as they are.
    """

    def __init__(
        self,
        shards: ShardSet | StreamedShards,
        *,
        flip: bool = False,
        seed: int = 0,
        on_bad_data: Policy = "skip",
        vision: bool = False,
        sizes: bool = False,
    ) -> None:
        super().__init__(shards, seed, on_bad_data)
        latent = shards.summary.get("latent")
        if not latent:
            hint = "make them with: " + door("encode_latents --autoencoder RUN --data PICTURES --output DIR")
            raise UserError("these shards hold no latents", hint=hint, code=DATA)
        self.shape, self.dtype = tuple(latent["shape"]), np.dtype(latent["dtype"])  # in buckets: of the commonest
        self.told_sizes = sizes
        if sizes and not shards.summary.get("framed"):
            what = "conditioning.size is told how each picture was cut, which these latents do not hold"
            pack = door("make_shards pack SOURCE --output DIR --keep-sizes")
            raise UserError(what, hint=f"pack the pictures with it, and encode them again: {pack}", code=DATA)
        self.mirrored = flip and "mirror.npy" in shards.fields
        self.text = "text.safetensors" in shards.fields
        extras = [found[1] for field in shards.fields if (found := EXTRA.fullmatch(field))]
        self.extras = [name for name in extras if vision or name != VISION]
        self.features: int = (shards.summary.get(VISION) or {}).get("width", 0) if VISION in extras else 0
        if lacking := [name for name in self.extras if self.mirrored and f"mirror-{name}.npy" not in shards.fields]:
            what = f"train.flip is on, but the shards hold no mirrored {lacking[0]}"
            raise UserError(what, hint="encode again with --flip, or set --train.flip false", code=DATA)
        if self.text and not shards.remote:  # from elsewhere the file comes later, and is missed then
            refuse_without_null((shards.directory / NULL).is_file())
        if flip and not self.mirrored:
            hint = "encode again with --flip, or set --train.flip false"
            raise UserError("train.flip is on, but the latents hold no mirrored images", hint=hint, code=DATA)

    @cached_property
    def plain(self) -> Latents:
        """Without mirrored ones."""
        return Latents(self.shards, on_bad_data=self.on_bad_data, sizes=self.told_sizes)

    def moments(self, index: int, field: str = "moments.npy") -> np.ndarray:
        """Sample `index` as (2C,h,w), or (C,h,w) of an autoencoder without a posterior."""
        return self._moments(index, self.shards.read(index, (field,)).get(field, b""))

    def captions(self, index: int) -> list[str]:
        """All captions of sample `index`; the empty one where they cannot be read, unless `on_bad_data` is "error"."""
        try:
            return self._captions(index, self.shards.read(index, ("json",)).get("json", b""))
        except UserError:
            if self.on_bad_data == "error":
                raise
            return [""]

    def load(self, slots: list[Slot]) -> list[Latent | UserError]:
        """The variant of each slot's sample that its epoch asks for."""
        mirror = coin(slots, self.seed, "flip").tolist() if self.mirrored else [False] * len(slots)
        choice = uniform(slots, self.seed, "caption").tolist()
        return [
            or_error(self._sample, slot.index, "mirror.npy" if mirrored else "moments.npy", share)
            for slot, mirrored, share in zip(slots, mirror, choice, strict=True)
        ]

    def join(self, slots: list[Slot], samples: list[Latent]) -> Batch:
        """Stacked, in float32."""
        data = torch.from_numpy(np.stack([sample.moments for sample in samples])).float()  # numpy's cast is slow
        text = joined([sample.text for sample in samples if sample.text is not None]) if self.text else None
        extras = {name: self._stacked(name, [sample.extras[name] for sample in samples]) for name in self.extras}
        if self.told_sizes:
            extras[SIZE] = torch.tensor([sample.size for sample in samples], dtype=torch.float32)
        return Batch(data, ids(slots), [sample.caption for sample in samples], text, extras=extras)

    def _stacked(self, name: str, arrays: list[np.ndarray]) -> Tensor:
        if len(shapes := {array.shape for array in arrays}) > 1:
            what = f"extra-{name}.npy has different shapes in one batch ({', '.join(map(str, sorted(shapes)[:4]))})"
            raise UserError(what, hint="store them in one size", code=DATA)
        if name == VISION:
            return torch.from_numpy(np.stack(arrays))
        numbers = [array.astype(np.float32) / (255 if array.dtype == np.uint8 else 1) for array in arrays]
        return torch.from_numpy(np.stack(numbers))

    def _sample(self, index: int, field: str, share: float) -> Latent:
        variant = "mirror" if field == "mirror.npy" else "extra"
        further = {name: f"{variant}-{name}.npy" for name in self.extras}
        record = self.shards.read(index, (field, "json", "text.safetensors", *further.values()))
        moments = self._moments(index, record.get(field, b""))
        if not finite(moments):
            hint = f"encode again with {door('encode_latents --dtype float32 --mixed-precision no')}"
            raise UserError(f"{self.shards.key(index)}: stored latents are not finite", hint=hint, code=NUMERICAL)
        captions = self._captions(index, record.get("json", b""))
        picked = int(share * len(captions))
        text = self._text(index, record.get("text.safetensors", b""), picked) if self.text else None
        extras = {name: self._extra(index, key, record.get(key, b"")) for name, key in further.items()}
        size = self._size(index, record.get("json", b""), variant == "mirror") if self.told_sizes else ()
        return Latent(moments, captions[picked], text, extras, size)

    def _size(self, index: int, data: bytes, mirrored: bool) -> tuple[int, ...]:
        if (frame := stored_frame(json.loads(data))) is None:
            raise self._damaged(index, "it does not say how its picture was cut")
        return (frame.mirrored() if mirrored else frame).numbers()

    def _extra(self, index: int, field: str, data: bytes) -> np.ndarray:
        try:
            array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError):
            raise self._damaged(index, f"{field} is no array") from None
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise self._damaged(index, f"{field} holds no finite numbers")
        return array

    def _moments(self, index: int, data: bytes) -> np.ndarray:
        """The array of an npy file, which is what the index says; the length of its header stands in bytes 8-9."""
        start = 10 + int.from_bytes(data[8:10], "little")
        shape = self.shape_of(index)
        wanted, found = (shape, self.dtype), _described(data[:start])
        if found != wanted or len(data) - start != self.dtype.itemsize * math.prod(shape):
            said = "no array" if found is None else f"an array {_named(*found)}"
            raise self._damaged(index, f"moments are {said}, the index says {_named(*wanted)}")
        return np.frombuffer(data, self.dtype, offset=start).reshape(shape)

    def shape_of(self, index: int) -> tuple[int, ...]:
        """That of a sample's moments, by the size of its bucket where it has one."""
        if not self.shards.buckets:
            return self.shape
        (height, width), factor = self.shards.size_of(index), self.shards.summary["latent"]["factor"]
        return self.shape[0], height // factor, width // factor

    def _captions(self, index: int, data: bytes) -> list[str]:
        try:
            captions = json.loads(data.decode())["captions"]
        except (ValueError, LookupError, TypeError, RecursionError):
            captions = None
        if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
            raise self._damaged(index, "no captions")
        return captions

    def _text(self, index: int, data: bytes, number: int) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(data)
        except (SafetensorError, ValueError) as failure:
            raise self._damaged(index, f"text embedding ({failure})") from None
        parts = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{number}.")}
        if "context" not in parts:
            raise self._damaged(index, f"no embedding of caption {number}")
        return parts

    def _damaged(self, index: int, what: str) -> UserError:
        hint = f"run: {door('make_shards verify', self.shards.directory)}"
        return UserError(f"{self.shards.key(index)}: damaged sample: {what}", hint=hint, code=DATA)


def joined(text: list[dict[str, Tensor]]) -> Cond:
    """Stored text embeddings, each trimmed to its own tokens, as one padded condition, in the precision they have."""
    parts = [
        Cond(
            t["context"][None],
            torch.ones(1, len(t["context"]), dtype=torch.bool),
            t["pooled"][None] if "pooled" in t else None,
        )
        for t in text
    ]
    return Cond.cat(parts)


def finite(array: np.ndarray) -> bool:
    """Whether all numbers are: of 2 and 4 bytes by their bits, a quarter of the time of `isfinite`."""
    if (known := BITS.get(array.dtype.str)) is None:
        return bool(np.isfinite(array).all())
    unsigned, magnitude, infinite = known
    return bool((array.view(unsigned) & unsigned(magnitude)).max() < infinite)  # beyond it lie the NaN


@lru_cache(maxsize=64)
def _described(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]] | None:
    """(shape, type) that an npy header states, and all samples of a set state alike; None where it states none, or
    columns first."""
    file = io.BytesIO(header)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            return None
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception:  # it is read as Python source: any of a tokenizer's errors
        return None
    return None if columns_first and len(shape) > 1 else (shape, dtype)


def _named(shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    return f"{'x'.join(map(str, shape))} of {dtype}"
