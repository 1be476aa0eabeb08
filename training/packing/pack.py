"""From a source of captioned pictures to shards: decode, fit, split, write, and say what was left out and why."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from PIL import Image, ImageOps

from training.errors import DATA, USAGE, UserError
from training.files import make_folder, refuse_links, write_json
from training.ledger import Ledger
from training.messages import answer
from training.packing.sources import Remark, Sample, Source
from training.packing.texts import name_as_caption
from training.pictures.decoding import (
    MAX_PIXELS,
    MODES,
    MOST_PIXELS,
    Crop,
    Unusable,
    background_colour,
    encode_jpg,
    encode_png,
    fit,
    load_image,
    refuse,
)
from training.pictures.flags import check_pictures
from training.shards.index import INDEX, ShardInfo, write_index
from training.shards.writing import ShardWriter

# What a folder is being packed from; written first, so that the same command may go on with it.
PACKING = "packing.json"
VAL_CROP: Crop = "center"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How pictures are packed; all that, with the source, decides the bytes."""

    resolution: int = 64
    crop: Crop = "center"
    flip: bool = False
    val_fraction: float = 0.02
    seed: int = 0
    format: Literal["png", "jpg"] = "png"
    missing_caption: Literal["error", "empty", "filename", "folder"] = "error"
    on_bad_data: Literal["error", "skip"] = "error"
    background: str = "white"
    upscale: bool = False
    limit: int | None = None
    samples_per_shard: int = 2000
    animated: Literal["first", "reject"] = "first"
    max_pixels: int = MAX_PIXELS
    caption_column: str | None = None
    caption_lines: Literal["each", "join"] = "each"
    image_field: str | None = None
    splits: Literal["names", "draw"] = "names"
    channels: int = 3
    range: list[float] | None = None  # a list, as JSON gives it back
    ignore_alpha: bool = False

    def __post_init__(self) -> None:
        if self.resolution < 8:
            raise UserError(f"--resolution: must be at least 8 (got {self.resolution})")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val-fraction: must be at least 0 and below 1 (got {self.val_fraction})")
        if self.samples_per_shard < 1 or (self.limit is not None and self.limit < 1):
            raise UserError("--samples-per-shard and --limit: must be at least 1")
        if not 1 <= self.max_pixels <= MOST_PIXELS:
            raise UserError(f"--max-pixels: must lie in 1 … {MOST_PIXELS:,} (got {self.max_pixels:,})")
        background_colour(self.background)
        check_pictures(self.channels, self.range, self.format)


class Progress:
    """One line on stderr, rewritten on a terminal, repeated every ten seconds elsewhere."""

    def __init__(self, total: int | None) -> None:
        self.total, self.start, self.live = total, time.monotonic(), sys.stderr.isatty()
        self.next = self.start + (0.2 if self.live else 10.0)

    def show(self, pictures: int, skips: int) -> None:
        """Where the packing stands; cheap to call for every picture."""
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + (0.2 if self.live else 10.0)
        rate = pictures / (now - self.start)
        total = f" of {self.total:,}" if self.total else ""
        eta = f", {max(0, self.total - pictures - skips) / rate:.0f} s left" if self.total and rate else ""
        line = f"packing: {pictures:,}{total} pictures, {rate:,.0f}/s{eta}" + (f", {skips:,} skipped" if skips else "")
        sys.stderr.write(f"\r{line}\x1b[K" if self.live else f"{line}\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Frees the line for what comes next."""
        if self.live:
            sys.stderr.write("\r\x1b[K")


class Packer:
    """One packing: what was decided, written and left out so far."""

    def __init__(self, output: Path, settings: Settings) -> None:
        self.output, self.settings = output, settings
        self.writers: dict[str, ShardWriter] = {}
        self.ledger = Ledger()
        self.pictures = self.lost = 0
        self._seen: dict[bytes, str] = {}

    def take(self, item: Sample | Remark, exact: bool) -> None:
        """Packs a sample, or notes or refuses it according to `on_bad_data`."""
        if isinstance(item, Remark):
            if item.effect == "left out":
                self._skip(item.key, item.reason)
            else:
                self.ledger.add(item.effect, item.reason, item.key, item.count)
            return
        try:
            self._pack(item, exact)
        except UserError as error:
            if error.code != DATA:  # a full disk is no fault of the sample's
                raise
            self._skip(item.key, error.what, error.hint, item.suffix if isinstance(error, Unusable) else "")

    def _skip(self, key: str, reason: str, hint: str = "", suffix: str = "") -> None:
        if self.settings.on_bad_data == "error":
            hint = f"{hint}; or " * bool(hint) + "--on-bad-data skip leaves such samples out and counts them"
            raise UserError(f"{key}{suffix}: {reason}", hint=hint, code=DATA)
        self.lost += 1
        self.ledger.add("left out", reason, key)

    def _captions(self, sample: Sample) -> tuple[str, ...]:
        if sample.captions:
            return sample.captions
        how = self.settings.missing_caption
        if how == "error":
            hint = sample.hint or "write KEY.txt beside it, or --missing-caption empty|filename|folder"
            raise UserError("no caption", hint=hint, code=DATA)
        caption = "" if how == "empty" else name_as_caption(sample.key, how)
        self.ledger.add("guessed", f"no caption, {how} used", sample.key)
        return (caption,)

    def _split(self, sample: Sample) -> str:
        """The sample's own, or by hash of the key: the same in every packing of any selection."""
        if sample.split:
            return sample.split
        draw = int.from_bytes(hashlib.sha256(sample.key.encode()).digest()[:7], "big") / 2**56
        return "val" if draw < self.settings.val_fraction else "train"

    def _picture(self, sample: Sample, split: str) -> Image.Image:
        settings = self.settings
        if isinstance(sample.image, Image.Image):
            image = sample.image.convert(MODES[settings.channels])
        else:
            image = load_image(
                sample.image,
                settings.background,
                settings.max_pixels,
                channels=settings.channels,
                limits=settings.range,
                ignore_alpha=settings.ignore_alpha,
                suffix=sample.suffix,
            )
            if image.info["animated"] and settings.animated == "reject":
                raise UserError("animated picture", hint="--animated first takes its first frame", code=DATA)
            for effect, kind in image.info["remarks"]:
                self.ledger.add(effect, kind, sample.key)
            digest = hashlib.blake2b(sample.image, digest_size=16).digest()
            if self._seen.setdefault(digest, sample.key) != sample.key:
                self.ledger.add("ignored", "same picture twice, both packed", f"{sample.key} = {self._seen[digest]}")
        crop = settings.crop if split == "train" else VAL_CROP
        image = fit(image, settings.resolution, crop, Random(f"{settings.seed} {sample.key}"), settings.upscale)
        if image.mode == "RGBA" and not image.getchannel("A").getbbox():
            raise refuse("fully transparent image", "--ignore-alpha takes the colours of all pictures as opaque")
        return image

    def _pack(self, sample: Sample, exact: bool) -> None:
        split = self._split(sample)
        image, captions = self._picture(sample, split), self._captions(sample)
        encode = encode_png if self.settings.format == "png" else encode_jpg
        meta = json.dumps(
            {**sample.meta, "captions": list(captions)}, ensure_ascii=False, default=str, separators=(",", ":")
        ).encode("utf-8", "replace")
        texts = {"txt": captions[0].encode(), "json": meta}
        writer = self.writers.setdefault(split, ShardWriter(self.output, split, self.settings.samples_per_shard))
        writer.add(sample.key, {self.settings.format: encode(image), **texts})
        if self.settings.flip and split == "train" and not exact:
            writer.add(f"{sample.key}~mirrored", {self.settings.format: encode(ImageOps.mirror(image)), **texts})
        self.pictures += 1


def _prepare(output: Path, packing: dict[str, Any]) -> bool:
    """Makes the folder ready; True where this very packing is already complete there.

    Raises UserError where the folder holds anything else.
    """
    make_folder(output)
    refuse_links(output, DATA)
    mark = output / PACKING
    try:
        stored_packing = json.loads(mark.read_bytes()) if mark.is_file() else None
        if stored_packing is not None:  # settings newer than the packing stood at their defaults
            stored_packing["settings"] = {**asdict(Settings()), **stored_packing["settings"]}
    except (ValueError, LookupError, TypeError):
        stored_packing = None
    if stored_packing is None and any(output.iterdir()):
        raise UserError(f"{output} is not empty", hint="give another --output; nothing is overwritten", code=USAGE)
    complete = (output / INDEX).is_file()
    if complete and stored_packing != packing:
        raise UserError(
            f"{output} holds another packing (other source or settings)",
            hint="give another --output, or delete it",
            code=USAGE,
        )
    if not complete:  # one that was stopped is begun anew, with other settings too
        write_json(mark, packing)
    return complete


def _finish(packer: Packer, source: Source, packing: dict[str, Any]) -> list[ShardInfo]:
    infos = [info for writer in packer.writers.values() for info in writer.finish()]
    if not infos:
        why = "; ".join(packer.ledger.lines()) or "it holds none"
        raise UserError(f"{source.name}: no usable pictures ({why})", code=DATA)
    kept = {name for info in infos for name in (info.name, f"{info.name[:-4]}.index.npy")}
    for path in packer.output.iterdir():  # left by an earlier packing of the same that was stopped
        if (
            path.name not in kept
            and path.name != PACKING
            and (path.suffix in (".tar", ".npy") or path.name.endswith(".partial"))
        ):
            path.unlink()
    settings = packing["settings"]
    write_index(
        packer.output,
        infos,
        {
            "source": packing["source"],
            "resolution": settings["resolution"],
            "pictures": packer.pictures,
            **({} if settings["channels"] == 3 else {"channels": settings["channels"]}),
            "ledger": packer.ledger.report(),
            "settings": settings,
        },
    )
    return infos


def pack(source: Source, output: Path, settings: Settings) -> bool:
    """Packs a source into `output` and prints what came of it; False where that was done before and nothing is to do.

    The same source and settings give the same bytes. Raises UserError as the settings' policies say, and where `output`
    is taken.
    """
    if source.exact and settings.flip:
        raise UserError("--flip: the captions of shapes name left and right; mirrored they would be false", code=USAGE)
    kind = source.name if source.name in ("shapes", "fashion-mnist") else type(source).__name__.lower()
    packing = {
        "source": kind,
        "state": hashlib.sha256(source.state().encode()).hexdigest(),
        "settings": asdict(settings),
    }
    if _prepare(output, packing):
        answer(f"{output}: already packed from this source with these settings; nothing to do")
        return False
    packer, progress = (
        Packer(output, settings),
        Progress(min(filter(None, (source.total, settings.limit)), default=None)),
    )
    for item in source.samples():
        packer.take(item, source.exact)
        progress.show(packer.pictures, packer.lost)
        if packer.pictures == settings.limit:
            break
    progress.close()
    infos = _finish(packer, source, packing)
    seconds = time.monotonic() - progress.start
    counts = {split: sum(info.samples for info in infos if info.split == split) for split in packer.writers}
    said = ", ".join(f"{count:,} {split}" for split, count in sorted(counts.items()))
    size = sum(info.bytes for info in infos) / 1e6
    answer(
        f"{output}: {packer.pictures:,} pictures of {settings.resolution}x{settings.resolution} "
        f"from {source.name} ({said})"
    )
    answer(f"{len(infos)} shards, {size:,.1f} MB, {seconds:.1f} s")
    for line in packer.ledger.lines() or ["everything was used as it was given"]:
        answer(line)
    if "val" not in counts and settings.val_fraction:
        more = "a larger --val-fraction makes some, and --splits draw where splits were taken from names"
        answer(f"note: no validation pictures came out; {more}")
    return True
