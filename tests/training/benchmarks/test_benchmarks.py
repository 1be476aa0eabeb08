"""Every verb of the benchmark's door, at a size that takes a moment."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import tiny

from training.benchmarks import autoencoder


def rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table, its head left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_samplers_counts_calls_waits_and_what_is_held(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = "heun,dopri5,jump,consistency"
    assert tiny.call("benchmark", "samplers", "--samplers", kinds, "--steps", 2, "--side", 4) == 0
    heun, pair, *few_step = rows(capsys.readouterr().out)
    assert [(row[0], row[1], row[5]) for row in few_step] == [("jump", "2", "0"), ("consistency", "2", "0")]
    assert heun[0] == "heun" and heun[1] == "3" and heun[5] == "0" and pair[5] == "1"
    for row in (heun, pair):
        early, late = (int(part) for part in row[6].split(","))
        assert late <= early
    assert "unknown name 'hewn'" in str(tiny.refused("benchmark", "samplers", "--samplers", "hewn"))
    assert "at least 1" in str(tiny.refused("benchmark", "samplers", "--steps", 0))


def test_durability_tells_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--config", "smoke", "--batch-size", 2, "--side", 8, "--rounds", 1)
    assert tiny.call("benchmark", "durability", *words) == 0
    told = rows(capsys.readouterr().out)
    assert [row[0].partition(",")[0] for row in told] == [
        "watchdogs", "checksums", "checkpoint", "or begun in the background", "all but the last"]
    assert all(float(row[1]) > 0 for row in told[:-1])
    parts = [float(row[3].rstrip("%")) for row in told]
    assert parts[-1] == pytest.approx(sum(parts[:3]), abs=0.01) and parts[2] > 0
    assert "at least 1" in str(tiny.refused("benchmark", "durability", "--rounds", 0))


def test_reading_tells_every_reader(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.call("benchmark", "reading", "--samples", 40, "--rounds", 1) == 0
    best = capsys.readouterr().out.partition("best of 1 rounds, 40 samples in 1 shards")[2].splitlines()[1:]
    assert [line[:21].strip() for line in best] == [
        "by index, in order", "by index, shuffled", "webdataset, in order"]


def test_autoencoder_times_equal_networks(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    words = ("--config", "smoke", "--size", 16, "--batch-size", 1, "--rounds", 1)
    assert tiny.call("benchmark", "autoencoder", *words) == 0
    told = [(line[:7].strip(), line[8:33].strip()) for line in capsys.readouterr().out.splitlines()[1:]]
    names = ("ours", "diffusers", "diffusers, channels-last")
    assert told == [(verb, name) for verb in ("train", "encode", "decode") for name in names]


def test_autoencoder_does_not_time_unequal_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    right = autoencoder.models

    def wrong(*args: Any) -> dict[str, Any]:
        built = right(*args)
        built["diffusers"].decoder.conv_out.bias.data += 1
        return built

    monkeypatch.setattr(autoencoder, "models", wrong)
    with pytest.raises(AssertionError, match="not close"):
        tiny.call("benchmark", "autoencoder", "--config", "smoke", "--size", 16, "--batch-size", 1, "--rounds", 1)


def test_autoencoder_without_diffusers_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    problem = tiny.refused("benchmark", "autoencoder", "--config", "smoke")
    assert problem.what == "diffusers is not installed" and problem.hint == "pip install diffusers"
