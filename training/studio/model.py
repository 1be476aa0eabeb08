"""The model that a studio has open: drawings by `generate`'s own flags, one at a time, each in a folder of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from shutil import copytree, rmtree
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

from ldm.students import check_plan
from ldm.text.encoders import LabelEncoder, ScratchTextEncoder
from ldm.text.tokenizer import SPECIAL
from training.commands import door
from training.drawing.flags import add_flags
from training.drawing.generate import generate
from training.drawing.requests import parse_size
from training.errors import UserError
from training.files import copy_file
from training.guarding import make_folder
from training.models.assembly import load_pipeline
from training.pictures import grids
from training.settings.decoding import sections
from training.settings.flags import Parser
from training.shapes.wording import held_out_prompts

if TYPE_CHECKING:
    import argparse

    from ldm.samplers import Snapshot
    from training.models.assembly import HashedPipeline

Word = str | Path  # of a command; a path is a file that was given, which is kept beside the drawing
Progress = Callable[[float, str], None]  # the share that is done, and a few words
MOST_PICTURES, MOST_STEPS, MOST_PIXELS = 64, 1000, 1 << 22  # of one click; the last: all pictures of it together
EXAMPLES = 6


class Stopped(UserError):
    """The user ended the drawing before it was done."""


@dataclass(frozen=True)
class Made:
    """A finished drawing: its pictures with what they say, what was not used as it was given, and what it took."""

    pictures: list[Path]
    given: list[Path]
    told: list[str]
    calls: int
    seconds: float
    command: str

    @property
    def facts(self) -> dict[str, Any]:
        """What the first picture says of how it was made."""
        return grids.facts(self.pictures[0])


@dataclass(eq=False)
class Turn:
    """One click of the session `who`: drawings one after another, which a stop ends."""

    studio: Studio
    who: str
    progress: Progress
    stop: Event = field(default_factory=Event)

    def draw(self, words: Sequence[Word], done: float = 0.0, share: float = 1.0) -> Made:
        """What `generate` draws by these flags; `share` is how much of the turn it is, `done` what was before it.

        Raises UserError as `generate` does, for more than a page should ask for, and Stopped.
        """
        folder = self.studio.free_folder()
        try:
            made = self._drawn(words, folder, done, share)
        except BaseException:
            rmtree(folder, ignore_errors=True)
            raise
        if target := self.studio.keep_of(folder):
            copytree(folder, target)
        return made

    def _drawn(self, words: Sequence[Word], folder: Path, done: float, share: float) -> Made:
        kept = [_kept(word, folder / "given") for word in words]
        args = self.studio.read(kept, folder)
        check(args, self.studio.pipeline)
        steps, calls, since = args.steps or self.studio.pipeline.sampling.steps, [0], time.perf_counter()

        def watch(shot: Snapshot) -> None:
            if self.stop.is_set():
                raise Stopped("stopped; nothing of it was kept")
            calls[0] = shot.calls
            self.progress(done + share * min(1.0, (shot.step + 1) / steps), f"step {shot.step + 1}")

        self.progress(done, "starting")
        drawn = generate(args, self.studio.pipeline, watch)
        seconds = time.perf_counter() - since
        files = [word for word in kept if isinstance(word, Path)]
        return Made(drawn.pictures, files, drawn.ledger.lines(), calls[0], seconds, self.studio.command(kept))


@dataclass(frozen=True)
class Studio:
    """A loaded model and the folder of its drawings, which goes when the studio closes. `keep`: where copies stay."""

    model: str
    pipeline: HashedPipeline
    output: Path
    keep: Path | None = None
    device: str = "auto"
    text_encoder: str | None = None
    _lock: Lock = field(default_factory=Lock)
    _turns: list[Turn] = field(default_factory=list)  # drawn or waiting

    @classmethod
    def opened(cls, model: str, output: Path, keep: Path | None, device: str, text_encoder: str | None) -> Studio:
        """The model loaded. Raises UserError as `generate` does."""
        return cls(model, load_pipeline(model, device, text_encoder), output, keep, device, text_encoder)

    @contextmanager
    def turn(self, who: str = "", progress: Progress = lambda share, words: None) -> Iterator[Turn]:
        """A turn of the session `who`, which waits for those before it."""
        turn = Turn(self, who, progress)
        self._turns.append(turn)
        try:
            with self._lock:
                if turn.stop.is_set():
                    raise Stopped("stopped before it began")
                yield turn
        finally:
            self._turns.remove(turn)

    def stop(self, who: str = "") -> bool:
        """End the turns of a session, those that wait too; whether there was one."""
        turns = [turn for turn in list(self._turns) if turn.who == who]
        for turn in turns:
            turn.stop.set()
        return bool(turns)

    def close(self) -> None:
        """End all turns, and wait until nothing is drawn."""
        for turn in list(self._turns):
            turn.stop.set()
        with self._lock:
            pass

    def read(self, words: Sequence[Word], folder: Path) -> argparse.Namespace:
        """The words as `generate` reads them."""
        parser = Parser(prog="generate")
        add_flags(parser)
        own = [*self._model_words(), "--output", str(folder), "--device", self.device]
        return parser.read_with_keys([*map(str, words), *own])

    def command(self, words: Sequence[Word]) -> str:
        """The command that draws the same; files that were given are named by where they stay, if they do."""
        shown = [self.keep_of(word) or word.name if isinstance(word, Path) else word for word in words]
        return door("generate", *self._model_words(), *shown, "--output", "pictures")

    def command_again(self, picture: str, facts: Mapping[str, Any]) -> str:
        """The command that draws a picture again from what it says, with the files it was begun from."""
        from training.drawing.starts import TOLD

        words = [word for key, start in TOLD.items() if isinstance(facts.get(key), dict)
                 for name, flag in start.inputs.items() if facts[key].get(name)
                 for word in (f"--{flag.replace('_', '-')}", _name_of(facts[key], name))]
        return door("generate", *self._model_words(), "--like", picture, *words, "--output", "again")

    def _model_words(self) -> list[str]:
        return ["--model", self.model, *(["--text-encoder", self.text_encoder] if self.text_encoder else [])]

    def free_folder(self) -> Path:
        """The next folder by number, made: free in the output and where copies stay."""
        folder = next(path for number in count(1) if not (path := self.output / f"{number:04d}").exists()
                      and not ((kept := self.keep_of(path)) and kept.exists()))
        make_folder(folder)
        return folder

    def taken(self, picture: Path) -> Path:
        """A copy of a drawn picture whose name says of which drawing it is, to begin another from."""
        folder = self.output / "taken"
        make_folder(folder)
        target = folder / f"{picture.parent.name}-{picture.name}"
        copy_file(picture, target)
        return target

    def keep_of(self, path: Path) -> Path | None:
        """Where a copy of a file or folder of the output stays, if it does."""
        return self.keep / path.relative_to(self.output) if self.keep else None

    def words(self) -> list[str]:
        """The words or labels that a learned text encoder knows, most frequent first; of a frozen one, none."""
        text = self.pipeline.text
        if isinstance(text, LabelEncoder):
            return list(text.classes)
        if isinstance(text, ScratchTextEncoder):
            return [word for word in text.tokenizer.vocabulary[len(SPECIAL) :] if word[0].isalnum()]
        return []

    def samplers(self) -> list[str]:
        """The kinds that the model is drawn with: of a student those that take its jumps, of another no such."""
        pipeline, fit = self.pipeline, list[str]()
        for member in sections("denoiser")["sampler"]:
            sampler: Any = member()
            with suppress(ValueError):
                check_plan(pipeline.student, replace(pipeline.sampling, sampler=sampler), pipeline.denoiser)
                fit.append(sampler.kind)
        return fit

    def scales(self) -> list[float]:
        """Guidance scales to compare: those of a student's range, 1 where it has its own in it."""
        student = self.pipeline.student
        if student.embedded:
            return [student.scales[0], sum(student.scales) / 2, student.scales[1]]
        return [1.0] if student.guided or self.pipeline.sampling.sampler.jumps else [1.0, 3.0, 6.0]

    def examples(self) -> list[str]:
        """Captions to begin with: labels; or of the embedded shapes those held out from training, where every word of
        them is known."""
        text = self.pipeline.text
        if isinstance(text, LabelEncoder):
            return self.words()[:EXAMPLES]
        captions = [held_out_prompts(1 + k // 3, 1 + k % 3)[k // 3] for k in range(EXAMPLES)]
        if isinstance(text, ScratchTextEncoder) and not any(r.unknown for r in text.readings(captions)):
            return captions
        return []


def check(args: argparse.Namespace, pipeline: HashedPipeline) -> None:
    """Raises UserError for numbers that would keep the page, or fill the memory of its machine."""
    steps, (height, width) = args.steps or 1, parse_size(args.size) or pipeline.size
    for name, number, most in (("num-images", args.num_images, MOST_PICTURES), ("steps", steps, MOST_STEPS)):
        if not 1 <= number <= most:
            raise UserError(f"--{name}: from 1 to {most} in one go here (got {number})", hint=_ELSEWHERE)
    if height * width * args.num_images > MOST_PIXELS:
        what = f"{args.num_images} pictures of {height}x{width} pixels are more than is drawn in one go here"
        raise UserError(what, hint=f"ask for fewer or smaller ones; {_ELSEWHERE}")


_ELSEWHERE = "the command generate has no such limit"


def asked(values: Mapping[str, Any]) -> list[Word]:
    """The flags of `generate` and their values as words of its command: what is None, empty or False is left out."""
    words: list[Word] = []
    for flag, value in values.items():
        if value is True:
            words.append(flag)
        elif isinstance(value, Path):
            words += [flag, value]
        elif value is not None and value is not False and (value != "" or flag == "--prompt"):
            text = f"{value:.12g}" if isinstance(value, float) else str(value)
            words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return words


def _kept(word: Word, folder: Path) -> Word:
    """A file that was given, as a copy beside the drawing; any other word as it is."""
    if not isinstance(word, Path):
        return word
    make_folder(folder)
    copy_file(word, folder / word.name)
    return folder / word.name


def _name_of(facts: Mapping[str, Any], key: str) -> str:
    """What a picture says that a file it was begun from was called."""
    name = facts.get(key.removesuffix("sha256") + "name" if key.startswith("mask") else "name")
    return str(name) if name else "FILE"
