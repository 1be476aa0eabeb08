"""What a training step reads: images or latents of given slots, as whole batches."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.noise import Noise
from training.errors import DATA, UserError
from training.order import Batches, Slot

if TYPE_CHECKING:
    from training.shards import ShardSet

PICTURES = ("png", "jpg", "jpeg", "webp")


class Batch(NamedTuple):
    """One micro-batch. `data`: images uint8 (B,3,H,W) or moments (B,2C,h,w); `slots` (B,) int64 seed its randomness."""

    data: Tensor
    slots: Tensor
    captions: list[str]
    text: list[dict[str, Tensor]] | None = None  # stored text embeddings, where the shards hold them


class Images(Dataset[Batch]):
    """Packed pictures by slot; half of them mirrored when `flip`, keyed by (seed, epoch, sample)."""

    def __init__(self, shards: ShardSet, *, flip: bool = False, seed: int = 0) -> None:
        self.shards, self.flip, self.seed = shards, flip, seed
        found = [ext for ext in PICTURES if ext in shards.fields]
        if not found:
            raise UserError(
                f"the shards hold no pictures (fields: {', '.join(shards.fields)})",
                hint="make them with scripts/make_shards.py pack",
                code=DATA,
            )
        self.extensions = found

    def __len__(self) -> int:
        return len(self.shards)

    def picture(self, index: int) -> np.ndarray:
        """Sample `index` as uint8 (H,W,3)."""
        from PIL import Image

        record = self.shards.read(index)
        data = next((record[ext] for ext in self.extensions if record.get(ext)), b"")
        try:
            return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        except (OSError, ValueError) as failure:
            raise UserError(
                f"{self.shards.key(index)}: not a readable picture ({failure})",
                hint="run: scripts/make_shards.py verify DIR",
                code=DATA,
            ) from None

    def __getitems__(self, slots: list[Slot]) -> Batch:
        pictures = [self.picture(s.index) for s in slots]
        if len({p.shape for p in pictures}) > 1:
            sizes = sorted({f"{p.shape[1]}x{p.shape[0]}" for p in pictures})
            raise UserError(
                f"pictures of different sizes in one batch ({', '.join(sizes[:4])})",
                hint="pack them with --resolution",
                code=DATA,
            )
        data = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        if self.flip:
            data = torch.where(_coin(slots, self.seed, "flip")[:, None, None, None], data.flip(-1), data)
        return Batch(data, _ids(slots), [""] * len(slots))

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([Slot(index, 0, index)])


class Latents(Dataset[Batch]):
    """Encoded moments and a caption by slot; caption and mirrored variant are chosen by (seed, epoch, sample)."""

    def __init__(self, shards: ShardSet, *, flip: bool = False, seed: int = 0) -> None:
        self.shards, self.seed = shards, seed
        latent = shards.summary.get("latent")
        if not latent:
            raise UserError(
                "these shards hold no latents",
                hint="make them with: scripts/encode_latents.py --autoencoder RUN --data DIR --output DIR",
                code=DATA,
            )
        self.shape, self.dtype = tuple(latent["shape"]), np.dtype(latent["dtype"])
        self.mirrored = flip and "mirror.npy" in shards.fields
        self.text = "text.safetensors" in shards.fields
        if flip and not self.mirrored:
            raise UserError(
                "train.flip is on, but the latents hold no mirrored images",
                hint="encode again with --flip, or set --train.flip false",
                code=DATA,
            )

    def __len__(self) -> int:
        return len(self.shards)

    def moments(self, index: int, field: str = "moments.npy") -> np.ndarray:
        """Sample `index` as (2C,h,w). The npy header's length stands in its bytes 8-9."""
        data = self.shards.read_field(index, field)
        return np.frombuffer(data, self.dtype, offset=10 + int.from_bytes(data[8:10], "little")).reshape(self.shape)

    def captions(self, index: int) -> list[str]:
        """All captions of sample `index`."""
        return list(json.loads(self.shards.read_field(index, "json"))["captions"])

    def __getitems__(self, slots: list[Slot]) -> Batch:
        from safetensors.torch import load

        mirror = _coin(slots, self.seed, "flip").tolist() if self.mirrored else [False] * len(slots)
        moments = [
            self.moments(s.index, "mirror.npy" if m else "moments.npy") for s, m in zip(slots, mirror, strict=True)
        ]
        choice = _uniform(slots, self.seed, "caption").tolist()
        captions = [self.captions(s.index) for s in slots]
        picked = [int(u * len(c)) for u, c in zip(choice, captions, strict=True)]
        text = None
        if self.text:
            stored = [load(self.shards.read_field(s.index, "text.safetensors")) for s in slots]
            text = [
                {k.partition(".")[2]: v for k, v in t.items() if k.startswith(f"{p}.")}
                for t, p in zip(stored, picked, strict=True)
            ]
        data = torch.from_numpy(np.stack(moments).astype(np.float32))
        return Batch(data, _ids(slots), [c[p] for c, p in zip(captions, picked, strict=True)], text)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([Slot(index, 0, index)])


def stream(dataset: Images | Latents, batches: Batches, workers: int, *, pin: bool = False) -> Iterator[Batch]:
    """The micro-batches of this process, in order, read ahead by `workers` processes."""
    loader: Any = DataLoader(
        _Fetched(dataset),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_whole,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Fetched(Dataset[Any]):
    """Hands a UserError over as a value: raised in a loader process, it would lose its hint and code."""

    def __init__(self, dataset: Images | Latents) -> None:
        self.dataset = dataset

    def __getitems__(self, slots: list[Slot]) -> Batch | UserError:
        try:
            return self.dataset.__getitems__(slots)
        except UserError as problem:
            return problem


def _whole(batch: Any) -> Any:
    return batch


def _ids(slots: list[Slot]) -> Tensor:
    return torch.tensor([s.slot for s in slots], dtype=torch.int64)


def _uniform(slots: list[Slot], seed: int, purpose: str) -> Tensor:
    """One number in (0, 1) per slot, a function of (seed, epoch, sample, purpose)."""
    sample = Noise(torch.tensor([s.index for s in slots], dtype=torch.int64))
    by_epoch = {e: sample.uniform((1,), seed, e, purpose)[:, 0] for e in {s.epoch for s in slots}}
    return torch.stack([by_epoch[s.epoch][i] for i, s in enumerate(slots)])


def _coin(slots: list[Slot], seed: int, purpose: str) -> Tensor:
    return _uniform(slots, seed, purpose) < 0.5
