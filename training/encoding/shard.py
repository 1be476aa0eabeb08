"""The encoder's work on one shard of pictures: samples read, encoded, their captions embedded if asked."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from autoencoder.images import to_unit
from training.commands import door
from training.data.samples import LIMIT
from training.errors import DATA, DISK, NUMERICAL, UserError
from training.machine.memory import out_of_memory
from training.messages import note, per_second, tell, warn
from training.packing.captions import clean_captions, decode_text
from training.shards.index import ShardInfo
from training.shards.reading import ShardSet

if TYPE_CHECKING:
    import argparse

    from ldm.text import TextEncoder


class Picture(NamedTuple):
    """One sample to be encoded."""

    key: str
    pixels: np.ndarray
    notes: dict[str, Any]  # its metadata, with `captions`


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
        latent: dict[str, Any],
        total: int,
    ) -> None:
        self.encode, self.text, self.device, self.args = encode, encoder, device, args
        self.shape, self.picture = tuple(latent["shape"]), tuple(latent["picture"])
        self.batch, self.flip, self.dtype = args.batch_size, args.flip, np.dtype(args.dtype)
        self.done, self.since, self.precision = 0, time.perf_counter(), args.mixed_precision
        self.total, self.bad, self.cut, self.waited = total, 0, 0, 0.0

    def samples(
        self, shards: ShardSet, info: ShardInfo, pictures: Iterator[np.ndarray | UserError]
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """(key, fields) of every sample of a shard that can be read, in order; `pictures` goes on with the shard's."""
        first = sum(s.samples for s in shards.shards if s.name < info.name)
        waiting: list[Picture] = []
        for index, pixels in zip(range(first, first + info.samples), self._awaited(pictures), strict=False):
            try:
                waiting.append(_sample(shards, index, pixels))
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
        warn(f"sample left out: {problem.what}")
        refuse_many(self.bad, self.total, self.args.data)

    def _batch(self, pictures: list[Picture]) -> Iterator[tuple[str, dict[str, bytes]]]:
        keys = [picture.key for picture in pictures]
        odd = [picture.key for picture in pictures if picture.pixels.shape[:2] != self.picture]
        if odd:
            raise UserError(
                f"{odd[0]}: pictures of different sizes in one data set", hint="pack them with --resolution", code=DATA
            )
        pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures])).permute(0, 3, 1, 2)
        # The mirrored picture is encoded on its own: an encoder's answer to it is not the mirrored answer.
        moments = {"moments.npy": self._moments(pixels, keys)}
        if self.flip:
            moments["mirror.npy"] = self._moments(pixels.flip(-1), keys)
        embeddings_of = self._texts([picture.notes["captions"] for picture in pictures], keys) if self.text else []
        for i, (key, _, notes) in enumerate(pictures):
            fields = {name: _npy(values[i]) for name, values in moments.items()}
            fields["txt"] = notes["captions"][0].encode()
            fields["json"] = json.dumps(notes, ensure_ascii=False).encode("utf-8", "replace")
            if embeddings_of:
                fields["text.safetensors"] = embeddings_of[i]
            yield key, fields

    def _texts(self, captions: list[list[str]], keys: list[str]) -> list[bytes]:
        """The embeddings of each sample's captions, as `N.context` and `N.pooled` for its caption N."""
        from safetensors.torch import save

        assert self.text is not None
        self.cut += self.text.truncated(caption for texts in captions for caption in texts)
        rows = iter(embeddings(self.text, [caption for texts in captions for caption in texts]))
        files = []
        for key, texts in zip(keys, captions, strict=True):
            tensors = {f"{n}.{name}": tensor for n in range(len(texts)) for name, tensor in next(rows).items()}
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise UserError(
                    f"{key}: the caption's embedding is not finite (stored as float16)",
                    hint="leave --text-encoder out here and give it to train_denoiser.py instead",
                    code=NUMERICAL,
                )
            files.append(bytes(save(tensors)))
        return files

    def _moments(self, pixels: Tensor, keys: list[str]) -> np.ndarray:
        # Checked as it is stored: float16 overflows where the float32 that was encoded does not.
        moments: np.ndarray = self._encoded(pixels).astype(self.dtype)
        bad = ~np.isfinite(moments).reshape(len(keys), -1).all(1)
        if bad.any():
            raise UserError(
                f"{keys[int(bad.argmax())]}: latents are not finite (stored as {self.dtype})",
                hint="try --dtype float32 and --mixed-precision no",
                code=NUMERICAL,
            )
        return moments

    def _encoded(self, pixels: Tensor) -> np.ndarray:
        """Moments of a batch, in parts of `batch` pictures."""
        parts: list[np.ndarray] = []
        at = 0
        while at < len(pixels):
            part = pixels[at : at + self.batch]
            moments = self._fitting(part)
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
    def _fitting(self, pixels: Tensor) -> np.ndarray | None:
        """Moments of pictures, or None where they do not fit into memory."""
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                moments: np.ndarray = self.encode(to_unit(pixels.to(self.device))).float().cpu().numpy()
        except MemoryError:
            return None
        except RuntimeError as failure:
            if not out_of_memory(failure):
                raise
            return None
        return moments

    def progress(self, info: ShardInfo) -> None:
        """One line after each shard."""
        self.done += info.samples
        tell(
            f"encoded {info.name}: {self.done:,} of {self.total:,} images,"
            f" {per_second(self.done / max(1e-9, time.perf_counter() - self.since))}"
        )

    def tell(self) -> float:
        """What was cut short, at the end; returns the share of the time that went by waiting for data."""
        if self.cut:
            note(f"{self.cut:,} captions exceed {self.args.text_length} tokens")
        return self.waited / max(1e-9, time.perf_counter() - self.since)


def refuse_many(bad: int, total: int, data: str) -> None:
    """Raises UserError (code 3) where more than 1 % of the samples (at least one) cannot be read."""
    if bad > math.ceil(LIMIT * total):
        what = f"{bad:,} of {total:,} samples cannot be read, more than {LIMIT:.0%}"
        raise UserError(what, hint=f"run: {door('make_shards verify', data)}", code=DATA)


def _sample(shards: ShardSet, index: int, pixels: np.ndarray | UserError) -> Picture:
    if isinstance(pixels, UserError):
        raise pixels
    key = shards.key(index)
    return Picture(key, pixels, _notes(key, shards.read(index, ("json", "txt"))))


def _notes(key: str, record: dict[str, bytes]) -> dict[str, Any]:
    """A sample's metadata with its captions under `captions`; a blank one where it has none."""
    try:
        notes = json.loads(record["json"]) if "json" in record else {}
        notes = notes if isinstance(notes, dict) else {}
        captions = clean_captions(notes.get("captions") or [decode_text(record.get("txt", b""))]) or ("",)
    except UserError as failure:
        raise UserError(f"{key}: {failure.what}", hint="pack again", code=DATA) from None
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{key}: metadata not JSON", hint="pack again", code=DATA) from None
    return {**notes, "captions": list(captions)}


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def embeddings(encoder: TextEncoder, captions: list[str]) -> list[dict[str, Tensor]]:
    """Each caption's context trimmed to its real tokens, and pooled vector, float16: padding would fill the disk."""
    cond = encoder(captions).to("cpu")
    rows = []
    for i in range(len(captions)):
        row = {"context": cond.context[i][cond.mask[i]].half()}
        rows.append(row if cond.pooled is None else {**row, "pooled": cond.pooled[i].half()})
    return rows
