"""The encoder's work on one shard of pictures: samples read, encoded, their captions embedded if asked."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from autoencoder.images import to_unit
from ldm.representation import VISION
from training.commands import door
from training.data.samples import LIMIT
from training.encoding.shown import made_small
from training.errors import DATA, DISK, NUMERICAL, UserError
from training.ledger import Ledger
from training.machine.memory import out_of_memory
from training.messages import note, warn
from training.pictures.hints import EXTRA, FIELD, loaded
from training.shards.captions import stored_captions, text_fields
from training.shards.index import ShardInfo
from training.shards.reading import ShardSet

if TYPE_CHECKING:
    import argparse

    from ldm.text import TextEncoder


Result = TypeVar("Result")


class Picture(NamedTuple):
    """One sample to be encoded."""

    key: str
    pixels: np.ndarray
    notes: dict[str, Any]  # its metadata, with `captions`
    hint: np.ndarray | None  # (C, H, W)


class Encoder:
    """Reads one shard of images at a time and gives its samples encoded.

    Samples that cannot be read follow `--on-bad-data`: left out and counted, up to 1 % of all (at least one), or an
    error. Where a batch does not fit into memory it is halved, for good.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        encoder: TextEncoder | None,
        args: argparse.Namespace,
        device: torch.device,
        plan: dict[str, Any],
        total: int,
        means: Callable[[Tensor], Tensor],
        vision: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.encode, self.text, self.device, self.args, self.vision = encode, encoder, device, args, vision
        self.picture = tuple(plan["latent"]["picture"])
        self.hints: int = plan["hint"]["channels"] if plan.get("hint") else 0  # channels
        self.image, self.means = plan.get("image") or {}, means  # of moments, as normalised latents
        self.batch, self.flip, self.dtype = args.batch_size, args.flip, np.dtype(args.dtype)
        self.since, self.precision = time.perf_counter(), args.mixed_precision
        self.total, self.bad, self.waited = total, 0, 0.0
        self.texts_at_once = 0  # captions that fit into the text encoder; 0: all of a batch, as far as is known
        self.ledger = Ledger()  # of the present shard

    def samples(
        self, shards: ShardSet, info: ShardInfo, pictures: Iterator[np.ndarray | UserError]
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """(key, fields) of every sample of a shard that can be read, in order; `pictures` goes on with the shard's."""
        self.ledger, self.picture = Ledger(), info.size or self.picture
        first = shards.start(info.name)
        waiting: list[Picture] = []
        for index, pixels in zip(range(first, first + info.samples), self._awaited(pictures), strict=False):
            try:
                waiting.append(_sample(shards, index, pixels, self.hints))
                if not any(waiting[-1].notes["captions"]):
                    self.ledger.add("guessed", "sample without a caption, the empty one taken", waiting[-1].key)
            except UserError as problem:
                self._leave_out(problem)
            if len(waiting) >= self.batch:
                yield from self._batch(waiting)
                waiting = []
        if waiting:
            yield from self._batch(waiting)

    def _awaited(self, pictures: Iterator[np.ndarray | UserError]) -> Iterator[np.ndarray | UserError]:
        """`pictures`, with the time that each takes to come counted as waiting for data."""
        while True:
            start = time.perf_counter()
            pixels = next(pictures, None)
            self.waited += time.perf_counter() - start
            if pixels is None:
                return
            yield pixels

    def _leave_out(self, problem: UserError) -> None:
        if self.args.on_bad_data == "error":
            raise problem
        self.bad += 1
        self.ledger.add("left out", "sample that cannot be read", problem.what)
        warn(f"sample left out: {problem.what}")
        refuse_many(self.bad, self.total, self.args.data)

    def _batch(self, pictures: list[Picture]) -> Iterator[tuple[str, dict[str, bytes]]]:
        keys = [picture.key for picture in pictures]
        odd = [picture.key for picture in pictures if picture.pixels.shape[:2] != self.picture]
        if odd:
            what = f"{odd[0]}: pictures of different sizes in one data set"
            raise UserError(what, hint="pack them with --resolution, or --buckets", code=DATA)
        pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures])).permute(0, 3, 1, 2)
        # The mirrored picture is encoded on its own: an encoder's answer to it is not the mirrored answer.
        beside = [picture.hint for picture in pictures if picture.hint is not None]
        hints = torch.from_numpy(np.stack(beside)) if beside else None
        moments = {"moments.npy": self._moments(pixels, keys), **self._beside("extra", pixels, hints, keys)}
        if self.flip:
            moments["mirror.npy"] = self._moments(pixels.flip(-1), keys)
            moments |= self._beside("mirror", pixels.flip(-1), None if hints is None else hints.flip(-1), keys)
        embeddings_of = self._texts([picture.notes["captions"] for picture in pictures], keys) if self.text else []
        for i, (key, _, notes, _) in enumerate(pictures):
            fields = {name: npy(values[i]) for name, values in moments.items()}
            fields["txt"] = notes["captions"][0].encode()
            fields["json"] = json.dumps(notes, ensure_ascii=False).encode("utf-8", "replace")
            if embeddings_of:
                fields["text.safetensors"] = embeddings_of[i]
            yield key, fields

    def _beside(self, variant: str, pixels: Tensor, hints: Tensor | None, keys: list[str]) -> dict[str, np.ndarray]:
        """What stands beside the moments of a variant, of its pictures and hints (B, C, H, W)."""
        fields = self._image(variant, pixels, hints, keys)
        if self.vision is not None:
            features = fields[f"{variant}-{VISION}.npy"] = self._encoded(pixels, self.vision).astype(np.float16)
            if bad := _not_finite(features, keys):
                hint = "give another model with --vision, or --mixed-precision no, with another --output"
                raise UserError(f"{bad}: features are not finite (stored as float16)", hint=hint, code=NUMERICAL)
        return fields

    def _image(self, variant: str, pixels: Tensor, hints: Tensor | None, keys: list[str]) -> dict[str, np.ndarray]:
        """The field that a denoiser is to be shown, of pictures and hints (B, C, H, W); nothing where there is none."""
        if self.image.get("kind") == "low-res":
            return {f"{variant}-{EXTRA}.npy": made_small(pixels, self.image["factor"]).numpy()}
        if hints is None:
            return {}
        if self.image.get("kind") != "source":
            return {f"{variant}-{EXTRA}.npy": hints.numpy()}
        moments = torch.from_numpy(self._moments(hints, keys)).to(self.device, torch.float32)
        return {f"{variant}-{EXTRA}.npy": self.means(moments).cpu().numpy().astype(self.dtype)}

    def _texts(self, captions: list[list[str]], keys: list[str]) -> list[bytes]:
        """The embeddings of each sample's captions, as `N.context` and `N.pooled` for its caption N."""
        from safetensors.torch import save

        assert self.text is not None
        every = [caption for texts in captions for caption in texts]
        if self.text.truncated(every):
            for key, texts in zip(keys, captions, strict=True):
                cut = self.text.truncated(texts)
                self.ledger.add("cut", f"captions exceed {self.args.text_length} tokens", key if cut else "", cut)
        rows = iter(self._embedded(every))
        files = []
        for key, texts in zip(keys, captions, strict=True):
            tensors = {f"{n}.{name}": tensor for n in range(len(texts)) for name, tensor in next(rows).items()}
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                hint = "leave --text-encoder out here, with another --output, and give it to train_denoiser"
                what = f"{key}: the caption's embedding is not finite (stored as float16)"
                raise UserError(what, hint=hint, code=NUMERICAL)
            files.append(bytes(save(tensors)))
        return files

    def _embedded(self, captions: list[str]) -> list[dict[str, Tensor]]:
        """The embeddings of captions, in parts that fit into memory."""
        assert self.text is not None
        rows: list[dict[str, Tensor]] = []
        while len(rows) < len(captions):
            part = captions[len(rows) :][: self.texts_at_once or None]
            found = in_memory(partial(embeddings, self.text, part))
            if found is not None:
                rows += found
            elif len(part) == 1:
                raise UserError("out of memory with a single caption", hint="use a machine with more memory", code=DISK)
            else:
                self.texts_at_once = len(part) // 2
                note(f"out of memory with {len(part)} captions at once; now {self.texts_at_once}")
        return rows

    def _moments(self, pixels: Tensor, keys: list[str]) -> np.ndarray:
        # Checked as it is stored: float16 overflows where the float32 that was encoded does not.
        moments: np.ndarray = self._encoded(pixels, self.encode).astype(self.dtype)
        if bad := _not_finite(moments, keys):
            hint = "try --dtype float32 and --mixed-precision no, with another --output"
            raise UserError(f"{bad}: latents are not finite (stored as {self.dtype})", hint=hint, code=NUMERICAL)
        return moments

    def _encoded(self, pixels: Tensor, encode: Callable[[Tensor], Tensor]) -> np.ndarray:
        """What is made of a batch, in parts of `batch` pictures."""
        parts: list[np.ndarray] = []
        at = 0
        while at < len(pixels):
            part = pixels[at : at + self.batch]
            moments = self._fitting(part, encode)
            if moments is not None:
                parts.append(moments)
                at += len(part)
            elif len(part) == 1:
                raise UserError("out of memory with a single picture", hint="use a machine with more memory", code=DISK)
            else:
                self.batch = len(part) // 2  # of this part, which may be smaller than `batch`, and for all that follow
                note(f"out of memory with {len(part)} images at once; now {self.batch}")
        return np.concatenate(parts)

    @torch.no_grad()
    def _fitting(self, pixels: Tensor, encode: Callable[[Tensor], Tensor]) -> np.ndarray | None:
        """What is made of pictures, or None where they do not fit into memory."""
        def encoded() -> np.ndarray:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                moments: np.ndarray = encode(to_unit(pixels.to(self.device))).float().cpu().numpy()
            return moments

        return in_memory(encoded)

    def waiting(self) -> float:
        """The share of the time that went by waiting for data."""
        return self.waited / max(1e-9, time.perf_counter() - self.since)


def _not_finite(stored: np.ndarray, keys: list[str]) -> str:
    """The first sample of which a number is not; "" for none."""
    bad = ~np.isfinite(stored).reshape(len(keys), -1).all(1)
    return keys[int(bad.argmax())] if bad.any() else ""


def in_memory(work: Callable[[], Result]) -> Result | None:
    """What `work` gives, or None where it does not fit into memory."""
    try:
        return work()
    except MemoryError:
        return None
    except RuntimeError as failure:
        if not out_of_memory(failure):
            raise
        return None


def refuse_many(bad: int, total: int, data: str) -> None:
    """Raises UserError (code 3) where more than 1 % of the samples (at least one) cannot be read."""
    if bad > math.ceil(LIMIT * total):
        what = f"{bad:,} of {total:,} samples cannot be read, more than {LIMIT:.0%}"
        raise UserError(what, hint=f"run: {door('make_shards verify', data)}", code=DATA)


def _sample(shards: ShardSet, index: int, pixels: np.ndarray | UserError, hints: int) -> Picture:
    """A sample with its hint of so many channels; 0: it has none."""
    if isinstance(pixels, UserError):
        raise pixels
    key, wanted = shards.key(index), ("json", *text_fields(shards.fields), *[FIELD] * bool(hints))
    record = shards.read(index, wanted)
    return Picture(key, pixels, _notes(key, record), _hint(key, record, hints, pixels.shape[:2]) if hints else None)


def _hint(key: str, record: dict[str, bytes], channels: int, size: tuple[int, int]) -> np.ndarray:
    try:
        return loaded(record.get(FIELD, b""), channels, size)
    except UserError as failure:
        raise UserError(f"{key}: {failure.what}", hint="pack again", code=DATA) from None


def _notes(key: str, record: dict[str, bytes]) -> dict[str, Any]:
    """A sample's metadata with its captions under `captions`; a blank one where it has none."""
    try:
        notes, captions = stored_captions(record)
    except UserError as failure:
        raise UserError(f"{key}: {failure.what}", hint="pack again", code=DATA) from None
    return {**notes, "captions": list(captions) or [""]}


def npy(array: np.ndarray) -> bytes:
    """The bytes of an npy file."""
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(array), allow_pickle=False)
    return out.getvalue()


def embeddings(encoder: TextEncoder, captions: list[str]) -> list[dict[str, Tensor]]:
    """Each caption's context trimmed to its real tokens, and pooled vector, float16: padding would fill the disk."""
    cond = encoder(captions).to("cpu")
    rows = []
    for i in range(len(captions)):
        row = {"context": cond.context[i][cond.mask[i]].half()}
        rows.append(row if cond.pooled is None else {**row, "pooled": cond.pooled[i].half()})
    return rows
