"""Quality against network calls and seconds: the numbers of evaluate, calls that are counted, what is recommended."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from ldm.guidance import ClassifierFree, Embedded
from ldm.guiding import Guidance
from ldm.jumps import Jumping
from ldm.samplers import Euler, Heun, JumpSampler, Sampler
from ldm.students import NO_STUDENT, Student
from training.doors.compare_steps import called, numbers
from training.errors import UserError
from training.ledger import Ledger
from training.measuring import step_comparison
from training.measuring.distances import wilson
from training.measuring.metered import Cost, Meter, Metered, metered
from training.measuring.step_comparison import Run, Setting, refuse_jumps, steps_of
from training.measuring.step_report import FRECHET, OBEDIENCE, chart, enough, interval, recommendations, recommended
from training.models.assembly import load_pipeline
from training.pictures import charts

FREE = {"seconds", "versions", "protocol", "ledger", "protocol_hash", "grid"}  # of evaluate, which differ by nature


def cells(text: str) -> list[list[str]]:
    """Of a Markdown table, its head included."""
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line[1:-1].split(" | ")] for line in rows]


@pytest.fixture(scope="module")
def compared(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in 1 and 2 steps of two samplers, by all that is measured."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    words = ("demo", "--data", shapes, "--obedience", "shapes", "--count", 10, "--batch-size", 4, "--steps", "2,1,2")
    samplers = ("--sampler", "ddim", "--sampler", "heun", "--sampler", "ddim")
    assert tiny.call("compare_steps", *words, *samplers, "--seed", 3, "--device", "cpu", "--output", folder) == 0
    return folder


def test_numbers_are_those_of_evaluate(compared: Path, shapes: Path, tmp_path: Path) -> None:
    """The same settings, captions and seeds give the same pictures, and so every number exactly; and the protocol."""
    found = json.loads((compared / "comparison.json").read_text())
    settings = [(row["sampler"], row["steps"], row["calls"]) for row in found["rows"]]
    assert settings == [("ddim", 1, 2), ("ddim", 2, 4), ("heun", 1, 2), ("heun", 2, 6)]  # guided: two at once
    for row in found["rows"][1:3]:
        words = ("--model", "demo", "--data", shapes, "--obedience", "shapes", "--count", 10, "--batch-size", 4)
        how = ("--sampler", row["sampler"], "--steps", row["steps"], "--seed", 3, "--device", "cpu")
        assert tiny.call("evaluate", *words, *how, "--overwrite", "--output", tmp_path / "out.json") == 0
        wanted = json.loads((tmp_path / "out.json").read_text())
        assert {key: row["numbers"][key] for key in wanted.keys() - FREE} == {
            key: value for key, value in wanted.items() if key not in FREE}
        assert found["protocol_hash"] == wanted["protocol_hash"]
    hits = [round(10 * found["rows"][1]["numbers"][f"obedience_{objects}"]) for objects in (1, 2, 3)]
    share, interval = found["rows"][1]["quality"]["obedience"][0], found["rows"][1]["quality"]["obedience"][1:]
    assert share == sum(hits) / 30 and interval == list(wilson(sum(hits), 30)) and 0 < sum(hits) < 30
    numbers = found["rows"][1]["numbers"]
    assert found["rows"][1]["quality"]["frechet"] == [numbers["frechet_generated"], *numbers["frechet_generated_95"]]


def test_the_table_holds_what_the_json_does(compared: Path) -> None:
    found, text = json.loads((compared / "comparison.json").read_text()), (compared / "comparison.md").read_text()
    head, *rows = cells(text)
    assert head == ["run", "sampler", "steps", "network calls", "denoising, s", "decoding, s", "all obeyed",
                    "obeyed, 1 object", "obeyed, 2 objects", "obeyed, 3 objects", "Frechet distance", "kernel distance"]
    assert len(rows) == 6
    for row, line in zip(found["rows"], rows, strict=False):
        numbers = row["numbers"]
        assert line[:4] == ["demo", row["sampler"], str(row["steps"]), f"{row['calls']:g}"]
        assert line[4:6] == [f"{row['seconds_denoising']:.3g}", f"{row['seconds_decoding']:.3g}"]
        assert line[6] == interval(*row["quality"]["obedience"])
        keys = ("obedience_1", "obedience_2", "obedience_3", "frechet_generated", "kernel_distance")
        assert line[7:] == [interval(numbers[key], *numbers[f"{key}_95"]) for key in keys]
    (baseline,), numbers = found["baselines"].values(), found["rows"][0]["numbers"]
    for line, name in zip(rows[4:], ("reconstructed", "training"), strict=True):
        value, ends = baseline[f"frechet_{name}"], baseline[f"frechet_{name}_95"]
        assert line[0] == f"{name} pictures" and line[-2] == interval(value, *ends)
        assert numbers[f"frechet_{name}"] == value
    choice = found["recommended"]["obedience"]["runs"]["demo"]
    told = next(line for line in text.splitlines() if line.startswith("- demo, by obedience: "))
    assert f"**{choice['enough']['steps']} step" in told and interval(*choice["enough"]["quality"]) in told
    assert "all runs" not in text and "fewest network calls" in text and "on cpu with 1 thread" in text
    assert f"protocol {found['protocol_hash']}" in text and "compare_steps" in text.splitlines()[3]


def test_seconds_are_told_in_parts(compared: Path) -> None:
    """More steps take longer, decoding takes what it takes, and the median lies within the batches' ends."""
    rows = json.loads((compared / "comparison.json").read_text())["rows"]
    for row in rows:
        low, high = row["seconds_denoising_range"]
        assert 0 < low <= row["seconds_denoising"] <= high and row["seconds_decoding"] > 0 < row["seconds_reading"]
    assert rows[3]["seconds_denoising_range"][0] > rows[2]["seconds_denoising_range"][0]  # of 6 calls, and of 2


def test_nothing_is_replaced_unasked(compared: Path, tmp_path: Path) -> None:
    words = ("demo", "--obedience", "shapes", "--count", 1, "--steps", 1, "--device", "cpu", "--output", tmp_path)
    (tmp_path / "comparison.md").write_text("mine")
    problem = tiny.refused("compare_steps", *words)
    assert problem.code == 2 and problem.what.endswith("comparison.md already exists")
    assert "--overwrite" in problem.hint and (tmp_path / "comparison.md").read_text() == "mine"
    assert tiny.call("compare_steps", *words, "--overwrite") == 0
    assert "| demo | dpmpp-2m | 1 | 2 | " in (tmp_path / "comparison.md").read_text()
    assert Image.open(compared / "comparison.png").height == 2 * Image.open(tmp_path / "comparison.png").height


def test_a_classifier_judges_pictures_of_the_datas_captions(shapes: Path, tmp_path: Path) -> None:
    """Of two runs, each by its name, as evaluate has it judged."""
    judge = tmp_path / "judge"
    words = ("--data", shapes, "--output", judge, "--epochs", 1, "--batch-size", 32, "--width", 4)
    assert tiny.call("train_classifier", *words) == 0
    measures = ("--data", shapes, "--obedience", judge, "--count", 10, "--device", "cpu")
    runs = ("demo", "again=demo")
    how = ("--guidance-scale", 1, "--features", judge, "--output", tmp_path / "out")
    assert tiny.call("compare_steps", *runs, *measures, "--steps", 1, *how) == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    how = ("--guidance-scale", 1, "--features", judge, "--output", tmp_path / "out.json")
    assert tiny.call("evaluate", "--model", "demo", *measures, "--steps", 1, *how) == 0
    wanted = json.loads((tmp_path / "out.json").read_text())
    for row, name in zip(found["rows"], ("demo", "again"), strict=True):
        assert row["run"] == name and row["calls"] == 1 and row["numbers"]["obedience"] == wanted["obedience"]
        assert row["numbers"]["frechet_generated"] == wanted["frechet_generated"]
        assert row["quality"]["obedience"] == [wanted["obedience"], *wanted["obedience_95"]]
    assert cells((tmp_path / "out" / "comparison.md").read_text())[0][6:] == ["obeyed", "Frechet distance",
                                                                             "kernel distance"]
    assert "- all runs, by frechet: " in (tmp_path / "out" / "comparison.md").read_text()


# --- counting


def drawn(pipeline: Metered, sampler: Sampler, guidance: Guidance, steps: int = 4) -> Cost:
    plan = dataclasses.replace(pipeline.sampling, sampler=sampler, guidance=guidance, steps=steps)
    list(pipeline.pixels(["a red circle"] * 3, sampling=plan, batch_size=2))
    return pipeline.meter.take()


COSTS: dict[str, tuple[Sampler, Guidance, float]] = {  # calls of a picture in four steps
    "unguided": (Euler(), ClassifierFree(scale=1.0), 4),
    "guided": (Euler(), ClassifierFree(scale=3.0), 8),
    "guided on half of the way": (Euler(), ClassifierFree(scale=3.0, interval=(0.0, 0.6)), 6),  # t = 1, 3/4 | 1/2, 1/4
    "the condition's absence alone": (Euler(), ClassifierFree(scale=0.0), 4),
    "the scale is told to the network": (Euler(), Embedded(scale=3.0), 4),
    "heun, whose last step is of one call": (Heun(), ClassifierFree(scale=1.0), 7),
    "guided heun": (Heun(), ClassifierFree(scale=3.0), 14),
}


@pytest.mark.parametrize("name", COSTS)
def test_calls_are_counted_where_they_happen(name: str, denoiser: Path) -> None:
    sampler, guidance, calls = COSTS[name]
    taught = Student(guidance_scale=(1.0, 6.0)) if isinstance(guidance, Embedded) else NO_STUDENT
    own = load_pipeline(denoiser, "cpu")
    plan = dataclasses.replace(own.sampling, sampler=sampler, guidance=guidance)
    cost = drawn(metered(dataclasses.replace(own, student=taught, sampling=plan)), sampler, guidance)
    assert (cost.pictures, cost.calls) == (3, 3 * calls)


def test_a_student_that_jumps_is_counted_too(denoiser: Path) -> None:
    pipeline = load_pipeline(denoiser, "cpu")
    jumping = Jumping(pipeline.denoiser.backbone, pipeline.denoiser.diffusion)
    student = metered(dataclasses.replace(pipeline, denoiser=jumping))
    assert drawn(student, JumpSampler(), ClassifierFree(scale=1.0), 2)[:2] == (3, 6)
    run, plan = Run("student", "", student, Ledger()), dataclasses.replace(pipeline.sampling, sampler=JumpSampler())
    refuse_jumps(run, plan)
    with pytest.raises(UserError, match="--sampler jump: takes the steps of a few-step model, and student is none"):
        refuse_jumps(run._replace(pipeline=metered(pipeline)), plan)


def test_a_meter_changes_no_picture_and_begins_anew(denoiser: Path) -> None:
    plain = load_pipeline(denoiser, "cpu")
    under = metered(plain)
    pictures = [torch.cat(list(each.pixels(["red", "blue"], 5, batch_size=1))) for each in (plain, under)]
    assert torch.equal(*pictures) and under.multiple == plain.multiple and under.hashes == plain.hashes
    cost = under.meter.take()
    assert cost.pictures == 2 and min(cost[2:]) > 0 and under.meter.take() == Cost(0, 0, 0.0, 0.0, 0.0)


def test_each_part_of_a_drawing_has_its_own_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.0, 10.0, 14.5, 20.0, 20.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    meter, cpu = Meter(), torch.device("cpu")
    for what in ("denoising", "decoding", "denoising"):
        with meter.timing(what, cpu):
            pass
    assert meter.take()[2:] == (0.0, 2.5, 4.5)


def test_a_picture_costs_the_median_over_batches() -> None:
    setting = Setting(None, None, {}, None)  # type: ignore[arg-type]
    setting.costs = [Cost(4, 16, 0.4, 8.0, 4.0), Cost(4, 8, 0.8, 4.0, 4.0), Cost(2, 6, 0.1, 20.0, 2.0)]
    assert setting.cost() == {"calls": 3.0, "seconds_reading": 0.1, "seconds_denoising": 2.0, "seconds_decoding": 1.0,
                              "seconds_denoising_range": [1.0, 10.0]}


def test_settings_draw_in_turns_and_once_before(denoiser: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch after batch every setting, so that a slow minute is one of all; what goes before is in no cost."""
    asked = list[tuple[int, int]]()

    def draw(pipeline: Any, sampling: Any, requests: list[str]) -> tuple[torch.Tensor, list[str]]:
        asked.append((sampling, len(requests)))
        pipeline.meter.pictures += len(requests)
        return torch.zeros(0), []

    @contextmanager
    def quietly(*_: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(add=lambda count: None)

    monkeypatch.setattr(step_comparison, "draw", draw)
    monkeypatch.setattr(step_comparison, "Progress", quietly)
    values = {"sample": {"size": [32, 32]}}
    run = Run("x", "", metered(load_pipeline(denoiser, "cpu")), Ledger())
    settings = [Setting(run, steps, values, None) for steps in (1, 2)]  # type: ignore[arg-type]
    parts = [step_comparison.Part(0, ["a"] * 3), step_comparison.Part(0, ["b"] * 2)]  # type: ignore[list-item]
    step_comparison.draw_in_turns(settings, parts, None)
    assert asked == [(1, 1), (2, 1), (1, 3), (2, 3), (1, 2), (2, 2)]
    assert [[cost.pictures for cost in setting.costs] for setting in settings] == [[3, 2], [3, 2]]


# --- what is enough


def row(run: str, steps: int, calls: float, obedience: tuple[float, float, float],
        frechet: tuple[float, float, float] = (9.0, 8.0, 10.0), seconds: float = 0.0) -> dict[str, Any]:
    quality = {"obedience": list(obedience), "frechet": list(frechet)}
    return {"run": run, "sampler": "ddim", "steps": steps, "calls": calls, "quality": quality,
            "seconds_denoising": seconds or calls / 100, "seconds_decoding": 0.01, "numbers": {}}


ROWS = [
    row("teacher", 1, 2, (0.20, 0.15, 0.25), (80.0, 70.0, 90.0)),
    row("teacher", 4, 8, (0.80, 0.76, 0.84), (12.0, 10.6, 13.0)),
    row("teacher", 8, 16, (0.85, 0.81, 0.89), (10.5, 9.0, 12.0)),
    row("teacher", 16, 32, (0.90, 0.86, 0.94), (10.0, 9.0, 11.0)),
    row("student", 1, 1, (0.70, 0.66, 0.74), (5.0, 4.5, 5.5)),
    row("student", 2, 2, (0.76, 0.72, 0.80), (4.0, 3.0, 5.0)),
]


def test_enough_is_the_fewest_calls_whose_interval_reaches_the_share() -> None:
    """0.95 of 0.90 is 0.855: 0.84 does not reach it, 0.89 does; 0.93 of it, 0.837, is reached by 0.84. Of distances,
    10 / 0.95 = 10.53 is below 10.6."""
    teacher, student = ROWS[:4], ROWS[4:]
    assert enough(teacher, OBEDIENCE, 0.95) is ROWS[2] and enough(teacher, OBEDIENCE, 0.93) is ROWS[1]
    assert enough(teacher, OBEDIENCE, 1.0) is ROWS[3]
    assert enough(teacher, FRECHET, 0.95) is ROWS[2] and enough(teacher, FRECHET, 0.94) is ROWS[1]
    assert enough(student, FRECHET, 0.85) is ROWS[4] and enough(student, FRECHET, 0.95) is ROWS[5]
    assert enough(ROWS, OBEDIENCE, 0.95) is ROWS[2] and enough(ROWS, OBEDIENCE, 0.8) is ROWS[4]
    assert enough(ROWS, FRECHET, 0.95) is ROWS[5]
    exact = [row("x", 1, 1, (0.5, 0.5, 0.5)), row("x", 2, 2, (1.0, 1.0, 1.0))]
    assert enough(exact, OBEDIENCE, 0.5) is exact[0]  # reaching is enough


def test_of_equal_calls_the_quickest_is_enough_and_of_nothing_none() -> None:
    slow, quick = row("x", 4, 8, (0.5, 0.4, 0.6), seconds=0.3), row("y", 4, 8, (0.5, 0.4, 0.6), seconds=0.2)
    assert enough([slow, quick], OBEDIENCE, 0.95) is quick and OBEDIENCE.best([slow, quick]) is quick
    nothing = [row("x", 1, 2, (0.0, 0.0, 0.1)), row("x", 2, 4, (0.0, 0.0, 0.1))]
    assert enough(nothing, OBEDIENCE, 0.95) is None and enough(nothing, FRECHET, 0.95) is nothing[0]
    told = list(recommended(recommendations(nothing, 0.95), 0.95))
    assert told[0] == "- x, by obedience: no number of steps is enough, since no picture of any is as asked."


def test_what_is_recommended_of_each_run_and_of_all() -> None:
    found = recommendations(ROWS, 0.95)
    chosen = {name: (choice["enough"]["run"], choice["enough"]["steps"])
              for name, choice in (*found["obedience"]["runs"].items(), ("all", found["obedience"]["all"]))}
    assert chosen == {"teacher": ("teacher", 8), "student": ("student", 1), "all": ("teacher", 8)}
    # Of the student 0.74 reaches 0.95 of 0.76, its own best.
    assert found["frechet"]["all"]["enough"]["run"] == "student"
    lines = list(recommended(found, 0.95))
    assert lines[0] == ("- teacher, by obedience: **8 steps with ddim**, 16 network calls and 0.16 s a picture: 0.850 "
                        "(0.810 to 0.890); the best is 0.900 (0.860 to 0.940), 16 steps with ddim, 32 calls. It is "
                        "enough by its interval alone: with a larger --count it may not be.")
    assert lines[2].startswith("- all runs, by obedience: **8 steps with ddim of teacher**, 16 network calls")
    assert lines[4].endswith("4.000 (3.000 to 5.000), the best that was measured.")
    assert lines[5].startswith("- all runs, by frechet: **2 steps with ddim of student**, 2 network calls")
    assert "0.95 of the best value" in lines[-1]
    sure = recommendations(ROWS[:4], 0.94)["obedience"]["runs"]["teacher"]  # 0.846 is reached by 0.85 itself
    assert sure["enough"]["steps"] == 8 and not sure["by_its_interval_alone"]


def test_intervals_are_told_in_four_digits() -> None:
    assert interval(0.85, 0.8, 1.0) == "0.850 (0.800 to 1.000)"
    assert interval(36.0, -1.25, 1234.5) == "36.00 (-1.250 to 1234)"
    assert interval(99.5, 100.0, 0.0) == "99.50 (100.0 to 0.000)"


# --- the chart


def colour(text: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(text[1:]))


def test_a_chart_shows_each_line_at_its_numbers() -> None:
    """On the left the calls: of 1 to 32 on a logarithmic axis with room, each mark where its value says."""
    image = np.asarray(chart(ROWS, 0.9))
    across = charts.Axis.around("", [item["calls"] for item in ROWS], log=True)
    for item, number in ((ROWS[1], 0), (ROWS[3], 0), (ROWS[4], 1)):
        x = round(charts.MARGIN + across.place(item["calls"]) * charts.SIDE)
        y = round(charts.MARGIN + (1 - item["quality"]["obedience"][0]) * charts.SIDE)
        assert tuple(image[y, x]) == colour(charts.COLOURS[number]), item
        low = round(charts.MARGIN + (1 - item["quality"]["obedience"][1]) * charts.SIDE)
        assert tuple(image[low, x - 2]) == colour(charts.COLOURS[number]), item
    dashed = round(charts.MARGIN + (1 - 0.9 * 0.9) * charts.SIDE)
    assert (image[dashed, charts.MARGIN + 1] == 128).all()
    assert image.shape[0] == 2 * (charts.SIDE + 2 * charts.MARGIN)  # obedience, and beneath it the distance


def test_axes_and_their_ticks() -> None:
    log = charts.Axis("calls", 1.0, 100.0, log=True)
    assert [round(log.place(value), 9) for value in (1, 10, 100, 0.0, 1000)] == [0, 0.5, 1, 0, 1]
    assert log.ticks() == [1, 2, 5, 10, 20, 50, 100]
    assert charts.Axis("", 0.9, 2000.0, log=True).ticks() == [1, 10, 100, 1000]
    assert charts.Axis("", 0.0, 1.0).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert charts.Axis("", -3.0, 31.0).ticks() == [0, 5, 10, 15, 20, 25, 30]
    assert charts.Axis("", 0.0, 2.0).place(0.5) == 0.25
    wide = charts.Axis.around("", [0.0, 1.0, 16.0], log=True)  # what is 0 is left out
    assert wide.low == pytest.approx(16**-charts.ROOM) and wide.high == pytest.approx(16 ** (1 + charts.ROOM))
    alone = charts.Axis.around("", [4.0])
    assert alone.low < 4 < alone.high and charts.Axis.around("", [], log=True).low > 0


def test_lines_of_one_colour_have_marks_of_their_own() -> None:
    names = [f"line {number}" for number in range(7)]
    key = np.asarray(charts.legend(names, "dashed"))
    first, seventh = (key[charts.MARGIN + 8 + 16 * n - 4 : charts.MARGIN + 8 + 16 * n + 5, 4:13] for n in (0, 6))
    assert (first == colour(charts.COLOURS[0])).all(-1).sum() != (seventh == colour(charts.COLOURS[0])).all(-1).sum()
    assert (seventh[4, 4] == first[4, 4]).all()


# --- what is asked for


def test_the_steps_of_a_run() -> None:
    plain, own = SimpleNamespace(sample=SimpleNamespace(steps=20)), SimpleNamespace(sample=SimpleNamespace(steps=4))
    assert steps_of(plain, None) == [1, 2, 4, 8, 16, 20] and steps_of(own, None) == [1, 2, 4, 8, 16]
    assert steps_of(plain, [8, 2, 8]) == [2, 8]
    student = SimpleNamespace(sample=SimpleNamespace(steps=1), student=SimpleNamespace(steps=(4, 2)))
    assert steps_of(student, None) == [2, 4] and steps_of(student, [1]) == [1]
    assert steps_of(SimpleNamespace(sample=plain.sample, student=SimpleNamespace(steps=3)), None) == [3]


def test_runs_and_numbers_as_they_are_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    pairs = {"demo": ("", "demo"), "T=runs/a": ("T", "runs/a"), "runs/lr=2": ("", "runs/lr=2"), "lr=1": ("", "lr=1"),
             "T=runs/lr=2": ("T", "runs/lr=2"), "=a": ("", "=a"), "a=": ("", "a=")}  # fmt: skip
    assert {text: called(text) for text in pairs} == pairs
    assert numbers("1,2, 4") == [1, 2, 4] and numbers(None) is None


SHAPES = "--obedience shapes --count 1 --steps 1"
MISTAKES = {
    "an autoencoder": (f"{{autoencoder}} {SHAPES}", 4, "is a run of the autoencoder stage, expected denoiser"),
    "nothing to measure": ("{denoiser}", 2, "nothing to measure"),
    "a classifier without data": ("{denoiser} --obedience {tmp}", 2, "judges pictures of the captions of packed ones"),
    "a jump of a teacher": (f"{{denoiser}} {SHAPES} --sampler jump", 2, "--sampler jump: takes the steps of"),
    "consistency": (f"{{denoiser}} {SHAPES} --sampler ddim --sampler consistency", 2, "--sampler consistency: takes"),
    "an unknown sampler": (f"{{denoiser}} {SHAPES} --sampler eulr", 2, "did you mean 'euler'?"),
    "no steps": ("{denoiser} --obedience shapes --steps 0", 2, "--steps: expected whole numbers from 1 on"),
    "no numbers": ("{denoiser} --obedience shapes --steps 1,two", 2, "commas between (got '1,two')"),
    "no pictures": ("{denoiser} --obedience shapes --count 0", 2, "--count: must be at least 1 (got 0)"),
    "more than the best": (f"{{denoiser}} {SHAPES} --good-enough 95", 2, "must be above 0 and at most 1 (got 95)"),
    "two of one name": (f"{{denoiser}} {{denoiser}} {SHAPES}", 2, "two of the runs are called run"),
    "no such run": (f"T={{tmp}}/none {SHAPES}", 4, "none: no such run"),
    "shown a small picture": (f"demo {{upscaler}} {SHAPES}", 2, "is shown an image besides the caption"),
    "grey pictures": (f"{{grey}}/run {SHAPES}", 2, "judges RGB pictures, the model draws 1 channel"),
    "nine pictures": ("{denoiser} --data {shapes} --count 9 --steps 1", 2, "at least 10 in each"),
    "no weak model": (f"{{denoiser}} {SHAPES} --guidance-scale nan", 2, "--guidance-scale: must be a finite number"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_before_anything_is_drawn(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.measuring.step_comparison.draw", None)  # calling it would fail otherwise
    text, code, said = MISTAKES[name]
    places = {word: request.getfixturevalue(word) for word in ("autoencoder", "denoiser", "upscaler", "grey", "shapes")
              if f"{{{word}}}" in text}  # fmt: skip
    words = text.format(**places, tmp=tmp_path).split()
    problem = tiny.refused("compare_steps", *words, "--device", "cpu", "--output", tmp_path / "out")
    assert problem.code == code and said in problem.what and "\n" not in problem.what
    assert problem.hint or name in ("no pictures", "no weak model")
    assert not (tmp_path / "out").exists()
