"""How far drawings follow their hints: exact numbers of pictures that are moved by a known length, and the flag."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from training.ledger import Ledger
from training.measuring.control import followed, others, placed
from training.models.hints import HintRead
from training.pictures.hints import hint_of
from training.shapes.rendering import render
from training.shapes.scenes import Scene, scene
from training.shapes.wording import captions

SCENES = [scene(seed, objects=1 + seed % 3) for seed in range(9)]
SIDE = 128  # pixels, so that what the checker reads is near to exact


def moved(of: Scene, right: float, larger: float = 0.0) -> np.ndarray:
    """The picture with every object so many thirty-seconds of the side to the right, and larger."""
    objects = tuple(replace(o, x=o.x + right / 32, extent=o.extent + larger / 32) for o in of.objects)
    return render(replace(of, objects=objects), SIDE)


def told(scenes: Sequence[Scene]) -> list[str]:
    return [captions(one)[0] for one in scenes]


@pytest.mark.parametrize(("right", "larger"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.3)])
def test_errors_are_the_lengths_that_objects_were_moved_by(right: float, larger: float) -> None:
    truths, drawn = ([moved(one, *by) for one in SCENES] for by in ((0.0, 0.0), (right, larger)))
    numbers = placed(drawn, truths, told(SCENES))
    assert numbers["obedience"] == 1
    assert numbers["centre_error"] == pytest.approx(right / 2**0.5, abs=0.05)  # along one of two axes
    assert numbers["extent_error"] == pytest.approx(larger, abs=0.06)


def test_drawings_that_do_not_obey_are_not_measured() -> None:
    truths = [moved(one, 0) for one in SCENES]
    others = [*truths[3:6], *truths[3:]]
    numbers = placed(others, truths, told(SCENES))
    assert numbers["obedience"] == 6 / 9
    assert numbers["centre_error"] == 0
    assert placed(truths[1:2], truths[2:3], told(SCENES[2:3]))["centre_error"] is None


def test_overlap_of_a_hint_with_that_of_the_drawing() -> None:
    edges, ledger = hint_of("edges"), Ledger()
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[2:6, 2:6] = 255
    hint = edges.made(picture, None).values.transpose(2, 0, 1)
    assert hint.sum() == 16 * 255
    assert followed(edges, picture, hint, ledger) == 1
    assert followed(edges, picture, np.zeros_like(hint), ledger) == 0
    half = hint.copy()
    half[:, :, 4:] = 0
    assert followed(edges, picture, half, ledger) == 0.5
    assert followed(edges, np.zeros_like(picture), np.zeros_like(hint), ledger) == 1
    assert not ledger.lines()
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert followed(hint_of("mask"), noise, hint, ledger) == 0
    assert "no such hint can be made" in "\n".join(ledger.lines())


def test_a_control_as_that_of_a_drawing_is_answered() -> None:
    problem = tiny.refused("evaluate", "--model", "demo", "--control", "RUN")
    assert "measured with evaluate --adapter CONTROL --hints" in problem.what


def test_hints_that_a_run_did_not_learn_from_are_told() -> None:
    """As where their kind or their range is another: nothing else shows it."""
    depth = HintRead(1, "depth", False, (0.0, 4.0))
    assert not others(depth, {"kind": "depth", "range": [0, 4]}) and not others(None, {"kind": "depth"})
    assert not others(HintRead(1, None, False), {"kind": "depth"})
    assert not others(HintRead(1, "mask", True), {"kind": "mask"})
    for told in ({"kind": "depth"}, {"kind": "depth", "range": [0, 5]}, {"kind": "mask", "range": [0, 4]}):
        assert others(depth, told)


def test_evaluate_tells_how_far_a_control_is_followed(denoiser: Path, autoencoder: Path, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    data, latents, run = (tmp_path / name for name in ("data", "latents", "run"))
    packing = ["pack", "shapes", "--samples", 40, "--val-fraction", 0.3]
    assert tiny.call("make_shards", *packing, "--hint", "edges", "--output", data) == 0
    given = ("--autoencoder", autoencoder, "--data", data, "--output", latents, "--device", "cpu")
    assert tiny.call("encode_latents", *given) == 0
    given = ("--base", denoiser, "--config", "controlnet", "--latents", latents, "--output", run)
    assert tiny.call("train_denoiser", *given, *tiny.SHORT, "--batch-size", "8", "--max-steps", "2") == 0
    asked: list[Any] = ["--model", denoiser, "--hints", "--obedience", "shapes", "--data", data, "--count", 8]
    asked += ["--device", "cpu", "--steps", 2]
    answers = []
    for name, adapter in (("with", run), ("off", f"{run}:0")):
        file = tmp_path / f"{name}.json"
        assert tiny.call("evaluate", *asked, "--adapter", adapter, "--output", file) == 0
        answers.append(json.loads(file.read_text()))
    for numbers in answers:
        assert numbers["pictures"] == 8 and numbers["hint"] == "edges"
        assert 0 <= numbers["hint_iou"] <= 1 and 0 < numbers["hint_iou_of_reconstructions"] <= 1
        assert {"obedience", "centre_error", "extent_error"} <= numbers.keys()
    assert [numbers["adapters"] for numbers in answers] == [[["run", 1.0]], [["run", 0.0]]]
    assert answers[0]["protocol_hash"] == answers[1]["protocol_hash"]
    unshown = tiny.refused("evaluate", "--model", denoiser, "--adapter", run, "--obedience", "shapes", *asked[-4:-2])
    assert "only --hints shows it" in unshown.what
    assert tiny.call("evaluate", *asked) == 0
    assert "ignored 8: hints, which neither the model nor an adapter reads" in capsys.readouterr().err
    assert tiny.call("make_shards", *packing, "--output", tmp_path / "bare") == 0
    bare = ("--data", tmp_path / "bare", "--device", "cpu")
    assert "no hints beside the pictures" in tiny.refused("evaluate", "--model", denoiser, "--hints", *bare).what
