"""Pictures of any shape packed in buckets: which sizes there are, which picture goes where, and what is cut of it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
from packs import write
from PIL import Image

from training.doors.make_shards import main
from training.errors import UserError
from training.packing.buckets import bucket_sizes, nearest
from training.pictures.decoding import cut_box, fit
from training.pictures.frames import Frame, stored_frame
from training.shards.index import read_index
from training.shards.indexing import index_folder
from training.shards.reading import ShardSet
from training.shards.verifying import verify

FIVE = [[48, 88], [56, 72], [64, 64], [72, 56], [88, 48]]


def picture(height: int, width: int, turn: int = 1, form: str = "PNG") -> bytes:
    """Columns of their own red, rows of their own green; `turn`: the EXIF orientation."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([columns * 255 // width, rows * 255 // height, 0 * rows], -1).astype(np.uint8)
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = turn
    image.save(buffer, form, exif=exif)
    return buffer.getvalue()


def pack(root: Path, output: Path, *flags: str) -> Path:
    words = ["--resolution", "64", "--val-fraction", "0", "--missing-caption", "empty"]
    main(["pack", str(root), "--output", str(output), *words, *flags])
    return output


def frames(folder: Path) -> dict[str, Frame | None]:
    shards = ShardSet(folder)
    return {shards.key(i): stored_frame(json.loads(shards.read_field(i, "json"))) for i in range(len(shards))}


def test_the_sizes_that_are_asked_for() -> None:
    assert bucket_sizes([], 64, None, 2.0) == FIVE
    assert bucket_sizes([], 64, 16, 2.0) == [[48, 80], [64, 64], [80, 48]]
    # SDXL's appendix I has 1024x1024, 960x1088, 896x1152, 832x1216, 768x1344 and those turned.
    sdxl = bucket_sizes([], 1024, 64, 2.0)
    assert all([h, w] in sdxl for h, w in [(1024, 1024), (896, 1152), (832, 1280), (768, 1344), (1344, 768)])
    assert all(max(size) <= 2 * min(size) and not (size[0] % 64 or size[1] % 64) for size in sdxl)
    assert bucket_sizes(["3"], 64, 8, 2.0) == [[48, 88], [64, 64], [88, 48]]
    assert bucket_sizes(["1"], 64, 8, 2.0) == [[64, 64]]
    assert bucket_sizes(["40x20", "64x64"], 64, None, 2.0) == [[64, 64], [40, 20]]


def test_a_picture_goes_to_the_nearest_ratio_in_logarithms() -> None:
    assert nearest(FIVE, (88, 48)) == (48, 88) and nearest(FIVE, (500, 500)) == (64, 64)
    wide, square = 88 / 48, 72 / 56
    between = (wide * square) ** 0.5  # by its difference, not its logarithm, the border would lie at another place
    assert nearest(FIVE, (round(1e6 * between * 1.001), 10**6)) == (48, 88)
    assert nearest(FIVE, (round(1e6 * between * 0.999), 10**6)) == (56, 72)
    assert nearest(FIVE, (10**6, round(1e6 * between * 1.001))) == (88, 48)


def test_each_is_scaled_to_cover_its_bucket_and_cut_in_the_middle(tmp_path: Path) -> None:
    files = {"wide.png": picture(100, 200), "tall.png": picture(150, 100), "even.png": picture(64, 64)}
    folder = pack(write(tmp_path / "in", files), tmp_path / "out", "--buckets")
    shards = ShardSet(folder)
    assert [(shards.key(i), shards.size_of(i)) for i in range(3)] == [
        ("wide", (48, 88)),
        ("even", (64, 64)),
        ("tall", (72, 56)),
    ]
    found = frames(folder)
    assert found["wide"] == Frame((100, 200), (0, 4), (48, 88)) and found["even"] == Frame((64, 64), (0, 0), (64, 64))
    assert found["tall"] == Frame((150, 100), (6, 0), (72, 56))  # scaled by 0.56 to 84x56
    pixels = np.asarray(Image.open(io.BytesIO(shards.read_field(0, "png"))).convert("RGB")).astype(int)
    assert pixels.shape == (48, 88, 3)
    # Column c of what is kept was column (c + 4.5) / 0.48 of the picture, whose red is 255 / 200 of its number.
    wanted = (np.arange(88) + 4 + 0.5) / 0.48 * 255 / 200
    assert np.abs(pixels[20, :, 0] - wanted).max() < 3
    ledger = read_index(folder)[0]["summary"]["ledger"]
    assert ledger["cut"]["edges, to the ratio of the bucket"]["count"] == 2


def test_the_turn_of_a_camera_comes_first(tmp_path: Path) -> None:
    turned = write(tmp_path / "in", {"a.jpg": picture(100, 200, 6, "JPEG")})  # shown as 200 high, 100 wide
    assert frames(pack(turned, tmp_path / "out", "--buckets"))["a"] == Frame((200, 100), (4, 0), (88, 48))


def test_a_mirrored_picture_begins_where_the_other_ends(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {f"{n}.png": picture(100, 200 + 5 * n) for n in range(6)})
    found = frames(pack(source, tmp_path / "out", "--buckets", "--crop", "random", "--flip"))
    offsets = set()
    for n in range(6):
        frame, twin = found[str(n)], found[f"{n}~mirrored"]
        assert frame and twin and frame.size == (48, 88)
        assert frame.crop[1] + twin.crop[1] == round((200 + 5 * n) * 48 / 100 - 88)
        assert twin.mirrored() == frame
        offsets.add(frame.crop[1])
    assert offsets != {found["0"].crop[1]}  # type: ignore[union-attr]


def test_a_square_is_cut_as_it_was(tmp_path: Path) -> None:
    image = Image.open(io.BytesIO(picture(131, 207)))
    box = cut_box(image.size, (64, 64))
    assert box == (38, 0, 169, 131)
    old = image.resize((64, 64), Image.Resampling.LANCZOS, box=(38, 0, 169, 131), reducing_gap=3.0)
    assert fit(image, 64).tobytes() == old.tobytes() == fit(image, (64, 64)).tobytes()
    source = write(tmp_path / "in", {"a.png": picture(131, 207)})
    assert frames(pack(source, tmp_path / "plain")) == {"a": None}
    assert frames(pack(source, tmp_path / "kept", "--keep-sizes"))["a"] == Frame((131, 207), (0, 19), (64, 64))


class Last(Random):
    """Places every random crop as far to the right and bottom as can be."""

    def random(self) -> float:
        return 1 - 2**-53


def test_the_box_stays_within_the_picture() -> None:
    for width in range(48, 140):
        for height in (48, 49, 77, 131):
            for target in ((48, 40), (40, 48), (31, 43)):
                left, top, right, bottom = cut_box((width, height), target, "random", Last())
                assert 0 <= left < right <= width and 0 <= top < bottom <= height
                assert (right - left) / (bottom - top) == pytest.approx(target[1] / target[0])
                assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)


def test_a_lost_index_is_made_anew_with_its_sizes(tmp_path: Path) -> None:
    files = {f"{h}-{w}.png": picture(h, w) for h, w in ((100, 200), (200, 100), (90, 90))}
    folder = pack(write(tmp_path / "in", files), tmp_path / "out", "--buckets", "--keep-sizes")
    index, before = read_index(folder)
    assert index["format"] == 2 and {info.size for info in before} == {(48, 88), (64, 64), (88, 48)}
    (folder / "index.json").unlink()
    index_folder(folder)
    assert read_index(folder)[1] == before and verify(folder).problems == ()
    (folder / "train-64x64-000000.tar").rename(folder / "train-000000.tar")
    (folder / "train-64x64-000000.index.npy").unlink()
    with pytest.raises(UserError, match="its name does not say of which"):
        index_folder(folder)


def test_a_picture_of_another_bucket_is_found(tmp_path: Path) -> None:
    folder = pack(write(tmp_path / "in", {"a.png": picture(100, 200)}), tmp_path / "out", "--buckets")
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["size"] = [48, 80]
    (folder / "index.json").write_text(json.dumps(index))
    problems = verify(folder).problems
    assert len(problems) == 1 and "a: is a picture of 48x88, its shard is of 48x80 (height x width)" in problems[0]


def test_shards_without_buckets_are_told_as_ever(tmp_path: Path) -> None:
    folder = pack(write(tmp_path / "in", {"a.png": picture(100, 200)}), tmp_path / "out")
    listed = json.loads((folder / "index.json").read_text())
    assert listed["format"] == 1 and set(listed["shards"][0]) == {"name", "split", "samples", "bytes", "sha256"}
    assert ShardSet(folder).buckets == {} and ShardSet(folder).size_of(0) is None


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--buckets", "9", "--bucket-step", "32"), "--buckets 9: with sides of multiples of 32 these are 5 different"),
        (("--buckets", "0"), "--buckets 0: with sides of multiples of 8 these are 0 different"),
        (("--buckets", "64"), "--buckets 64: with sides"),
        (("--buckets", "64x"), "--buckets 64x: expected nothing, a number of buckets, or sizes"),
        (("--buckets", "32x64", "64x128"), "--buckets: 32x64 and 64x128 have one ratio"),
        (("--buckets", "--bucket-step", "65"), "--bucket-step: must lie in 1 … 64"),
        (("--buckets", "--bucket-ratio", "0.5"), "--bucket-ratio: must lie in 1 … 20"),
        (("--bucket-step", "8"), "--bucket-step and --bucket-ratio: are of buckets"),
    ],
)
def test_what_is_refused(tmp_path: Path, flags: tuple[str, ...], what: str) -> None:
    with pytest.raises(UserError) as caught:
        pack(write(tmp_path / "in", {"a.png": picture(64, 64)}), tmp_path / "out", *flags)
    assert caught.value.what.startswith(what)


def test_what_does_not_cover_its_bucket_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.png": picture(47, 90)})
    with pytest.raises(UserError, match="too small"):
        pack(source, tmp_path / "out", "--buckets")
    assert frames(pack(source, tmp_path / "up", "--buckets", "--upscale"))["a"] == Frame((47, 90), (0, 2), (48, 88))
