from __future__ import annotations

import gzip
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image, ImageOps

from training.doors.make_shards import main
from training.errors import UserError
from training.packing.builtin_sources import FashionMnist
from training.shapes.checker import check
from training.shapes.scenes import HELD_OUT
from training.shapes.wording import parse
from training.shards.patterns import braces
from training.shards.reading import ShardSet
from training.shards.verifying import verify

SCRIPT = Path(__file__).parents[3] / "scripts" / "make_shards.py"


def picture(seed: int, size: tuple[int, int] = (80, 72)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty pictures in two folders, each with a sidecar."""
    root = tmp_path / "photos"
    for i in range(40):
        path = root / ("cats" if i % 2 else "dogs") / f"no.{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
        path.with_suffix(".txt").write_text(f"picture number {i}\n")
    return root


def pack(source: Path | str, output: Path, *flags: str) -> dict[str, ShardSet]:
    main(["pack", str(source), "--output", str(output), *flags])
    assert verify(output).problems == ()
    index = json.loads((output / "index.json").read_text())
    return {split: ShardSet(output, split) for split in index["summary"]["counts"]}


def refused(source: Path | str, output: Path, *flags: str) -> UserError:
    with pytest.raises(UserError) as caught:
        main(["pack", str(source), "--output", str(output), *flags])
    return caught.value


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def keyed(shards: ShardSet) -> dict[str, dict[str, bytes]]:
    return {shards.key(i): shards.read(i) for i in range(len(shards))}


def test_a_folder(folder: Path, tmp_path: Path) -> None:
    split = pack(folder, tmp_path / "out", "--val-fraction", "0.2")
    train, val = keyed(split["train"]), keyed(split["val"])
    assert len(train) + len(val) == 40 and not set(train) & set(val) and val
    sample = (train | val)["cats/no_001"]
    assert decode(sample["png"]).shape == (64, 64, 3) and sample["txt"] == b"picture number 1"
    assert json.loads(sample["json"])["captions"] == ["picture number 1"]
    fewer = pack(folder, tmp_path / "fewer", "--val-fraction", "0.2", "--limit", "10")
    assert set(keyed(fewer["train"])) <= set(train)  # a key's split depends on the key alone


def test_packing_is_determined_and_never_overwrites(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(folder, tmp_path / "a", "--crop", "random"), pack(folder, tmp_path / "b", "--crop", "random")
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    pack(folder, tmp_path / "a", "--crop", "random")
    assert "nothing to do" in capsys.readouterr().out
    assert "another packing" in refused(folder, tmp_path / "a").what
    (tmp_path / "b" / "index.json").unlink()  # as a kill before the end leaves it
    (tmp_path / "b" / "train-000009.tar").write_bytes(b"left over")
    pack(folder, tmp_path / "b", "--crop", "random")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == sorted(p.name for p in (tmp_path / "a").iterdir())
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("mine")
    error = refused(folder, tmp_path / "c")
    assert "is not empty" in error.what and error.code == 2 and os.listdir(tmp_path / "c") == ["thesis.txt"]
    assert "is not a folder" in refused(folder, tmp_path / "c" / "thesis.txt").what


def test_flip_and_jpg(folder: Path, tmp_path: Path) -> None:
    train = keyed(pack(folder, tmp_path / "out", "--flip", "--val-fraction", "0", "--resolution", "32")["train"])
    assert len(train) == 80
    one, other = train["dogs/no_000"], train["dogs/no_000~mirrored"]
    assert np.array_equal(decode(one["png"]), np.asarray(ImageOps.mirror(Image.open(io.BytesIO(other["png"])))))
    assert one["txt"] == other["txt"]
    assert decode(keyed(pack(folder, tmp_path / "jpg", "--format", "jpg")["train"])["cats/no_003"]["jpg"]).shape == (
        64,
        64,
        3,
    )


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_metadata_files(folder: Path, tmp_path: Path, form: str) -> None:
    for sidecar in folder.rglob("*.txt"):
        sidecar.unlink()
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    if form == "jsonl":
        rows = [{"file_name": name, "text": [f"a {name}", f"the {name}"], "artist": "me"} for name in names]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    else:
        text = "file_name,text,artist\r\n" + "".join(f'{name},"a {name}",me\r\n' for name in names)
        (folder / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    sample = keyed(pack(folder, tmp_path / "out", "--val-fraction", "0")["train"])["cats/no_001"]
    meta = json.loads(sample["json"])
    assert sample["txt"] == b"a cats/no.001.png" and meta["artist"] == "me"
    assert meta["captions"] == ["a cats/no.001.png", "the cats/no.001.png"][: 2 if form == "jsonl" else 1]


def test_bad_metadata(folder: Path, tmp_path: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}\n')
    assert "gone.png: listed in metadata.jsonl but not there" in refused(folder, tmp_path / "a").what
    (folder / "metadata.jsonl").write_text("{oops\n")
    assert "line 1 is not JSON" in refused(folder, tmp_path / "b").what
    (folder / "metadata.jsonl").write_text('{"text": "x"}\n')
    assert "has no 'file_name'" in refused(folder, tmp_path / "c").what


def test_captions_as_found_in_the_wild(folder: Path, tmp_path: Path) -> None:
    dogs = sorted((folder / "dogs").glob("*.txt"))
    dogs[0].write_bytes(b"\xef\xbb\xbfwith mark\r\n\r\nand a second\r\n")
    dogs[1].write_bytes("sixteen bits".encode("utf-16"))
    dogs[2].write_bytes("émoji 🎈 \0 and  spaces\t".encode())
    read = {
        key: json.loads(value["json"])["captions"]
        for key, value in keyed(pack(folder, tmp_path / "a", "--val-fraction", "0")["train"]).items()
    }
    assert read["dogs/no_000"] == ["with mark", "and a second"]
    assert read["dogs/no_002"] == ["sixteen bits"] and read["dogs/no_004"] == ["émoji 🎈 and spaces"]
    dogs[3].write_bytes("café".encode("latin-1"))
    assert refused(folder, tmp_path / "b").what == "dogs/no_006: caption not UTF-8 (byte 3)"


@pytest.mark.parametrize("text", [None, "", " \r\n\t\n"])
def test_missing_captions(folder: Path, tmp_path: Path, text: str | None) -> None:
    sidecar = folder / "cats" / "no.001.txt"
    sidecar.unlink() if text is None else sidecar.write_text(text)
    error = refused(folder, tmp_path / "a")
    assert error.what == "cats/no_001: no caption" and "--missing-caption" in error.hint and error.code == 3
    none = ["--val-fraction", "0", "--missing-caption"]
    assert keyed(pack(folder, tmp_path / "b", *none, "empty")["train"])["cats/no_001"]["txt"] == b""
    assert keyed(pack(folder, tmp_path / "c", *none, "filename")["train"])["cats/no_001"]["txt"] == b"no 001"
    skipped = pack(folder, tmp_path / "d", "--val-fraction", "0", "--on-bad-data", "skip")["train"]
    left_out = skipped.summary["ledger"]["left out"]
    assert len(skipped) == 39 and left_out == {"no caption": {"count": 1, "first": ["cats/no_001"]}}


def test_broken_pictures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cats = sorted((folder / "cats").glob("*.png"))
    cats[0].write_bytes(cats[0].read_bytes()[:3000])
    assert refused(folder, tmp_path / "a").what.startswith("cats/no_001.png: truncated image (")
    cats[1].write_bytes(b"")
    cats[2].write_bytes(b"words")
    picture(0, (48, 48)).save(cats[3])
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    (folder / "loop").symlink_to(folder)
    (folder / "folder.png").mkdir()
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "lonely.txt").write_text("no picture")
    train = pack(folder, tmp_path / "b", "--val-fraction", "0", "--on-bad-data", "skip")["train"]
    reasons = {reason: found["count"] for reason, found in train.summary["ledger"]["left out"].items()}
    assert reasons == {"truncated image": 1, "empty file": 1, "not an image of a known format": 1, "too small": 1,
                       "unreadable file": 1, "HEIC needs: pip install pillow-heif": 1}  # fmt: skip
    assert train.summary["ledger"]["ignored"] == {
        "caption without image": {"count": 1, "first": ["lonely.txt"]},
        "link to a folder that is read already": {"count": 1, "first": ["loop"]},
    }
    assert "left out 1: truncated image (cats/no_001)" in capsys.readouterr().out
    assert (
        len(pack(folder, tmp_path / "c", "--on-bad-data", "skip", "--upscale", "--val-fraction", "0")["train"])
        == len(train) + 1
    )


def test_same_stems_and_same_pictures(folder: Path, tmp_path: Path) -> None:
    first = folder / "cats" / "no.001.png"
    Image.open(first).save(first.with_suffix(".jpg"))
    (folder / "cats" / "no.999.png").write_bytes(first.read_bytes())
    (folder / "cats" / "no.999.txt").write_text("again")
    train = pack(folder, tmp_path / "out", "--val-fraction", "0")["train"]
    samples = keyed(train)
    assert {"cats/no_001", "cats/no_001_png"} <= set(samples) and samples["cats/no_001_png"][
        "txt"
    ] == b"picture number 1"
    assert train.summary["ledger"]["replaced"]["same name as another picture"]["count"] == 1
    twice = train.summary["ledger"]["ignored"]["same picture twice, both packed"]
    assert twice["first"] == ["cats/no_999"]


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no images in this folder" in refused(tmp_path / "empty", tmp_path / "a").what
    assert "no such folder" in refused(tmp_path / "gone", tmp_path / "b").what
    (tmp_path / "empty" / "00000.tar").write_bytes(b"")
    assert f"'{tmp_path / 'empty'}/*.tar'" in refused(tmp_path / "empty", tmp_path / "a").hint
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_one_picture_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    picture(0).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.txt").write_text("one")
    assert len(pack(tmp_path / "in", tmp_path / "out")["train"]) == 1
    assert "no validation pictures" in capsys.readouterr().out


def test_tars(tmp_path: Path) -> None:
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{number:05d}.tar")) as tar:
            for i in range(5):
                meta = {"url": "http://x", "caption": "from json"}
                sample = {"__key__": f"{number:05d}{i:04d}", "jpg": np.asarray(picture(i)), "json": meta}
                tar.write(sample if i == 4 else {**sample, "txt": f"words {i}"})
    train = keyed(pack(tmp_path / "{00000..00001}.tar", tmp_path / "out", "--val-fraction", "0")["train"])
    assert len(train) == 10 and train["000010003"]["txt"] == b"words 3" and train["000010004"]["txt"] == b"from json"
    assert json.loads(train["000000000"]["json"]) == {"url": "http://x", "captions": ["words 0"]}
    again = keyed(pack(tmp_path / "out" / "train-*.tar", tmp_path / "again", "--val-fraction", "0.5")["train"])
    assert again == train  # ours are a source too; their split is kept
    assert "no shards match" in refused(tmp_path / "{00007..00008}.tar", tmp_path / "x").what
    assert "only local files" in refused("pipe:curl http://x/{0..1}.tar", tmp_path / "x").what


def test_braces() -> None:
    assert braces("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert braces("{a,b}-{1..2}") == ["a-1", "a-2", "b-1", "b-2"]


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_fashion_mnist(tmp_path: Path) -> None:
    root, rng = tmp_path / "idx", np.random.default_rng(0)
    root.mkdir()
    for stem, count in (("train", 30), ("t10k", 20)):
        (root / f"{stem}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(idx(rng.integers(1, 256, (count, 28, 28), dtype=np.uint8)))
        )
        (root / f"{stem}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))
    split = pack("fashion-mnist", tmp_path / "out", "--root", str(root))
    assert (len(split["train"]), len(split["val"])) == (30, 20)
    said = [split["val"].read_field(i, "txt").decode() for i in range(10)]
    assert said[0] == "a photo of a t-shirt" and said[9] == "a photo of an ankle boot"
    assert said[1:9] == [f"a photo of a {name}" for name in FashionMnist.CLASSES[1:9]]
    image = decode(split["train"].read_field(3, "png"))
    assert (
        image.shape == (32, 32, 3) and (image[2:30, 2:30] > 0).all() and not image[:2].any() and not image[:, 30:].any()
    )
    assert json.loads(split["train"].read_field(13, "json"))["label"] == 3
    (root / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0")
    assert "damaged" in refused("fashion-mnist", tmp_path / "bad", "--root", str(root)).what


def test_fashion_mnist_is_downloaded_where_torchvision_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import mnist

    rng, fetched = np.random.default_rng(0), []

    def fetch(url: str, download_root: str, filename: str, md5: str) -> None:
        """What torchvision's own function leaves: the archive and what was in it."""
        fetched.append(url)
        name = filename.removesuffix(".gz")
        count = 30 if name.startswith("train") else 20
        pictures = rng.integers(1, 256, (count, 28, 28), dtype=np.uint8)
        data = idx(pictures if "images" in name else np.arange(count, dtype=np.uint8) % 10)
        (Path(download_root) / name).write_bytes(data)
        (Path(download_root) / filename).write_bytes(gzip.compress(data))

    monkeypatch.setattr(mnist, "download_and_extract_archive", fetch)
    for _ in range(2):  # the second finds them
        split = pack("fashion-mnist", tmp_path / "out", "--root", str(tmp_path / "root"))
        assert (len(split["train"]), len(split["val"])) == (30, 20) and len(fetched) == 4
    assert split["val"].read_field(9, "txt") == b"a photo of an ankle boot"

    def unreachable(url: str, **_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(mnist, "download_and_extract_archive", unreachable)
    error = refused("fashion-mnist", tmp_path / "none", "--root", str(tmp_path / "empty"))
    assert error.code == 3 and "could not be downloaded" in error.what and "--root FOLDER" in error.hint
    pack("fashion-mnist", tmp_path / "found", "--root", str(tmp_path / "root"))  # the hint, followed


def test_shapes(tmp_path: Path) -> None:
    split = pack("shapes", tmp_path / "out", "--samples", "120", "--val-fraction", "0.25", "--samples-per-shard", "50")
    assert (len(split["train"]), len(split["val"]), len(split["train"].shards)) == (120, 30, 3)
    pictures = set()
    for shards in split.values():
        for i in range(len(shards)):
            sample = shards.read(i)
            captions = json.loads(sample["json"])["captions"]
            assert captions[0].encode() == sample["txt"] and len(set(captions)) == 4
            assert all(check(decode(sample["png"]), captions[0]).values())
            assert not any(
                (item.colour, item.shape) in HELD_OUT for caption in captions for item in parse(caption).objects
            )
            pictures.add(sample["png"])
    assert len(pictures) == 150
    assert "--flip" in refused("shapes", tmp_path / "x", "--flip").what


@pytest.mark.parametrize(
    "flags", [["--val-fraction", "1"], ["--resolution", "0"], ["--limit", "0"], ["--background", "no colour"]]
)
def test_bad_settings(folder: Path, tmp_path: Path, flags: list[str]) -> None:
    error = refused(folder, tmp_path / "out", *flags)
    assert (error.code == 2 and error.what.startswith(flags[0])) or "--limit" in error.what


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = {"PYTHONPATH": str(SCRIPT.parents[1])}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=os.environ | path | environment
    )


def test_the_script(folder: Path, tmp_path: Path) -> None:
    assert run("--help").returncode == 0
    done = run("pack", str(folder), "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    sound = run("verify", str(tmp_path / "out"))
    assert sound.returncode == 0 and "all sound" in sound.stdout
    tar = tmp_path / "out" / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    broken = run("verify", str(tmp_path / "out"))
    assert broken.returncode == 3 and broken.stderr.startswith("error: ") and "Traceback" not in broken.stderr
    assert run("pack", str(tmp_path / "nowhere"), "--output", str(tmp_path / "o")).returncode == 3


def test_packing_imports_no_heavy_library() -> None:
    code = "import sys, training.doors.make_shards\nprint([m for m in ('torch', 'webdataset') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parents[1])
    assert printed.stdout.strip() == "[]", printed.stderr
