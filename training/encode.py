"""Images to latents: un-normalised moments, captions copied, text embeddings if asked; one shard in, one out."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from autoencoder.images import to_unit
from training import launch, text
from training.data import Images
from training.errors import CHECKPOINT, DATA, NUMERICAL, UserError, explained
from training.files import read_json, remove_partials, save_tensors, write_json
from training.order import Slot
from training.runs import autoencoder_hashes, copy_model, find, load_autoencoder
from training.shards import ShardInfo, ShardSet, read_index, sound_shard, write_index, write_shard

if TYPE_CHECKING:
    import argparse

    from autoencoder.base import Autoencoder
    from ldm.text import TextEncoder

PLAN = "encoding.json"  # what a folder of latents is being made from, so that a restart continues the same thing


def encode(args: argparse.Namespace) -> int:
    """Encode every shard of a data set; several processes share the shards. Restartable: sound shards are kept."""
    accelerator = launch.start(args.device)
    source, target = Path(args.data), Path(args.output)
    _, shards = read_index(source)
    home, weights = find(args.autoencoder, "autoencoder")
    if not weights.is_file():
        raise UserError(
            f"{args.autoencoder}: the autoencoder is not finished (its latent normaliser is measured last)",
            hint="let its training end first",
            code=CHECKPOINT,
        )
    model = load_autoencoder(args.autoencoder, accelerator.device)
    encoder = _text_encoder(args, accelerator.device)
    plan = {
        "encoder": autoencoder_hashes(model)["encoder"],
        "data": {s.name: s.sha256 for s in shards},
        "latent": _latent(Images(ShardSet(source, shards[0].split)), model, args.dtype),
        "flip": args.flip,
        "precision": args.mixed_precision,
        "text_encoder": text.identity(encoder)["hash"] if encoder else None,
    }
    if accelerator.is_main_process:
        _claim(target, plan)
        copy_model(home, target / "autoencoder")
        if encoder:
            text.keep(encoder, args.text_encoder, target)
            save_tensors(target / "text_encoder" / "null.safetensors", _embeddings(encoder, [""])[0])
    accelerator.wait_for_everyone()
    worker = Encoder(model, encoder, args, accelerator.device, plan["latent"]["shape"])
    for info in shards[accelerator.process_index :: accelerator.num_processes]:
        name = info.name.removesuffix(".tar")
        if sound_shard(target, name) is None:
            write_shard(target, name, worker.samples(source, info))
        worker.progress(info, sum(s.samples for s in shards))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(target, plan, shards)
    accelerator.wait_for_everyone()
    return 0


class Encoder:
    """Reads one shard of images at a time and gives its samples encoded."""

    def __init__(
        self,
        model: Autoencoder,
        encoder: TextEncoder | None,
        args: argparse.Namespace,
        device: torch.device,
        shape: list[int],
    ) -> None:
        self.model, self.text, self.device, self.shape = model, encoder, device, tuple(shape)
        self.batch, self.flip, self.dtype = args.batch_size, args.flip, np.dtype(args.dtype)
        self.done, self.since, self.precision = 0, time.perf_counter(), args.mixed_precision

    def samples(self, source: Path, info: ShardInfo) -> Iterator[tuple[str, dict[str, bytes]]]:
        """(key, fields) of every sample of a shard, in its order."""
        whole = ShardSet(source, info.split)
        first = sum(s.samples for s in whole.shards if s.name < info.name)
        images = Images(whole)
        for start in range(first, first + info.samples, self.batch):
            index = range(start, min(start + self.batch, first + info.samples))
            pixels = images.__getitems__([Slot(i, 0, i) for i in index]).data
            yield from self._batch(whole, list(index), pixels)

    def _batch(self, whole: ShardSet, index: list[int], pixels: Tensor) -> Iterator[tuple[str, dict[str, bytes]]]:
        records = [whole.read(i) for i in index]
        keys = [whole.key(i) for i in index]
        notes = [_notes(key, record) for key, record in zip(keys, records, strict=True)]
        moments = {"moments.npy": self._moments(pixels, keys)}
        if self.flip:
            moments["mirror.npy"] = self._moments(pixels.flip(-1), keys)
        embedded = self._texts([n["captions"] for n in notes], keys) if self.text else []
        for i, key in enumerate(keys):
            fields = {name: _npy(values[i]) for name, values in moments.items()}
            fields["txt"] = notes[i]["captions"][0].encode()
            fields["json"] = json.dumps(notes[i], ensure_ascii=False).encode()
            if embedded:
                fields["text.safetensors"] = embedded[i]
            yield key, fields

    def _texts(self, captions: list[list[str]], keys: list[str]) -> list[bytes]:
        """The embeddings of each sample's captions, as `N.context` and `N.pooled` for its caption N."""
        from safetensors.torch import save

        assert self.text is not None
        rows = iter(_embeddings(self.text, [caption for own in captions for caption in own]))
        stored = []
        for key, own in zip(keys, captions, strict=True):
            named = {f"{n}.{name}": tensor for n in range(len(own)) for name, tensor in next(rows).items()}
            if not all(tensor.isfinite().all() for tensor in named.values()):
                raise UserError(
                    f"{key}: the caption's embedding is not finite (stored as float16)",
                    hint="leave --text-encoder out here and give it to scripts/train_denoiser.py instead",
                    code=NUMERICAL,
                )
            stored.append(bytes(save(named)))
        return stored

    @torch.no_grad()
    def _moments(self, pixels: Tensor, keys: list[str]) -> np.ndarray:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            moments = self.model.encode(to_unit(pixels.to(self.device))).float().cpu().numpy()
        stored: np.ndarray = moments.astype(self.dtype)
        bad = ~np.isfinite(stored).reshape(len(keys), -1).all(1)
        if bad.any():
            raise UserError(
                f"{keys[int(bad.argmax())]}: latents are not finite (stored as {self.dtype})",
                hint="try --dtype float32 and --mixed-precision no",
                code=NUMERICAL,
            )
        if stored.shape[1:] != self.shape:
            raise UserError(
                f"{keys[0]}: pictures of different sizes in one data set", hint="pack them with --resolution", code=DATA
            )
        return stored

    def progress(self, info: ShardInfo, total: int) -> None:
        """One line after each shard."""
        self.done += info.samples
        print(
            f"encoded {info.name}: {self.done:,} of {total:,} images,"
            f" {self.done / (time.perf_counter() - self.since):.0f} images/s",
            file=sys.stderr,
        )


def _text_encoder(args: argparse.Namespace, device: torch.device) -> TextEncoder | None:
    if not args.text_encoder:
        return None
    from ldm.text import HuggingFace

    with explained("change --text-length"):
        config = HuggingFace(length=args.text_length, pooling=args.text_pooling, lower=args.text_lower)
    return text.load_huggingface(config, args.text_encoder).to(device)


def _claim(target: Path, plan: dict[str, Any]) -> None:
    """Refuse a folder that holds anything but an unfinished encoding of the same thing."""
    target.mkdir(parents=True, exist_ok=True)
    old = target / PLAN
    if old.is_file():
        before = read_json(old)
        changed = [key for key in plan if before.get(key) != plan[key]]
        if changed:
            raise UserError(
                f"{target} holds latents made from something else ({', '.join(changed)} differ)",
                hint="choose another --output, or remove that folder",
                code=CHECKPOINT,
            )
        remove_partials(target)
    elif any(target.iterdir()):
        raise UserError(f"{target} is not empty and holds no latents", hint="choose another --output", code=CHECKPOINT)
    write_json(old, plan)


def _latent(images: Images, model: Autoencoder, dtype: str) -> dict[str, Any]:
    """What one stored latent is: shape, type, and the size of its picture."""
    picture = images.picture(0).shape[:2]
    with explained("pack the pictures again with another --resolution", DATA):
        model.check_images(torch.empty(1, 3, *picture, device="meta"))
    shape = [model.latent_channels * (2 if model.norm.gaussian else 1), *(side // model.factor for side in picture)]
    return {"shape": shape, "dtype": dtype, "picture": list(picture), "factor": model.factor}


def _finish(target: Path, plan: dict[str, Any], shards: list[ShardInfo]) -> None:
    infos = [sound_shard(target, s.name.removesuffix(".tar")) for s in shards]
    summary = {"mirrored": plan["flip"], **{key: plan[key] for key in ("latent", "encoder", "text_encoder")}}
    write_index(target, [info for info in infos if info], summary, kind="latents")
    shape = "x".join(map(str, plan["latent"]["shape"]))
    print(f"latents: {target} ({sum(s.samples for s in shards):,} samples of {shape})", file=sys.stderr)


def _notes(key: str, record: dict[str, bytes]) -> dict[str, Any]:
    notes = json.loads(record["json"]) if "json" in record else {}
    if not isinstance(notes, dict):
        notes = {}
    try:
        captions = notes.get("captions") or [record.get("txt", b"").decode("utf-8").strip()]
    except UnicodeDecodeError as failure:
        raise UserError(f"{key}: caption is not UTF-8 (byte {failure.start})", hint="pack again", code=DATA) from None
    return {**notes, "captions": captions}


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def _embeddings(encoder: TextEncoder, captions: list[str]) -> list[dict[str, Tensor]]:
    """Each caption's context trimmed to its real tokens, and pooled vector, float16: padding would fill the disk."""
    cond = encoder(captions).to("cpu")
    rows = []
    for i in range(len(captions)):
        row = {"context": cond.context[i][cond.mask[i]].half()}
        rows.append(row if cond.pooled is None else {**row, "pooled": cond.pooled[i].half()})
    return rows
