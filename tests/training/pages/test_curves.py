"""Points of curves: what a group of steps becomes, which numbers share axes, and that none is lost or renamed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from run_folders import loss, run_folder

from training.pages import curves
from training.pages.record import read


def plots(parts: list[str]) -> dict[str, dict[str, Any]]:
    """The data of each figure by its heading."""
    found = re.findall(r"<h3>(.*?)</h3>.*?<script type=\"application/json\">(.*?)</script>", "".join(parts))
    return {title: json.loads(data) for title, data in found}


def test_few_points_stay_as_they_are() -> None:
    assert curves.thinned([(1, 0.5), (2, 1.0)], 2) == [[1, 0.5], [2, 1.0]]


def test_many_become_means_with_their_extremes() -> None:
    points = [(n, float(n * n)) for n in range(1, 8)]  # of 7 points in 3 groups: 2, 2 and 3
    assert curves.thinned(points, 3) == [[2, 2.5, 1, 4], [4, 12.5, 9, 16], [7, 36.667, 25, 49]]


def test_the_numbers_of_a_run_are_in_its_plots(tmp_path: Path) -> None:
    found = plots(curves.of_one(read(run_folder(tmp_path / "run"))))
    assert list(found) == ["Training loss", "Validation loss", "Validation loss by noise level", "Gradient norms",
                           "Learning rate", "Speed", "Waiting for data"]  # fmt: skip
    (line,) = found["Training loss"]["lines"]
    assert line["name"] == "loss" and line["points"] == [[n, float(f"{loss(n):.5g}")] for n in range(1, 41)]
    levels = found["Validation loss by noise level"]["lines"]
    assert [line["name"] for line in levels] == ["val/loss_t0.1", "val/loss_t0.5", "val/loss_t0.9"]
    assert [line["points"][0] for line in levels] == [[0, 1.1], [0, 1.5], [0, 1.9]]
    assert found["Training loss"]["smooth"] and not found["Validation loss"]["smooth"]
    assert found["Gradient norms"]["smooth"] and not found["Learning rate"]["smooth"]
    assert len({line["colour"] for line in levels}) == 3


def test_a_number_that_nobody_knows_is_drawn_under_its_own_name(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "val/<b>new</b>": 7.0}\n')
    parts = curves.of_one(read(folder))
    assert "&lt;b&gt;new&lt;/b&gt;" in parts[-1] and "<b>new" not in "".join(parts)
    assert plots(parts)["val/&lt;b&gt;new&lt;/b&gt;"]["lines"][0]["points"] == [[40, 7.0]]


def test_runs_share_axes_and_keep_their_colours(tmp_path: Path) -> None:
    first, second = (run_folder(tmp_path / name) for name in ("a", "b"))
    (first / "timing.jsonl").unlink()
    found = plots(curves.of_several([read(first), read(second)]))
    assert [line["name"] for line in found["Training loss"]["lines"]] == ["a", "b"]
    colours = [line["colour"] for line in found["Training loss"]["lines"]]
    (alone,) = found["Speed"]["lines"]
    assert (alone["name"], alone["colour"]) == ("b", colours[1])
    levels = {f"Validation loss by noise level: val/loss_t{t}" for t in (0.1, 0.5, 0.9)}
    assert levels | {"Gradient norms", "Learning rate"} <= set(found)


def test_training_samples_stand_beside_held_out_ones(tmp_path: Path) -> None:
    """What shows over-fitting shares its axes: the same measure of both, the gap by itself."""
    folder = run_folder(tmp_path / "run")
    rows = [{"step": n, "val/loss": 1.0 + n, "val/loss_train": 1.0 - n, "val/loss_gap": 2.0 * n} for n in (0, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = plots(curves.of_one(read(folder)))
    both = {line["name"]: line["points"] for line in found["Validation loss"]["lines"]}
    assert both == {"val/loss": [[0, 1], [1, 2]], "val/loss_train": [[0, 1], [1, 0]]}
    assert [line["name"] for line in found["Validation gap"]["lines"]] == ["val/loss_gap"]


def test_a_page_has_a_bounded_number_of_points(tmp_path: Path) -> None:
    """What a point stands for is said."""
    folder = run_folder(tmp_path / "run")
    rows = [{"step": n, "loss": 1.0} for n in range(1, 2001)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = read(folder)
    (line,) = plots(curves.of_one(record))["Training loss"]["lines"]
    assert len(line["points"]) == curves.MOST and line["points"][-1] == [2000, 1, 1, 1]
    assert "mean of up to 4 neighbouring steps" in curves.grouping([record])
    assert "is one step" in curves.grouping([read(run_folder(tmp_path / "short"))])
