"""What the recipes end with, from made-up runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny


def write(path: Path, *rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))


def test_the_quickstart_ends_with_a_score_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {"obedience_1": 0.815, "obedience_2": 0.1, "obedience_3": 0.01, "prompts": 600, "kernel": 3.0}
    write(tmp_path / "evaluation.json", numbers)
    assert tiny.call("summarize", "quickstart", tmp_path, "--seconds", 678) == 0
    assert capsys.readouterr().out.splitlines() == [
        "captions never trained on, obeyed in shape, colour and position: 81.5% of one-object captions"
        " (two objects 10.0%, three 1.0%), 678 s in all",
        f"picture grid: {tmp_path / 'grid.png'}",
    ]
    objects = {"1_objects": 0.815, "2_objects": 0.1, "3_objects": 0.01}
    expected = {"obedience": 0.815, "obedience_by_objects": objects, "prompts": 600, "seconds": 678, "grid": "grid.png"}
    assert (tmp_path / "summary.json").read_text() == json.dumps(expected, indent=1) + "\n"


def inspected(home: Path, psnr: float, rings: list[float]) -> None:
    means = {"psnr": {"mean": psnr}, "ssim": {"mean": 0.8765}, "lpips": {"mean": 0.1234}}
    probe = {"loss": 0.5, "frechet_reconstructed": 1.234, "frechet": 2.345}
    moved = {"half the size": {"mean": 1.5}, "turned by a quarter": {"mean": 0.25}}
    told = {"reconstruction": means, "probe": probe, "equivariance_error": moved, "spectrum": {"latents": rings}}
    write(home / "inspection" / "inspection.json", told)
    write(home / "timing.jsonl", *({"images_per_second": rate} for rate in (10.0, 30.4, 90.0)))


def runs(folder: Path) -> None:
    inspected(folder / "f-kl-f4", 25.444, [3.0, 1.0, 1.0, 3.0])
    inspected(folder / "f-equivariance", 24.0, [9.0, 1.0])
    inspected(folder / "f-spectral", 23.0, [1.0, 0.0])
    write(folder / "f-kl-f4" / "denoiser.json", {"frechet_generated": 1.277})
    for kind, steps in (("held-back", (400, 800)), ("hard", (400,))):
        rows = [{"step": step, "val/psnr": 24.0 + step / 800, "val/lpips": 0.25} for step in steps]
        write(folder / f"f-start-{kind}" / "metrics.jsonl", {"step": 1, "loss": 2.0}, *rows)


def test_autoencoders_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs(tmp_path)
    assert tiny.call("summarize", "autoencoders", tmp_path) == 0
    tables = [table.splitlines() for table in capsys.readouterr().out.split("\n\n")]
    assert [len(table[0].split("|")) - 2 for table in tables] == [9, 4, 3]
    assert [len(table[1].split("|")) - 2 for table in tables] == [9, 4, 3]
    assert [table[2:] for table in tables] == [
        ["| f-equivariance | 24.00 | 0.876 | 0.123 | 30 | 0.500 | 1.23 | 2.35 |  |",
         "| f-kl-f4 | 25.44 | 0.876 | 0.123 | 30 | 0.500 | 1.23 | 2.35 | 1.28 |",
         "| f-spectral | 23.00 | 0.876 | 0.123 | 30 | 0.500 | 1.23 | 2.35 |  |"],
        ["| f-kl-f4 | 1.500 | 0.250 | 50.0% |",
         "| f-equivariance | 1.500 | 0.250 | 10.0% |",
         "| f-spectral | 1.500 | 0.250 | 0.0% |"],
        ["| 400 | 24.50 (0.250) | 24.50 (0.250) |", "| 800 | 25.00 (0.250) |  |"],
    ]  # fmt: skip


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    assert "evaluation.json" in tiny.refused("summarize", "quickstart", tmp_path).what
    assert "*-start-hard" in tiny.refused("summarize", "autoencoders", tmp_path).what
    runs(tmp_path)
    (tmp_path / "f-kl-f4" / "timing.jsonl").unlink()
    assert "timing.jsonl" in tiny.refused("summarize", "autoencoders", tmp_path).what
