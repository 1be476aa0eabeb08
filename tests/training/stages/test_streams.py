"""Training from a stream: both stages run, count by steps, leave out what cannot be read, and can be resumed."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(40 * shard, 40 * shard + 40):
                buffer = io.BytesIO()
                pixels = np.random.default_rng(number).integers(0, 256, (36, 44, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(buffer, "PNG")
                data = b"no picture" if number == 50 else buffer.getvalue()
                member = tarfile.TarInfo(f"{number:04d}.png")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


def words(photos: Path, output: Path, *more: str) -> list[str]:
    few = ["--batch-size", "8", "--train.validation_size", "4", "--shuffle-buffer", "16"]
    return [*tiny.AUTOENCODER, "--data", f"{photos}/{{0..2}}.tar", "--stream", "--output", str(output), *few, *more]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_autoencoder_learns_from_a_stream(
    photos: Path, tmp_path: Path, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--resolution", "32", "--train.num_workers", workers]
    assert tiny.call("train_autoencoder", *words(photos, tmp_path / "run", *flags)) == 0
    rows = [row for row in tiny.rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and all(np.isfinite(row["loss"]) for row in rows)
    said = capsys.readouterr().err
    assert "a stream of images" in said and "4 pictures are held out" in said and "a resumed run reads others" in said
    assert "step-00000006" in {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    more = words(photos, tmp_path / "run", *flags, "--resume", "auto", "--max-steps", "8")
    assert tiny.call("train_autoencoder", *more) == 0
    assert [row["step"] for row in tiny.rows(tmp_path / "run") if "loss" in row] == list(range(1, 9))


def test_a_denoiser_learns_from_streamed_latents(latents: Path, tmp_path: Path) -> None:
    flags = ["--latents", str(latents), "--stream", "--output", str(tmp_path / "run"), "--shuffle-buffer", "16"]
    assert tiny.call("train_denoiser", *tiny.DENOISER, *flags) == 0
    assert [row["step"] for row in tiny.rows(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_what_a_stream_is_refused_for(photos: Path, tmp_path: Path) -> None:
    error = tiny.refused("train_autoencoder", *words(photos, tmp_path / "run"))
    assert error.what == "--resolution is missing" and "--resolution 64" in error.hint
    packed = [*tiny.AUTOENCODER, "--data", str(photos), "--output", str(tmp_path / "run"), "--resolution", "32"]
    assert "for --stream alone" in tiny.refused("train_autoencoder", *packed).what
    strict = ["--resolution", "32", "--on-bad-data", "error", "--max-steps", "30"]
    error = tiny.refused("train_autoencoder", *words(photos, tmp_path / "strict", *strict))
    assert error.code == 3 and "not a readable picture" in error.what and "0050" in error.what
    assert not (tmp_path / "run").exists()


def test_a_stream_of_no_pictures_ends_and_broken_tars_are_told(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("0.tar", "1.tar", "2.tar"):
        data = (photos / name).read_bytes()
        (tmp_path / "photos" / name).write_bytes(data[: len(data) // 2] if name == "2.tar" else data)
    flags = ["--resolution", "32", "--max-steps", "20"]
    assert tiny.call("train_autoencoder", *words(tmp_path / "photos", tmp_path / "run", *flags)) == 0
    assert "2.tar: cannot be read to its end (unexpected end of data)" in capsys.readouterr().err
    ledger = json.loads((tmp_path / "run" / "run.json").read_text())["ledger"]["replaced"]
    assert next(iter(ledger.values()))["count"] >= 2  # the broken tar, and the sample that is no picture
    with tarfile.open(tmp_path / "photos" / "0.tar", "w") as tar:
        for number in range(60):
            member = tarfile.TarInfo(f"{number:04d}.png")
            member.size = 4
            tar.addfile(member, io.BytesIO(b"text"))
    names = ["--data", str(tmp_path / "photos" / "0.tar")]
    error = tiny.refused("train_autoencoder", *words(photos, tmp_path / "none", *flags), *names)
    assert error.code == 3 and "not a" in error.what
