"""Several runs beside each other: what differs, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from run_folders import CONFIG, run_folder

from training.pages import comparison
from training.pages.record import Record, read


def rows(parts: list[str]) -> list[list[str]]:
    """The cells of every table row."""
    return [re.findall(r"<td>([^<]*)</td>", line) for line in "".join(parts).split("<tr>") if "<td>" in line]


def test_only_the_keys_that_differ(tmp_path: Path) -> None:
    other = {**CONFIG, "backbone": {"kind": "dit", "width": 8, "patch": 2}, "train": {**CONFIG["train"], "seed": 4}}
    records = [read(run_folder(tmp_path / "a")), read(run_folder(tmp_path / "b", config=other))]
    assert rows(comparison.differences(records)) == [
        ["backbone.kind", "&quot;unet&quot;", "&quot;dit&quot;"],
        ["train.seed", "3", "4"],
        ["backbone.patch", "–", "2"],
    ]
    assert "the configs are the same" in comparison.differences([records[0], records[0]])[0]


def test_last_numbers_side_by_side(tmp_path: Path) -> None:
    first, second = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    (second / "metrics.jsonl").write_text('{"step": 5, "loss": 0.25}\n')
    found = {name: told for name, *told in rows(comparison.numbers([read(first), read(second)]))}
    assert found["loss"] == ["2.025 (step 40)", "0.25 (step 5)"] and found["val/loss"] == ["1.25 (step 40)", "–"]


def test_the_last_pictures_and_what_is_missing(tmp_path: Path) -> None:
    first, second = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    for file in second.glob("samples/*/grid.png"):
        file.unlink()
    records = [read(first), read(second)]
    assert re.findall(r'alt="([^"]*)"', "".join(comparison.pictures(records))) == ["a, step 40"]
    assert "<li>b: no pictures.</li>" in comparison.absences(records)[0]


def test_it_is_said_where_losses_are_not_comparable(tmp_path: Path) -> None:
    def named(name: str, data: str, autoencoder: str, kind: str = "velocity") -> Record:
        config = {**CONFIG, "prediction": {"kind": kind}}
        facts = {"data": {"index_sha256": data}, "hashes": {"autoencoder": autoencoder}}
        return read(run_folder(tmp_path / name, config=config, **facts))

    same = [named("a", "1", "x"), named("b", "1", "x")]
    assert comparison.lead(same) == ""
    assert re.findall("different (.*?):", comparison.lead([*same, named("c", "1", "y")])) == ["autoencoders"]
    told = comparison.lead([*same, named("d", "2", "x", "eps")])
    assert re.findall("different (.*?):", told) == ["data", "predictions"]
    student = read(run_folder(tmp_path / "e", config={**CONFIG, "objective": {"kind": "progressive"}}))
    denoiser = read(run_folder(tmp_path / "f", config={**CONFIG, "objective": {"kind": "denoising"}}))
    assert re.findall("different (.*?):", comparison.lead([student, denoiser])) == ["objectives"]
    assert comparison.lead([denoiser, read(run_folder(tmp_path / "g"))]) == ""


def test_names_tell_runs_apart_without_telling_whose_they_are() -> None:
    def names(*folders: str) -> list[str]:
        return comparison.names([Path(folder) for folder in folders])

    assert names("/x/runs/a", "/x/runs/b") == ["a", "b"]
    assert names("/x/runs/shapes/dit", "/x/runs/fashion/dit") == ["shapes/dit", "fashion/dit"]
    assert names("/home/ann/dit", "/home/bob/dit") == ["dit (1)", "dit (2)"]
    assert names("/x/runs/a", "/x/runs/a") == ["a (1)", "a (2)"]
