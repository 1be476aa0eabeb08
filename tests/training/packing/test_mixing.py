"""Shards hold all kinds of samples: in an order that is a function of seed and keys, whatever the source's order and
the number of processes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from training.data.order import DataOrder
from training.doors.make_shards import main
from training.errors import UserError
from training.packing import workers
from training.packing.mixing import MixingWriter
from training.packing.problems import LOOKED_ON, MOST_PROBLEMS, Problems
from training.packing.settings import Settings, as_stored
from training.pictures.decoding import encode_png
from training.shards.index import write_index
from training.shards.reading import ShardSet
from training.shards.verifying import verify

CLASSES, EACH, WINDOW = 20, 24, 16


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty folders of pictures, each captioned with its folder's name."""
    root = tmp_path_factory.mktemp("classes")
    for number in range(CLASSES):
        folder = root / f"class{number:02d}"
        folder.mkdir()
        for i in range(EACH):
            (folder / f"{i:03d}.png").write_bytes(encode_png(np.full((8, 8, 3), (number, i, 7), np.uint8)))
            (folder / f"{i:03d}.txt").write_text(folder.name)
    return root


def words(source: Path, output: Path, *flags: object) -> list[str]:
    small = ("--resolution", 8, "--val-fraction", 0, "--samples-per-shard", 4)
    return ["pack", str(source), "--output", str(output), *map(str, (*small, *flags))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_windows(folder: Path) -> list[int]:
    """How many classes the samples of each window of the first epoch have."""
    shards = ShardSet(folder)
    counts = tuple(info.samples for info in shards.shards)
    order = DataOrder(len(shards), 1, 0, shards=counts, window=WINDOW)
    size = 4 * WINDOW
    kinds = [shards.read_field(order.at(place, 0, 1)[0].index, "txt") for place in range(len(shards))]
    return [len(set(kinds[at : at + size])) for at in range(0, len(kinds) - size + 1, size)]


def test_a_window_of_shards_holds_all_classes(classes: Path, tmp_path: Path) -> None:
    main(words(classes, tmp_path / "source", "--order", "source"))
    main(words(classes, tmp_path / "mixed"))
    before, after = in_windows(tmp_path / "source"), in_windows(tmp_path / "mixed")
    assert len(before) == len(after) == 7
    assert max(before) < 16 and np.mean(before) < 13.5  # of 20: a shard holds one class
    assert min(after) >= 16 and np.mean(after) > 18.5
    assert ShardSet(tmp_path / "source").summary["order"] == "source"
    assert ShardSet(tmp_path / "mixed").summary["order"] == "mixed"
    sets = [ShardSet(tmp_path / name) for name in ("source", "mixed")]
    every = [{shards.key(i): shards.read(i) for i in range(len(shards))} for shards in sets]
    assert every[0] == every[1] and len(every[0]) == CLASSES * EACH and verify(tmp_path / "mixed").problems == ()


def test_the_order_is_that_of_seed_and_keys(tmp_path: Path) -> None:
    """Whatever order the samples come in; another seed, another order; no file is left between."""
    keys = [f"{i:03d}" for i in range(300)]
    orders = []
    for name, seed, given in (("a", 0, keys), ("b", 0, keys[::-1]), ("c", 1, keys)):
        (tmp_path / name).mkdir()
        writer = MixingWriter(tmp_path / name, "train", 10, seed)
        for key in given:
            writer.add(key, {"txt": key.encode(), "png": key.encode() * 9})
        infos = writer.finish()
        writer.close()
        assert [info.samples for info in infos] == [10] * 30
        assert not list((tmp_path / name).glob(".*"))
        write_index(tmp_path / name, infos, {})
        shards = ShardSet(tmp_path / name)
        orders.append([shards.key(i) for i in range(300)])
        for i, key in enumerate(orders[-1]):
            assert shards.read(i) == {"txt": key.encode(), "png": key.encode() * 9}
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2]) == keys
    drift = np.corrcoef(np.arange(300), [int(key) for key in orders[0]])[0, 1]
    assert abs(drift) < 0.2


def test_what_fits_into_one_shard_keeps_its_order(tmp_path: Path) -> None:
    writer = MixingWriter(tmp_path, "train", 300, 0)
    for i in range(300):
        writer.add(f"{i:03d}", {"txt": b""})
    (info,) = writer.finish()
    assert not list(tmp_path.glob(".*")) and info.samples == 300
    index = np.load(tmp_path / "train-000000.index.npy")
    assert index["key"].tolist() == [f"{i:03d}".encode() for i in range(300)]


def test_processes_change_nothing(classes: Path, tmp_path: Path) -> None:
    """Nor do bad pictures among them: told alike, in the source's order."""
    bad = classes / "class03" / "bad.png"
    bad.write_bytes(b"nothing")
    try:
        said = []
        for number in (0, 1, 3):
            flags = ("--num-workers", number)
            with pytest.raises(UserError) as caught:
                main(words(classes, tmp_path / "refused", *flags))
            said.append(str(caught.value))
            main(words(classes, tmp_path / str(number), *flags, "--on-bad-data", "skip", "--flip"))
        assert said[0] == said[1] == said[2] and "class03/bad.png: not an image" in said[0]
        assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "3")
    finally:
        bad.unlink()
    with pytest.raises(UserError, match="--num-workers: must be >= 0"):
        main(words(classes, tmp_path / "x", "--num-workers", -1))


def test_a_process_that_dies_is_one_sentence(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(workers, "_picture", killed)  # they are forked
    with pytest.raises(UserError, match="a process that packs pictures was lost") as caught:
        main(words(classes, tmp_path / "out", "--num-workers", 2))
    assert caught.value.code == 1 and "--num-workers" in caught.value.hint
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["packing.json"]
    monkeypatch.undo()
    main(words(classes, tmp_path / "out"))  # as the hint says
    assert verify(tmp_path / "out").problems == ()


SLOW = """
import runpy, sys, time
from training.packing import workers
made = workers._picture
workers._picture = lambda *given: time.sleep(0.05) or made(*given)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("number", [0, 2])
def test_ctrl_c_leaves_no_process_and_no_traceback(classes: Path, tmp_path: Path, number: int) -> None:
    script = str(tiny.SCRIPTS / "make_shards.py")
    command = [sys.executable, "-c", SLOW, script, *words(classes, tmp_path / "out", "--num-workers", number)]
    with tiny.heard(signal.SIGINT):
        run = subprocess.Popen(command, env=tiny.ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "out" / "packing.json").exists():
        time.sleep(0.01)
    time.sleep(1)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all of them
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and said == ""
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["packing.json"]


def test_an_older_packing_is_still_packed(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(words(classes, tmp_path / "out", "--order", "source"))
    mark = tmp_path / "out" / "packing.json"
    packing = json.loads(mark.read_text())
    del packing["settings"]["order"]  # as every packing was before there was a choice
    mark.write_text(json.dumps(packing))
    before = contents(tmp_path / "out")
    main(words(classes, tmp_path / "out"))
    said = capsys.readouterr()
    assert "nothing to do" in said.out and "in the order of its source" in said.err
    assert "captions and splits by its rules" in said.err and "another --output" in said.err
    assert contents(tmp_path / "out") == before
    assert as_stored({"resolution": 32})["order"] == "source" and Settings().order == "mixed"
    main(words(classes, tmp_path / "new"))
    with pytest.raises(UserError, match="another packing"):
        main(words(classes, tmp_path / "new", "--order", "source"))


def test_the_contact_sheet(classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(words(classes, tmp_path / "out"))
    sheet = tmp_path / "out" / "contact-sheet.png"
    assert str(sheet) in capsys.readouterr().out
    pixels = np.asarray(Image.open(io.BytesIO(sheet.read_bytes())).convert("RGB")).reshape(-1, 3)
    shown = {tuple(colour) for colour in np.unique(pixels, axis=0).tolist() if colour[2] == 7}
    assert len(shown) == 64 and len({colour[0] for colour in shown}) > CLASSES / 2
    sheet.unlink()
    main(words(classes, tmp_path / "out"))
    assert "nothing to do" in capsys.readouterr().out and verify(tmp_path / "out").problems == ()


def test_several_problems_are_told_at_once(classes: Path, tmp_path: Path) -> None:
    gone = [classes / f"class{number:02d}" / "003.txt" for number in (2, 5, 11)]
    try:
        for path in gone:
            path.unlink()
        with pytest.raises(UserError, match="3 samples cannot be used") as caught:
            main(words(classes, tmp_path / "out"))
        assert all(f"class{number:02d}/003: no caption" in caught.value.what for number in (2, 5, 11))
        assert "--missing-caption" in caught.value.hint and not list((tmp_path / "out").glob("*.tar"))
        main(words(classes, tmp_path / "out", "--missing-caption", "empty"))  # as the hint says
    finally:
        for path in gone:
            path.write_text(path.parent.name)


def test_problems_are_looked_for_within_bounds() -> None:
    problems = Problems()
    assert not any(problems.enough() for _ in range(2 * LOOKED_ON))  # without any
    problems.add("a", "bad", "")
    assert [problems.enough() for _ in range(LOOKED_ON + 1)].index(True) == LOOKED_ON
    with pytest.raises(UserError, match="^error: a: bad\n"):
        problems.refuse()
    many = Problems()
    for number in range(MOST_PROBLEMS):
        assert not many.enough()
        many.add(str(number), "bad", "")
    assert many.enough()
    with pytest.raises(UserError, match=f"at least {MOST_PROBLEMS} samples"):
        many.refuse()


def test_problems_of_several_kinds_are_told_with_the_hint_of_each() -> None:
    problems = Problems()
    for name, hint in {"a": "--upscale enlarges it", "b": "", "c": "--upscale enlarges it", "d": "cut it"}.items():
        problems.add(name, "bad", hint)
    with pytest.raises(UserError) as caught:
        problems.refuse()
    skip = "--on-bad-data skip leaves such samples out and counts them"
    assert caught.value.hint == f"--upscale enlarges it; or cut it; or {skip}"


def test_only_a_test_split_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], classes: Path) -> None:
    main(words(classes, tmp_path / "out"))
    (tmp_path / "tars").mkdir()
    for path in (tmp_path / "out").glob("train-00000?.tar"):
        path.rename(tmp_path / "tars" / path.name.replace("train", "test"))
    capsys.readouterr()
    main(words(tmp_path / "tars" / "*.tar", tmp_path / "again"))
    assert "warning: no training pictures came out (40 test)" in capsys.readouterr().err
