"""Pictures decoded, fitted and encoded, in this process or in several: in the source's order and with the same bytes
for every number of them."""

from __future__ import annotations

import hashlib
import multiprocessing
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple, Protocol

from PIL import Image, ImageOps

from training.errors import DATA, LOST, UserError
from training.ledger import Effect
from training.machine.signals import block_sigterm, shield
from training.packing.hints import File, HintFiles, hint_beside
from training.packing.settings import Settings
from training.packing.sources import Remark, Sample, Stored
from training.pictures.decoding import MODES, Crop, cut_box, encode_jpg, encode_png, fit, load_image, refuse
from training.pictures.frames import Frame, frame_of
from training.pictures.hints import stored

VAL_CROP: Crop = "center"
AHEAD = 4  # pictures that are on their way for each process


@dataclass(frozen=True)
class Picture:
    """A sample's picture as it is stored, with its mirrored twin where asked for; `digest` of the file it came from,
    and what of the file was not used."""

    data: bytes
    mirrored: bytes | None
    digest: bytes | None
    notes: tuple[tuple[Effect, str], ...]
    frame: Frame
    hint: bytes | None = None
    mirrored_hint: bytes | None = None
    rule: str = ""  # that the hint was made by


class Task(NamedTuple):
    """What a process needs to know of a sample to make its picture."""

    key: str
    image: Image.Image | bytes | Stored
    split: str
    flip: bool
    suffix: str  # of the picture's file
    hint: File | UserError | None  # where hints are files


def make_picture(task: Task, settings: Settings) -> Picture | UserError:
    """The picture of a sample, or why it cannot be used: an error raised in another process would come without its
    hint."""
    try:
        return _picture(task, settings)
    except UserError as problem:
        return problem


def _picture(task: Task, settings: Settings) -> Picture:
    given = task.image.read() if isinstance(task.image, Stored) else task.image
    image, digest = given, None
    notes: list[tuple[Effect, str]] = []
    if isinstance(image, bytes):
        digest = hashlib.blake2b(image, digest_size=16).digest()
        image = load_image(
            image,
            settings.background,
            settings.max_pixels,
            channels=settings.channels,
            limits=settings.range,
            ignore_alpha=settings.ignore_alpha,
            suffix=task.suffix,
        )
        if image.info["animated"] and settings.animated == "reject":
            raise UserError("animated picture", hint="--animated first takes its first frame", code=DATA)
        notes = image.info["remarks"]
    else:
        image = image.convert(MODES[settings.channels])
    crop, rng = settings.crop if task.split == "train" else VAL_CROP, f"{settings.seed} {task.key}"
    frame = framed(image.size, settings, crop, rng)
    image = fit(image, frame.size, crop, Random(rng), settings.upscale)
    if image.mode == "RGBA" and not image.getchannel("A").getbbox():
        raise refuse("fully transparent image", "--ignore-alpha takes the colours of all pictures as opaque")
    encode = encode_png if settings.format == "png" else encode_jpg
    mirrored = encode(ImageOps.mirror(image)) if task.flip else None
    if settings.hint is None:
        return Picture(encode(image), mirrored, digest, tuple(notes), frame)
    hint, rule, more = hint_beside(given, image, task.hint, settings, crop, rng, task.suffix)
    other = stored(hint[:, ::-1]) if task.flip else None
    return Picture(encode(image), mirrored, digest, (*notes, *more), frame, stored(hint), other, rule)


def framed(size: tuple[int, int], settings: Settings, crop: Crop, rng: str) -> Frame:
    """How a picture of `size` (width, height) is cut. Raises UserError(code 3) where it is too small, or too narrow."""
    rows, columns = settings.target(size)
    box = (0, 0, *size) if size == (columns, rows) else cut_box(
        size, (rows, columns), crop, Random(rng), settings.upscale)
    return frame_of(size, (rows, columns), box)


Done = tuple[Sample | Remark, str, "Picture | UserError | None"]  # what the source gave, its split, its picture


class Pending(Protocol):
    """A picture that is on its way."""

    def result(self) -> Picture | UserError: ...


class Pool(Protocol):
    """Those who make pictures elsewhere, up to `ahead` at once. Raises UserError (code 1) where one of them is lost."""

    ahead: int

    def submit(self, task: Task) -> Pending: ...

    def close(self) -> None: ...


Start = Callable[[Settings], Pool]  # what starts a pool


def pictures(
    items: Iterable[tuple[Sample | Remark, str]],
    settings: Settings,
    pool: Start | None = None,
    hints: HintFiles | None = None,
) -> Iterator[Done]:
    """Each item of a source with its picture and its hint, of the pixels or of the files in `hints`, in order; those of
    a `pool` make them, this process where there is none.

    Raises what `items` raises, after all that came before, and UserError (code 1) where a process is lost.
    """
    if pool:
        try:
            with closing(pool(settings)) as others:
                yield from _by_others(items, settings, others, hints)
        except BrokenProcessPool:
            what = "a process that packs pictures was lost (killed, or out of memory)"
            raise UserError(what, hint="run the same command again with fewer --num-workers", code=LOST) from None
        return
    for item, split in items:
        made = make_picture(_task(item, split, settings, hints), settings) if isinstance(item, Sample) else None
        yield item, split, made


def _task(sample: Sample, split: str, settings: Settings, hints: HintFiles | None) -> Task:
    hint = hints.of(sample.key) if hints else None
    return Task(sample.key, sample.image, split, settings.flip and split == "train", sample.suffix, hint)


class Processes:
    """A pool of processes of this machine."""

    def __init__(self, count: int, settings: Settings) -> None:
        # Forked, they are born with this process's answers to signals, as loaders are.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        self.ahead, self.settings = AHEAD * count, settings
        self._pool = ProcessPoolExecutor(count, context, shield, (0,))
        with block_sigterm():
            self._pool.submit(int).result()  # all are started by the first task

    def submit(self, task: Task) -> Future[Picture | UserError]:
        """Have a picture made."""
        return self._pool.submit(make_picture, task, self.settings)

    def close(self) -> None:
        """End them."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _by_others(
    items: Iterable[tuple[Sample | Remark, str]], settings: Settings, pool: Pool, hints: HintFiles | None
) -> Iterator[Done]:
    waiting: deque[tuple[Sample | Remark, str, Pending | None]] = deque()
    source, failure = iter(items), None
    while True:
        try:
            item, split = next(source)
        except StopIteration:
            break
        except UserError as problem:
            failure = problem
            break
        if isinstance(item, Sample):
            waiting.append((replace(item, image=b""), split, pool.submit(_task(item, split, settings, hints))))
        else:
            waiting.append((item, split, None))
        while len(waiting) > pool.ahead:
            yield _next(waiting)
    while waiting:
        yield _next(waiting)
    if failure:
        raise failure


def _next(waiting: deque[tuple[Sample | Remark, str, Pending | None]]) -> Done:
    item, split, pending = waiting.popleft()
    return item, split, pending.result() if pending else None
