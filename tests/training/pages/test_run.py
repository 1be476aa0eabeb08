"""The page of one run: its numbers, what is missing named, and every text of a file as text."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from pathlib import Path

import numpy as np
from PIL import Image
from run_folders import CONFIG, run_folder, write_lines

from training.pages import run, shown
from training.pages.record import read
from training.pages.writing import one

SCRIPT = "<script>alert(1)</script>"


def page(folder: Path) -> str:
    return one(folder).decode()


def text(html: str) -> str:
    """What a reader sees of HTML, in one line."""
    return " ".join(re.sub("<[^>]*>", " ", html).split())


def test_cost_by_the_arithmetic(tmp_path: Path) -> None:
    """20 steps of 4 images at 8 a second are 10 s, half of them waiting; 20 at 2 a second 40 s: 50 s in all."""
    found = run.cost(read(run_folder(tmp_path / "run", outlook={"samples": 64})))
    assert found == {
        "steps": "40", "images": "160", "epochs": "2.5 of 64 samples",
        "wall time": "50 s", "processor time": "30 s", "speed": "3.2 images/s",
        "waiting for data": "10.0%", "peak memory": "2.00 GiB",
    }  # fmt: skip


def test_the_parts_of_a_finished_run(tmp_path: Path) -> None:
    hashes = {"data": {"index_sha256": "d" * 64}, "hashes": {"encoder": "e" * 64}, "model": "f" * 64}
    ledger = {"cut": {"caption longer than 8 words": {"count": 3, "first": ["cat", "dog"]}}}
    found = page(run_folder(tmp_path / "run", ledger=ledger, **hashes))
    seen = text(found)
    assert "run: finished at step 40 of 40" in found
    assert "Denoiser of latents (stage two): backbone unet, prediction velocity, batch 4, seed 3." in seen
    assert all(value in found for value in ("d" * 64, "e" * 64, "f" * 64, "2.14.1", "50 s"))
    assert "cut 3: caption longer than 8 words (cat, dog …)" in seen
    assert "what the network predicts (velocity)" in seen
    assert "python -m training train-denoiser --config RUN/config.json --latents LATENTS --output NEW" in seen
    assert f"no folder beside the run holds an index.json of the hash {'d' * 64}" in seen
    # The validation against the noise level: a line for the first, the middle and the last.
    plots = map(json.loads, re.findall(r'application/json">(.*?)</script>', found))
    (profile,) = (plot for plot in plots if plot["across"] == "t")
    assert [line["name"] for line in profile["lines"]] == ["step 0", "step 20", "step 40"]
    assert profile["lines"][0]["points"] == [[0.1, 1.1], [0.5, 1.5], [0.9, 1.9]]


def test_a_student_is_told_by_what_it_is(tmp_path: Path) -> None:
    """Its loss is of jumps, and its commands name a teacher; those of an adapter name its base."""
    config = {**CONFIG, "objective": {"kind": "progressive"}}
    folder = run_folder(tmp_path / "run", config=config, teacher={"denoiser": "a" * 64, "text_encoder": "b" * 64})
    seen = text(page(folder))
    assert "objective progressive" in seen and f"distilled from the denoiser {'a' * 12}." in seen
    assert "this few-step model (progressive) lands in one jump" in seen and "what the network predicts" not in seen
    command = "python -m training distill-denoiser --config RUN/config.json --latents LATENTS --teacher TEACHER"
    assert f"{command} --output NEW" in seen and f"{command} --output RUN --resume auto" in seen
    alone = text(page(run_folder(tmp_path / "alone", config=config)))
    assert "python -m training train-denoiser --config" in alone and "TEACHER" not in alone
    adapter = text(page(run_folder(tmp_path / "adapter", base={"denoiser": "c" * 64})))
    assert "python -m training train-denoiser --config RUN/config.json --latents LATENTS --base BASE" in adapter
    plain = {**CONFIG, "objective": {"kind": "denoising"}}
    assert "what the network predicts (velocity)" in text(page(run_folder(tmp_path / "plain", config=plain)))


def test_pictures_are_in_the_page_byte_for_byte_the_last_one_shown(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    frames = re.findall(r'<img (hidden )?alt="samples, step (\d+)".*?base64,([^"]*)"', page(folder))
    assert [(hidden, step) for hidden, step, _ in frames] == [("hidden ", "0"), ("hidden ", "20"), ("", "40")]
    files = [(folder / "samples" / f"step-{int(step):08d}" / "grid.png").read_bytes() for _, step, _ in frames]
    assert [b64decode(data) for *_, data in frames] == files


def test_texts_of_files_stay_texts(tmp_path: Path) -> None:
    config = {**CONFIG, "text": {"kind": SCRIPT, "name": "/home/ann/encoders/clip"}}
    ledger = {"left out": {SCRIPT: {"count": 1, "first": ["/home/ann/pictures/" + SCRIPT]}}}
    folder = run_folder(tmp_path / SCRIPT.replace("/", ""), config=config, ledger=ledger)
    write_lines(folder / "metrics.jsonl", [{"step": 1, SCRIPT: 1.0, "loss": 2.0}])
    found = page(folder)
    assert found.count("<script>") == 1 and "alert(1)" not in found.rpartition("<script>")[2]
    assert "captions of these pictures" in found and "&lt;script&gt;alert(1)" in found
    assert "/home" not in found and str(tmp_path) not in found and "clip" in found


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    """A running run before its first validation, cut off in its last line, and with a loss that is no number."""
    folder = run_folder(tmp_path / "run", status="training", ledger={"ignored": "what"})
    for file in folder.glob("samples/*/grid.png"):
        file.unlink()
    (folder / "timing.jsonl").unlink()
    (folder / "metrics.jsonl").write_text('{"step": 7, "loss": null, "loss_is": "nan", "lr": 0.1}\n{"step": 8, "lo')
    seen = text(page(folder))
    for told in (
        "left without an end at step 40 of 40", "the same command with --resume auto goes on",
        "There is no final/ model yet", "metrics.jsonl: 1 damaged line(s) left out",
        "loss: 1 value(s) that are no finite numbers, the first nan at step 7",
        "There are no pictures: samples/ holds no grid.png", "There is no validation by noise level",
        "There is nothing of the cost", "the ledger cannot be read", "its hash is not known",
    ):  # fmt: skip
        assert told in seen, told


def test_nobody_says_that_all_was_used_before_the_end(tmp_path: Path) -> None:
    seen = {status: text(page(run_folder(tmp_path / status, status=status))) for status in ("training", "finished")}
    assert "Everything was used as it was given" in seen["finished"]
    assert "Everything" not in seen["training"] and "written down where a training ends" in seen["training"]
    cut = {"cut": {"captions": {"count": 2, "first": []}}}
    assert "So far: cut 2: captions" in text(page(run_folder(tmp_path / "on", status="training", ledger=cut)))


def test_an_exported_model_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "ingredients.json").write_text(json.dumps({"denoiser": "a" * 64}))
    seen = text(page(tmp_path))
    assert "a model without the run that trained it" in seen and "nothing of its training" in seen
    assert "There are no curves" in seen and "Unknown: run.json is not in this folder" in seen and "a" * 64 in seen


def test_of_many_pictures_some_are_left_out_and_counted(tmp_path: Path) -> None:
    for step in range(60):
        (tmp_path / f"{step}.png").write_bytes(b"no picture")
    pictures = {f"step {step}": tmp_path / f"{step}.png" for step in range(60)}
    assert shown.chosen(list(pictures)) == [f"step {i * 59 // 23}" for i in range(24)]
    told = text("".join(shown.slider(pictures, "samples")))
    assert "36 of 60 are left out here" in told and "samples, step 59: the picture cannot be read" in told


def test_a_page_stays_small_however_many_and_large_its_pictures(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    noise = np.random.default_rng(0).integers(0, 256, (360, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    for step in range(30):
        home = folder / "samples" / f"step-{step:08d}"
        home.mkdir(exist_ok=True)
        (home / "grid.png").write_bytes((tmp_path / "noise.png").read_bytes())
    names = [f"loss_{n}" for n in range(40)]
    write_lines(folder / "metrics.jsonl", [{"step": n, **dict.fromkeys(names, n + 0.123456)} for n in range(3000)])
    found = one(folder)
    assert 3_000_000 < len(found) < 8_000_000
    assert "are left out here" in text(found.decode())


def test_a_large_picture_is_made_to_fit_and_that_is_said(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "grid.png")
    found = shown.shown(tmp_path / "grid.png")
    assert len(b64decode(found.source.partition(",")[2])) <= shown.LARGEST
    assert found.size == (1600, 1200) and found.share in (0.5, 0.25)
    told = text("".join(shown.slider({"step 0": tmp_path / "grid.png"}, "samples")))
    assert "1 of these are JPEG here, 1 of them in fewer pixels" in told
