"""What the scenarios of `tests/scripts/followed.toml` need before their first command: a place and folders of data."""

from __future__ import annotations

import json
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import tiny
from packs import write
from PIL import Image

from training.files import hold


class Place:
    """Where a scenario plays: its folder, data and runs of tests by name, and the environment."""

    def __init__(self, folder: Path, request: pytest.FixtureRequest, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.request, self.patch = folder, request, patch

    def made(self, name: str) -> Path:
        """One of tests/conftest.py, as shapes or latents."""
        return Path(self.request.getfixturevalue(name))

    def copy(self, name: str, to: str) -> Path:
        """A copy of one of them that may be changed."""
        return Path(shutil.copytree(self.made(name), self.folder / to))


def png(shade: int, side: int = 32) -> bytes:
    """A picture of one colour."""
    file = BytesIO()
    Image.new("RGB", (side, side), (shade, 9, 9)).save(file, "PNG")
    return file.getvalue()


def pictures(place: Place, side: int = 32, captions: bool = True) -> Path:
    folder = place.folder / "in"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (side, side), (60 * number, 9, 9)).save(folder / f"{number}.png")
        if captions:
            (folder / f"{number}.txt").write_text(f"red {number}")
    return folder


def masks(place: Place) -> None:
    """Pictures to edit, a mask of their size with a hole, one without, and one that is all hole."""
    pictures(place)
    for name, shade, box in (("hole", 0, (8, 8, 20, 20)), ("black", 0, ()), ("white", 255, ())):
        mask = Image.new("L", (32, 32), shade)
        if box:
            mask.paste(255, box)
        mask.save(place.folder / f"{name}.png")


def edited(place: Place) -> None:
    """As `masks`, and a picture drawn again from one of them."""
    masks(place)
    words = ("--prompt", "red", "--device", "cpu", "--steps", "2", "--image", place.folder / "in" / "0.png")
    assert tiny.call("generate", "--model", place.made("denoiser"), "--output", place.folder / "made", *words) == 0


def captionless(place: Place) -> None:
    pictures(place, captions=False)


def broken(place: Place) -> None:
    (pictures(place) / "0.png").write_bytes(b"no picture")


def transparent(place: Place) -> None:
    Image.new("RGBA", (32, 32), (9, 9, 9, 0)).save(pictures(place) / "0.png")


def moving(place: Place) -> None:
    frames = [Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in (0, 200)]
    frames[0].save(pictures(place) / "9.gif", save_all=True, append_images=frames[1:])
    (place.folder / "in" / "9.txt").write_text("moving")


def large(place: Place) -> None:
    pictures(place, 64)


def small(place: Place) -> None:
    pictures(place, 8)


def floats(place: Place) -> None:
    image = Image.new("F", (32, 32))
    image.putdata([value / 1024 for value in range(1024)])
    image.save(pictures(place) / "0.tiff")
    (place.folder / "in" / "0.png").unlink()


def taken(place: Place) -> None:
    pictures(place)
    write(place.folder / "out", {"notes.txt": "mine"})


def packed_before(place: Place) -> None:
    pictures(place)
    shutil.copytree(place.made("shapes"), place.folder / "out")


def a_file(place: Place) -> None:
    pictures(place)
    (place.folder / "out").write_text("mine")


def a_config(place: Place) -> None:
    (place.folder / "other.toml").write_text("[unet]\nwidth = 3\n")


def a_table(place: Place) -> None:
    for path in pictures(place).glob("*.txt"):
        path.unlink()
    lines = ["file_name,prompt", *(f"{n}.png,red {n}" for n in range(4))]
    (place.folder / "in" / "metadata.csv").write_text("\n".join(lines))


def two_splits(place: Place) -> None:
    files = {"train_val/a.png": png(0), "train_val/a.txt": "a", "test/b.png": png(1), "test/b.txt": "b"}
    write(place.folder / "in", files)


def unindexed(place: Place) -> None:
    for path in place.copy("shapes", "my [data]").glob("*"):
        path.suffix == ".tar" or path.unlink()


def unindexed_latents(place: Place) -> None:
    for path in [path for path in place.copy("latents", "data").glob("*") if path.is_file()]:
        path.suffix == ".tar" or path.unlink()


def repeated(place: Place) -> None:
    for name in ("train-000000", "train-000001"):
        files = [(f"{key}.{end}", data) for key in (name, "a") for end, data in (("png", png(0)), ("txt", b"a"))]
        _tar(place.folder / "data" / f"{name}.tar", files)


def hard_link(place: Place) -> None:
    path = place.folder / "data" / "train-000000.tar"
    _tar(path, [("a.png", png(0)), ("a.txt", b"a"), ("b.txt", b"b")])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        archive.addfile(link)


def _tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))


def _captioned(count: int, side: int = 32) -> list[tuple[str, bytes]]:
    return [(f"{n:02}.{end}", data) for n in range(count) for end, data in (("png", png(n, side)), ("txt", b"red"))]


def _indexed(place: Place, **splits: list[tuple[str, bytes]]) -> None:
    """`data`: tars of others, indexed where they lie."""
    for split, files in splits.items():
        named = [(f"{split}-{name}", data) for name, data in files]
        _tar(place.folder / "data" / f"{split}-000000.tar", named)
    tiny.call("make_shards", "index", place.folder / "data")


def several_sizes(place: Place) -> None:
    """Shards whose pictures differ in size, as an indexed tar of others may."""
    sides = [(32 if number % 2 else 40) for number in range(12)]
    files = []
    for number, side in enumerate(sides):
        files += [(f"{number:02}.png", png(number, side)), (f"{number:02}.txt", b"red")]
    _indexed(place, train=files, val=files)


def bad_pictures(place: Place) -> None:
    """Shards of which a sample in three is no picture: sound by its bytes, so that only reading it tells."""
    files = [(f"{n:02}.{end}", data) for n in range(24) for end, data in
             (("png", b"no picture" if n % 3 == 1 else png(n)), ("txt", b"red"))]  # fmt: skip
    _indexed(place, train=files, val=files)


def one_bad_picture(place: Place) -> None:
    files = [(f"{n:03}.{end}", data) for n in range(40) for end, data in
             (("png", b"no picture" if n == 7 else png(n)), ("txt", b"red"))]  # fmt: skip
    _indexed(place, train=files)


def changed_bytes(place: Place) -> None:
    """Every training shard damaged within its pictures."""
    for path in place.copy("shapes", "data").glob("train-*.tar"):
        data = bytearray(path.read_bytes())
        for start in range(0, len(data) - 4, 512):
            if data[start : start + 4] == b"\x89PNG":
                data[start + 60] ^= 255
        path.write_bytes(data)


def drawn(place: Place) -> None:
    write(place.folder / "out", {"00000.png": b"a picture"})


def no_val(place: Place) -> None:
    _indexed(place, train=_captioned(40))


def few_held_out(place: Place) -> None:
    _indexed(place, train=_captioned(40), val=_captioned(8))


def no_train(place: Place) -> None:
    _indexed(place, val=_captioned(8))


def damaged_record(place: Place) -> None:
    write(place.folder / "run", {"run.json": json.dumps([1])})


def a_list(place: Place) -> None:
    write(place.folder, {"list.json": "[1, 2]"})


def no_home(place: Place) -> None:
    place.patch.delenv("XDG_CACHE_HOME", raising=False)
    place.patch.setattr(Path, "home", staticmethod(_no_home))


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def odd_sides(place: Place) -> None:
    tiny.call("make_shards", *f"pack shapes --samples 40 --resolution 38 --output {place.folder}/data".split())


def tiny_pictures(place: Place) -> None:
    _indexed(place, train=_captioned(12), val=_captioned(12, 8))


def a_parquet(place: Place) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"image": [png(n) for n in range(4)], "prompt": list("abcd")})
    parquet.write_table(table, place.folder / "a.parquet")


def changed_shards(place: Place) -> None:
    """Tars of another packing under the index of the first."""
    folder = place.copy("shapes", "data")
    words = f"pack shapes --samples 96 --seed 7 --val-fraction 0.2 --samples-per-shard 40 --output {place.folder}/new"
    tiny.call("make_shards", *words.split())
    for path in (place.folder / "new").glob("*.tar"):
        shutil.copy(path, folder)


def one_caption(place: Place) -> None:
    """Pictures under two captions alone, which a classifier can take for its classes."""
    files = [(f"{n:02}.{end}", data) for n in range(40) for end, data in
             (("png", png(200 * (n % 2))), ("txt", (b"red", b"black")[n % 2]))]  # fmt: skip
    _indexed(place, train=files, val=files[:16])


def unmixed(place: Place) -> None:
    for number in range(3):
        files = [(f"{number}{name}", data) for name, data in _captioned(10)]
        _tar(place.folder / "data" / f"train-{number:06}.tar", files)
    _indexed(place, val=_captioned(4))


def held(place: Place) -> None:
    """`out` as another process holds it that writes there."""
    (place.folder / "out").mkdir()
    file = hold(place.folder / "out")
    place.request.addfinalizer(file.close)


def hinted(place: Place, side: int = 32, mode: str = "L") -> None:
    """Photographs, and beside them a folder of hints with their names."""
    folder = pictures(place)
    (place.folder / "hints").mkdir()
    shade = Image.linear_gradient("L").resize((32, 32))
    for number in range(4):
        photograph = Image.merge("RGB", (shade.rotate(90 * number), shade, shade))
        photograph.save(folder / f"{number}.png")
        photograph.convert(mode).resize((side, side)).save(place.folder / "hints" / f"{number}.png")


def small_hints(place: Place) -> None:
    hinted(place, 8)


def coloured_hints(place: Place) -> None:
    hinted(place, 32, "RGB")


def no_hints(place: Place) -> None:
    hinted(place)
    (place.folder / "empty").mkdir()
