"""What a training step reads: images or latents of given slots, as whole batches."""

from __future__ import annotations

import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ldm.noise import Noise
from training.data.order import Slot, substitute
from training.errors import DATA, NUMERICAL, Unreachable, UserError
from training.shards.remote import NULL, refuse_without_null

if TYPE_CHECKING:
    from training.shards.reading import ShardSet

PICTURES = ("png", "jpg", "jpeg", "webp")
Policy = Literal["error", "skip"]
LIMIT = 0.01  # the share of a split that may be left out, at least one sample; beyond it the data are not sound
ATTEMPTS = 8  # unreadable samples drawn for one slot before reading is given up
SHOWN = 5  # of the samples left out
Loaded = TypeVar("Loaded")


class Batch(NamedTuple):
    """One micro-batch. `data`: images uint8 (B,3,H,W) or moments (B,2C,h,w); `slots` (B,) int64 seed its randomness."""

    data: Tensor
    slots: Tensor
    captions: list[str]
    text: list[dict[str, Tensor]] | None = None  # stored text embeddings, where the shards hold them
    bad: Mapping[int, str] = {}  # samples that could not be read, another in the slot of each: index -> why
    indices: Sequence[int] = ()  # the sample in each slot


class Samples(Dataset[Batch], ABC, Generic[Loaded]):
    """The samples of a split by slot.

    One that cannot be read follows `on_bad_data`: "error" raises its UserError; "skip" fills its slot with another,
    drawn by (seed, slot), says so once, and counts it in `bad`. Raises UserError(code 3) where more than 1 % of the
    split (at least one sample) is left out.
    """

    def __init__(self, shards: ShardSet, seed: int, on_bad_data: Policy) -> None:
        self.shards, self.seed, self.on_bad_data = shards, seed, on_bad_data
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.shards)

    @abstractmethod
    def load(self, slots: list[Slot]) -> list[Loaded | UserError]:
        """The sample of each slot, or why it cannot be read."""

    @abstractmethod
    def join(self, slots: list[Slot], samples: list[Loaded]) -> Batch:
        """The samples of slots as one batch."""

    def __getitems__(self, slots: list[Slot]) -> Batch:
        filled, bad = list(slots), {}
        found = self.load(filled)
        for attempt in range(ATTEMPTS):
            wrong = [(i, sample) for i, sample in enumerate(found) if isinstance(sample, UserError)]
            if not wrong:
                break
            for i, problem in wrong:
                if self.on_bad_data == "error" or attempt == ATTEMPTS - 1:
                    raise problem
                bad[filled[i].index] = problem.what
                filled[i] = substitute(slots[i], attempt, len(self), self.seed)
            for (i, _), sample in zip(wrong, self.load([filled[i] for i, _ in wrong]), strict=True):
                found[i] = sample
        batch = self.join(filled, [sample for sample in found if not isinstance(sample, UserError)])
        batch = batch._replace(bad=bad, indices=[slot.index for slot in filled])
        if get_worker_info() is None:
            self.count(bad)
        return batch

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([Slot(index, 0, index)])

    def first(self, count: int) -> range:
        """The places of the first `count` samples, or of all where it is 0."""
        return range(min(count, len(self)) or len(self))

    def chunks(self, places: Sequence[int], size: int) -> Iterator[Batch]:
        """The samples at `places` as the first epoch has them, `size` at once."""
        for start in range(0, len(places), size):
            yield self.__getitems__([Slot(place, 0, place) for place in places[start : start + size]])

    def count(self, bad: Mapping[int, str]) -> None:
        """Takes note of samples left out. Raises UserError (code 3) beyond the limit."""
        for index, why in bad.items():
            if index not in self.bad and len(self.bad) < SHOWN:
                print(f"warning: sample left out, another in its place: {why}", file=sys.stderr)
            self.bad[index] = why
        if len(self.bad) > math.ceil(LIMIT * len(self)):
            first = "; ".join(list(self.bad.values())[:SHOWN])
            what = f"{len(self.bad):,} of {len(self):,} samples cannot be read, more than {LIMIT:.0%}: {first}"
            raise UserError(what, hint=f"run: scripts/make_shards.py verify {self.shards.directory}", code=DATA)


class Images(Samples[np.ndarray]):
    """Packed pictures by slot; half of them mirrored when `flip`, keyed by (seed, epoch, sample)."""

    def __init__(self, shards: ShardSet, *, flip: bool = False, seed: int = 0, on_bad_data: Policy = "skip") -> None:
        super().__init__(shards, seed, on_bad_data)
        self.flip = flip
        self.extensions = [ext for ext in PICTURES if ext in shards.fields]
        if not self.extensions:
            what = f"the shards hold no pictures (fields: {', '.join(shards.fields)})"
            raise UserError(what, hint="make them with scripts/make_shards.py pack", code=DATA)

    def picture(self, index: int) -> np.ndarray:
        """Sample `index` as uint8 (H,W,3). Raises UserError(code 3) where it cannot be decoded."""
        from training.pictures.decoding import load_image

        record = self.shards.read(index, self.extensions)
        data = next((record[ext] for ext in self.extensions if record.get(ext)), b"")
        try:
            return np.asarray(load_image(data))
        except UserError as failure:
            what = f"{self.shards.key(index)}: not a readable picture ({failure.what})"
            hint = f"run: scripts/make_shards.py verify {self.shards.directory}"
            raise UserError(what, hint=hint, code=DATA) from None

    def load(self, slots: list[Slot]) -> list[np.ndarray | UserError]:
        """The picture of each slot."""
        return [_tried(self.picture, slot.index) for slot in slots]

    def join(self, slots: list[Slot], samples: list[np.ndarray]) -> Batch:
        """Stacked, some mirrored. Raises UserError where pictures differ in size."""
        if len({p.shape for p in samples}) > 1:
            sizes = sorted({f"{p.shape[1]}x{p.shape[0]}" for p in samples})
            what = f"pictures of different sizes in one batch ({', '.join(sizes[:4])})"
            raise UserError(what, hint="pack them with --resolution", code=DATA)
        data = torch.from_numpy(np.stack(samples)).permute(0, 3, 1, 2)
        if self.flip:
            data = torch.where(_coin(slots, self.seed, "flip")[:, None, None, None], data.flip(-1), data)
        return Batch(data, _ids(slots), [""] * len(slots))


class Latent(NamedTuple):
    """One sample of `Latents`."""

    moments: np.ndarray
    caption: str
    text: dict[str, Tensor] | None


class Latents(Samples[Latent]):
    """Encoded moments and a caption by slot; caption and mirrored variant are chosen by (seed, epoch, sample)."""

    def __init__(self, shards: ShardSet, *, flip: bool = False, seed: int = 0, on_bad_data: Policy = "skip") -> None:
        super().__init__(shards, seed, on_bad_data)
        latent = shards.summary.get("latent")
        if not latent:
            hint = "make them with: scripts/encode_latents.py --autoencoder RUN --data DIR --output DIR"
            raise UserError("these shards hold no latents", hint=hint, code=DATA)
        self.shape, self.dtype = tuple(latent["shape"]), np.dtype(latent["dtype"])
        self.mirrored = flip and "mirror.npy" in shards.fields
        self.text = "text.safetensors" in shards.fields
        if self.text and not shards.remote:  # from elsewhere the file comes later, and is missed then
            refuse_without_null((shards.directory / NULL).is_file())
        if flip and not self.mirrored:
            hint = "encode again with --flip, or set --train.flip false"
            raise UserError("train.flip is on, but the latents hold no mirrored images", hint=hint, code=DATA)

    def moments(self, index: int, field: str = "moments.npy") -> np.ndarray:
        """Sample `index` as (2C,h,w)."""
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
        mirror = _coin(slots, self.seed, "flip").tolist() if self.mirrored else [False] * len(slots)
        choice = _uniform(slots, self.seed, "caption").tolist()
        return [
            _tried(self._sample, slot.index, "mirror.npy" if mirrored else "moments.npy", share)
            for slot, mirrored, share in zip(slots, mirror, choice, strict=True)
        ]

    def join(self, slots: list[Slot], samples: list[Latent]) -> Batch:
        """Stacked, in float32."""
        data = torch.from_numpy(np.stack([sample.moments for sample in samples]).astype(np.float32))
        text = [sample.text for sample in samples if sample.text is not None] if self.text else None
        return Batch(data, _ids(slots), [sample.caption for sample in samples], text)

    def _sample(self, index: int, field: str, share: float) -> Latent:
        record = self.shards.read(index, (field, "json", "text.safetensors"))
        moments = self._moments(index, record.get(field, b""))
        if not np.isfinite(moments).all():
            hint = "encode again: scripts/encode_latents.py --dtype float32 --mixed-precision no"
            raise UserError(f"{self.shards.key(index)}: stored latents are not finite", hint=hint, code=NUMERICAL)
        captions = self._captions(index, record.get("json", b""))
        picked = int(share * len(captions))
        text = self._text(index, record.get("text.safetensors", b""), picked) if self.text else None
        return Latent(moments, captions[picked], text)

    def _moments(self, index: int, data: bytes) -> np.ndarray:
        """The array of an npy file; the length of its header stands in bytes 8-9."""
        start = 10 + int.from_bytes(data[8:10], "little")
        if data[:6] != b"\x93NUMPY" or len(data) - start != self.dtype.itemsize * math.prod(self.shape):
            raise self._damaged(index, f"moments are no {'x'.join(map(str, self.shape))} array of {self.dtype}")
        return np.frombuffer(data, self.dtype, offset=start).reshape(self.shape)

    def _captions(self, index: int, data: bytes) -> list[str]:
        try:
            captions = json.loads(data)["captions"]
        except (ValueError, LookupError, TypeError, RecursionError):
            captions = None
        if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
            raise self._damaged(index, "no captions")
        return captions

    def _text(self, index: int, data: bytes, picked: int) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            stored = load(data)
        except (SafetensorError, ValueError) as failure:
            raise self._damaged(index, f"text embedding ({failure})") from None
        own = {name.partition(".")[2]: tensor for name, tensor in stored.items() if name.startswith(f"{picked}.")}
        if "context" not in own:
            raise self._damaged(index, f"no embedding of caption {picked}")
        return own

    def _damaged(self, index: int, what: str) -> UserError:
        hint = f"run: scripts/make_shards.py verify {self.shards.directory}"
        return UserError(f"{self.shards.key(index)}: damaged sample: {what}", hint=hint, code=DATA)


def _tried(read: Callable[..., Loaded], *arguments: Any) -> Loaded | UserError:
    """What `read` gives, or why it could not."""
    try:
        return read(*arguments)
    except UserError as problem:
        if isinstance(problem, Unreachable) or problem.code not in (DATA, NUMERICAL):
            raise
        return problem


def _ids(slots: list[Slot]) -> Tensor:
    return torch.tensor([s.slot for s in slots], dtype=torch.int64)


def _uniform(slots: list[Slot], seed: int, purpose: str) -> Tensor:
    """One number in (0, 1) per slot, a function of (seed, epoch, sample, purpose)."""
    sample = Noise(torch.tensor([s.index for s in slots], dtype=torch.int64))
    by_epoch = {e: sample.uniform((1,), seed, e, purpose)[:, 0] for e in {s.epoch for s in slots}}
    return torch.stack([by_epoch[s.epoch][i] for i, s in enumerate(slots)])


def _coin(slots: list[Slot], seed: int, purpose: str) -> Tensor:
    return _uniform(slots, seed, purpose) < 0.5
