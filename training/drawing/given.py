"""Pictures that a drawing is given: a file, or all of a folder with the captions beside them, and masks for them.

Free of NumPy and Pillow at import: the command line asks the starts, which are given pictures, for their flags.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import DATA, UserError
from training.ledger import Ledger

if TYPE_CHECKING:
    from PIL import Image

    from training.packing.problems import Problems

Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Given:
    """One picture file that `flag` names: its name within the folder, its bytes, the captions beside it."""

    flag: str
    name: str
    data: bytes
    captions: tuple[str, ...] = ()
    of_folder: bool = False

    @cached_property
    def sha256(self) -> str:
        """That of the file."""
        return sha256(self.data).hexdigest()

    @cached_property
    def size(self) -> Size:
        """(width, height) of the picture."""
        width, height = self.decoded(3, Ledger()).size
        return width, height

    def decoded(self, channels: int, ledger: Ledger) -> Image.Image:
        """The picture, what of it is not used as it was given told to the `ledger`. Raises UserError for no picture."""
        try:
            return self.read(channels, ledger)
        except UserError as problem:
            raise _refused(self.flag, self.name, problem) from None

    def read(self, channels: int, ledger: Ledger) -> Image.Image:
        """As `decoded`; the error is the bare reason, for the file to be named by who counts them."""
        from training.pictures.decoding import load_image

        picture = load_image(self.data, channels=max(3, channels))
        for effect, kind in picture.info["remarks"]:
            ledger.add(effect, kind, self.name)
        if channels > 1:
            return picture
        if _coloured(picture):
            ledger.add("replaced", "colours, by their brightness: the model is of grey pictures", self.name)
        return picture.convert("L")


def _coloured(picture: Image.Image) -> bool:
    from PIL import ImageChops

    red, *others = picture.split()
    return any(ImageChops.difference(red, other).getbbox() for other in others)


def given(flag: str, where: str, ledger: Ledger, problems: Problems | None = None) -> list[Given]:
    """The picture that `flag` names, or those of the folder; files that cannot be read are left out, and told to
    `problems` too. Raises UserError where there is none."""
    from training.packing.folder import Folder
    from training.packing.sources import Remark, Sample, Stored
    from training.pictures.formats import LARGEST_FILE, read_file

    path = Path(where)
    try:
        if not _is_folder(path):
            return [Given(flag, path.name, read_file(path, LARGEST_FILE))]  # kept: files may change while we draw
        folder = Folder(path)
    except UserError as problem:
        raise _refused(flag, where, problem) from None
    found = []
    for part in folder.samples():
        if isinstance(part, Sample):
            assert isinstance(part.image, Stored)  # as a folder has them
            try:
                found.append(Given(flag, part.key + part.suffix, part.image.read(), part.captions, True))
                continue
            except UserError as problem:
                part = Remark(part.key, problem.what)
        ledger.add(part.effect, part.reason, part.key, part.count)
        if problems and part.effect == "left out":
            problems.add(part.key, part.reason, "")
    return found


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name over 255 bytes, which reading it then tells of
        return False


def beside(flag: str, where: str, sources: list[Given], ledger: Ledger) -> Callable[[Given], Given]:
    """What `flag` gives for each of the sources: one file for all, or of a folder the one of the same name, whatever
    its suffix. Raises UserError where one has none."""
    found = given(flag, where, ledger)
    if not _is_folder(Path(where)):
        return lambda source: found[0]
    named = {Path(other.name).stem: other for other in found}
    if missing := [source.name for source in sources if Path(source.name).stem not in named]:
        what = f"{flag} {where}: none for {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
        raise UserError(what, hint="name each as its picture is named, or give one file for all", code=DATA)
    return lambda source: named[Path(source.name).stem]


def instead(problem: UserError) -> str:
    """What helps where pictures are not packed, whose flags are not there."""
    return getattr(problem, "otherwise", "") or problem.hint


def _refused(flag: str, name: str, problem: UserError) -> UserError:
    from training.pictures.formats import SUFFIXES

    hint = instead(problem) or f"give a picture file, as {', '.join(SUFFIXES[:3])}"
    return UserError(f"{flag} {name}: {problem.what}", hint=hint, code=DATA)


def reader(channels: int, size: Size | None, ledger: Ledger) -> Callable[[Given], Image.Image]:
    """Decodes pictures, their middle resized to `size` (height, width) where that is given and another; what of them is
    not used is told to the ledger once for each, as long as they are read one after another."""
    from PIL import Image, ImageOps

    @lru_cache(maxsize=2)
    def read(source: Given) -> Image.Image:
        picture = source.decoded(channels, ledger)
        if size is None or picture.size == size[::-1]:
            return picture
        kind = f"picture of {source.flag}, its middle resized to {size[1]}x{size[0]}"
        ledger.add("cut", kind, f"{source.name} {picture.width}x{picture.height}")
        return ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS)

    return read
