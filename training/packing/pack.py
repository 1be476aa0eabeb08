"""From a source of captioned pictures to shards: decode, fit, split, write, and say what was left out and why."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from training.errors import DATA, USAGE, UserError
from training.files import remove_partials, write_bytes, write_json
from training.guarding import make_folder, read_record, refuse_links
from training.ledger import Ledger
from training.messages import answer, note, per_second, warn
from training.packing.framing import Framing
from training.packing.hints import HintFiles, packing_state
from training.packing.mixing import FILES, MixingWriter
from training.packing.problems import Problems
from training.packing.settings import Settings, as_stored
from training.packing.sources import Remark, Sample, Source
from training.packing.texts import name_as_caption
from training.packing.workers import Picture, Start, pictures
from training.pictures.decoding import Unusable, encode_png
from training.pictures.frames import FRAME
from training.pictures.hints import FIELD, beside
from training.progress import Progress
from training.shards.claims import LOCK, claimed
from training.shards.index import INDEX, PACKING, ShardInfo, Size, bucket_summary, hint_summary, read_index, write_index
from training.shards.offset_index import index_path
from training.shards.reading import ShardSet
from training.shards.writing import ShardWriter

SHEET, SHOWN = "contact-sheet.png", 64  # pictures on it, at most


class Packer:
    """One packing: what was decided, written and left out so far."""

    def __init__(self, output: Path, settings: Settings, *, mixed: bool) -> None:
        self.output, self.settings, self.mixed = output, settings, mixed
        self.writers: dict[tuple[str, Size | None], ShardWriter | MixingWriter] = {}
        self.ledger, self.problems = Ledger(), Problems()
        self.pictures = self.lost = 0
        self.rules = Counter[str]()  # how many hints each made
        self.framing = Framing()
        self._seen: set[bytes] = set()  # digests of the files: all that is kept of a picture

    def take(self, item: Sample | Remark, split: str, made: Picture | UserError | None) -> None:
        """Packs a sample, or notes or refuses it according to `on_bad_data`."""
        if isinstance(item, Remark):
            if item.effect == "left out":
                self._skip(item.key, item.reason)
            else:
                self.ledger.add(item.effect, item.reason, item.key, item.count)
            return
        try:
            if not isinstance(made, Picture):
                raise made or AssertionError
            self._pack(item, split, made)
        except UserError as error:
            if error.code != DATA:  # a full disk is no fault of the sample's
                raise
            self._skip(item.key, error.what, error.hint, item.suffix if isinstance(error, Unusable) else "")

    def _skip(self, key: str, reason: str, hint: str = "", suffix: str = "") -> None:
        if self.settings.on_bad_data == "error":
            self.problems.add(f"{key}{suffix}", reason, hint)
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

    def split(self, sample: Sample) -> str:
        """The sample's own, or by hash of the key: the same in every packing of any selection."""
        if sample.split:
            return sample.split
        draw = int.from_bytes(hashlib.sha256(sample.key.encode()).digest()[:7], "big") / 2**56
        return "val" if draw < self.settings.val_fraction else "train"

    def _pack(self, sample: Sample, split: str, picture: Picture) -> None:
        captions = self._captions(sample)
        for effect, reason in picture.notes:
            self.ledger.add(effect, reason, sample.key)
        if picture.digest in self._seen:
            self.ledger.add("ignored", "same picture twice, both packed", sample.key)
        elif picture.digest:
            self._seen.add(picture.digest)
        self.pictures += 1
        if self.problems.found:
            return  # these are looked at for problems alone
        size = picture.frame.size if self.settings.buckets else None
        writer = self.writers.get((split, size)) or self.writers.setdefault((split, size), self._writer(split, size))
        self.rules[picture.rule] += picture.hint is not None
        if self.framing.cuts(picture.frame) and size:
            self.ledger.add("cut", "edges, to the ratio of the bucket", sample.key)
        for key, data, hint, frame in (
            (sample.key, picture.data, picture.hint, picture.frame),
            (f"{sample.key}~mirrored", picture.mirrored, picture.mirrored_hint, picture.frame.mirrored()),
        ):
            if data:
                own = {FRAME: frame._asdict()} if self.settings.framed else {}
                texts = {"txt": captions[0].encode(), "json": _notes({**sample.meta, **own, "captions": captions})}
                writer.add(key, {self.settings.format: data, **texts, **({FIELD: hint} if hint else {})})

    def _writer(self, split: str, size: Size | None) -> ShardWriter | MixingWriter:
        count = self.settings.samples_per_shard
        if not self.mixed:
            return ShardWriter(self.output, split, count, size=size)
        files = max(1, FILES // len(self.settings.buckets or [None]))  # of all together, few enough to be open at once
        return MixingWriter(self.output, split, count, self.settings.seed, size, files)

    def take_all(
        self, source: Source, pool: Start | None, progress: Progress, hints: HintFiles | None
    ) -> list[ShardInfo]:
        """Everything of a source, to the shards that came of it. Raises UserError as the policies say."""

        def split() -> Iterator[tuple[Sample | Remark, str]]:
            return ((item, self.split(item) if isinstance(item, Sample) else "") for item in source.samples())

        done = pictures(split(), self.settings, pool, hints)
        try:
            for item, name, made in done:
                self.take(item, name, made)
                progress.at(self.pictures + self.lost, f"{self.lost:,} of them skipped" if self.lost else "")
                if self.pictures == self.settings.limit or self.problems.enough():
                    break
            done.close()  # type: ignore[attr-defined]  # a generator: its processes end here
            self.problems.refuse()
            return [info for writer in self.writers.values() for info in writer.finish()]
        finally:
            for writer in self.writers.values():
                if isinstance(writer, MixingWriter):
                    writer.close()


def _notes(notes: dict[str, Any]) -> bytes:
    return json.dumps(notes, ensure_ascii=False, default=str, separators=(",", ":")).encode("utf-8", "replace")


def _prepare(output: Path, packing: dict[str, Any]) -> bool:
    """Makes the folder ready; True where this very packing is already complete there.

    Raises UserError where the folder holds anything else.
    """
    refuse_links(output, DATA)
    mark = output / PACKING
    asked = packing
    try:
        stored = read_record(mark, {"settings": dict}, code=DATA) if mark.is_file() else None
    except UserError:
        stored = None
    if stored is not None:
        if "order" not in stored["settings"]:  # packed before there was a choice, and no other is a reason to
            asked = {**packing, "settings": {**packing["settings"], "order": "source"}}
        stored["settings"] = as_stored(stored["settings"])
    if stored is None and any(path.name != LOCK for path in output.iterdir()):
        raise UserError(f"{output} is not empty", hint="give another --output; nothing is overwritten", code=USAGE)
    complete = (output / INDEX).is_file()
    if complete and stored != asked:
        raise UserError(
            f"{output} holds another packing (other source or settings)",
            hint="give another --output, or delete it",
            code=USAGE,
        )
    if complete and asked != packing:
        note(f"{output} was packed by an earlier version: in the order of its source, captions and splits by its rules")
        note("another --output is packed by today's, and mixed, as a training from an address needs it")
    if not complete:  # one that was stopped is begun anew, with other settings too
        remove_partials(output)
        write_json(mark, packing)
    return complete


def _finish(packer: Packer, infos: list[ShardInfo], source: Source, packing: dict[str, Any]) -> None:
    if not infos:
        why = "; ".join(packer.ledger.lines()) or "it holds none"
        raise UserError(f"{source.name}: no usable pictures ({why})", code=DATA)
    kept = {name for info in infos for name in (info.name, index_path(Path(info.name)).name)}
    for path in packer.output.iterdir():  # left by an earlier packing of the same that was stopped
        if path.name not in kept and path.suffix in (".tar", ".npy"):
            path.unlink()
    write_index(
        packer.output,
        infos,
        {
            "source": packing["source"],
            "resolution": packing["settings"]["resolution"],
            "order": "mixed" if packer.mixed or source.mixed else "source",
            "pictures": packer.pictures,
            **({} if packer.settings.channels == 3 else {"channels": packer.settings.channels}),
            **hint_summary(packing["settings"], packer.rules),
            **bucket_summary(packing["settings"]),
            "ledger": packer.ledger.report(),
            "settings": packing["settings"],
        },
    )


def contact_sheet(folder: Path) -> None:
    """Up to 64 of the pictures of a folder of shards, evenly spread over it, with captions and their hints to the right
    of them, as `contact-sheet.png`."""
    from training.pictures import grids

    sets = [ShardSet(folder, split) for split in sorted({info.split for info in read_index(folder)[1]})]
    places = [(shards, i) for shards in sets for i in (range(len(shards)))]
    count = min(SHOWN, len(places))
    images, captions = [], []
    for place in range(count):
        shards, i = places[place * (len(places) - 1) // max(1, count - 1)]
        fields = shards.read(i)
        images.append(beside(Image.open(io.BytesIO(fields.get("png") or fields["jpg"])), fields.get(FIELD)))
        captions.append(fields["txt"].decode())
    write_bytes(folder / SHEET, encode_png(grids.contact_sheet(images, captions)))


def pack(
    source: Source, output: Path, settings: Settings, pool: Start | None = None, hints: HintFiles | None = None
) -> bool:
    """Packs a source into `output` and prints what came of it; False where that was done before and nothing is to do.

    `hints`: the files that its pictures' hints are made of, where they are not made of the pixels. The same source and
    settings give the same bytes, whoever makes the pictures: this process, or a `pool` of others. Raises UserError as
    the settings' policies say, and where `output` is taken.
    """
    if source.exact and settings.flip:
        raise UserError("--flip: the captions of shapes name left and right; mirrored they would be false", code=USAGE)
    kind = source.name if source.name in ("shapes", "fashion-mnist") else type(source).__name__.lower()
    packing = {
        "source": kind,
        "state": packing_state(source.state(), hints),
        "settings": asdict(settings),
    }
    make_folder(output)
    with claimed(output):
        if _prepare(output, packing):
            answer(f"{output}: already packed from this source with these settings; nothing to do")
            return False
        packer = Packer(output, settings, mixed=settings.order == "mixed" and not source.mixed)
        with Progress("packing", min(filter(None, (source.total, settings.limit)), default=None)) as progress:
            infos = packer.take_all(source, pool, progress, hints)
        if hints and settings.limit is None:
            hints.tell_unused(packer.ledger)
        _finish(packer, infos, source, packing)
        contact_sheet(output)
    _tell(packer, infos, source, progress)
    return True


def _tell(packer: Packer, infos: list[ShardInfo], source: Source, progress: Progress) -> None:
    settings, output = packer.settings, packer.output
    splits = dict.fromkeys(split for split, _ in packer.writers)
    counts = {split: sum(info.samples for info in infos if info.split == split) for split in splits}
    said = ", ".join(f"{count:,} {split}" for split, count in sorted(counts.items()))
    size = sum(info.bytes for info in infos) / 1e6
    answer(
        f"{output}: {packer.pictures:,} pictures of {'about ' * bool(settings.buckets)}{settings.resolution}x"
        f"{settings.resolution} from {source.name} ({said})"
    )
    seconds = progress.seconds
    rate = per_second(packer.pictures / max(1e-9, seconds), "picture")
    answer(f"{len(infos)} shards, {size:,.1f} MB, {seconds:.1f} s ({rate}); some of them: {output / SHEET}")
    if settings.hint:
        made = ", ".join(f"{count:,} of {rule}" for rule, count in sorted(packer.rules.items()))
        answer(f"hints: {settings.hint} ({made})")
    if settings.buckets:
        answer(packer.framing.line(settings.buckets))
    for line in packer.ledger.lines() or ["everything was used as it was given"]:
        answer(line)
    if "val" not in counts and settings.val_fraction:
        more = "a larger --val-fraction makes some, and --splits draw where splits were taken from names"
        answer(f"note: no validation pictures came out; {more}")
    if "train" not in counts:
        warn(f"no training pictures came out ({said}): nothing can be trained on them, only measured")
