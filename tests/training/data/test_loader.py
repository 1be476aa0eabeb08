"""Loader processes that die, find no memory or cannot be started: the same batches come, or one sentence."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from training.data import loader, sharing
from training.data.images import Images
from training.data.latents import Latents
from training.data.loader import stream
from training.data.order import Batches, DataOrder
from training.data.samples import Batch
from training.errors import UserError
from training.runs.checkpoints import Checkpoints
from training.shards.reading import ShardSet

Read = Callable[..., Iterator[Batch]]


@pytest.fixture
def read(shapes: Path) -> Read:
    """The stream of a process that has two micro-batches a step."""
    images = Images(ShardSet(shapes), flip=True, seed=3)
    batches = Batches(DataOrder(96, 20, 3), 5, 2, 1, 2, 1, 13)
    return lambda workers, **more: stream(images, batches, workers, **more)


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.data, b.data) and torch.equal(a.slots, b.slots) and a.captions == b.captions
        for a, b in zip(ours, theirs, strict=True)
    )


def kill_one() -> None:
    process = multiprocessing.active_children()[0]
    process.kill()
    process.join()


@pytest.mark.parametrize("kills", [{0}, {3}, {0, 7}])
def test_one_that_is_killed_is_replaced(kills: set[int], read: Read, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever it is killed, a step's second micro-batch included, the same batches come."""
    expected, got, asked = list(read(0)), [], []
    for number, batch in enumerate(read(2, give_up=lambda: asked.append(1))):
        got.append(batch)
        if number in kills:
            kill_one()
    assert same(got, expected) and not asked and not multiprocessing.active_children()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(kills)
    why = "SIGKILL, as the system does where memory is short"
    assert said[-1] == f"warning: a loader process died ({why}), {len(kills)} so far: a new one reads its batches again"


def test_the_third_death_asks_for_the_end_and_the_next_is_it(read: Read) -> None:
    expected, got, asked = list(read(0)), [], []
    incoming, dead = read(1, give_up=lambda: asked.append(1)), 0
    while not asked:
        got.append(next(incoming))
        if multiprocessing.active_children() and dead < 3:  # what was read before it died is given first
            kill_one()
            dead += 1
    assert dead == 3
    assert same(got, expected[: len(got)]) and len(multiprocessing.active_children()) == 1
    kill_one()
    with pytest.raises(UserError, match="die again and again") as caught:
        list(incoming)
    assert caught.value.code == 6 and "--num-workers" in caught.value.hint


def test_deaths_of_long_ago_do_not_count(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "HOUR", 0.0)
    asked: list[int] = []
    got = []
    for number, batch in enumerate(read(1, give_up=lambda: asked.append(1))):
        got.append(batch)
        if number in (0, 5, 10, 15):  # of those within an hour the third asks for the end, and the fourth is it
            kill_one()
    assert same(got, list(read(0))) and not asked and len(got) > 16


def test_no_shared_memory(read: Read, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(_tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    assert same(list(read(2)), list(read(0)))
    assert capsys.readouterr().err.count("note: /dev/shm ") == 1


def test_one_killed_while_it_hands_a_batch_over(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a batch is in the pipe: the other half is not waited for."""
    monkeypatch.setattr(sharing, "_share", lambda batch: False)
    monkeypatch.setattr(loader, "STUCK", 1.0)
    got = []
    for number, batch in enumerate(read(1)):
        got.append(batch)
        if number == 2:
            time.sleep(1)  # the pipe is full
            kill_one()
    assert same(got, list(read(0)))


def test_no_more_processes(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(UserError, match="no loader process can be started") as caught:
        list(read(2))
    assert caught.value.code == 6 and same(list(read(0)), list(read(0)))  # as the hint says


@pytest.mark.parametrize(
    "failure", [OSError(errno.EMFILE, "Too many open files"), RuntimeError("received 0 items of ancdata")], ids=repr
)
def test_no_more_files(failure: Exception, read: Read) -> None:
    with pytest.raises(UserError, match="too many open files") as caught, loader.loader_errors([]):
        raise failure
    assert caught.value.code == 6 and "ulimit -n" in caught.value.hint
    assert "--num-workers 0" in caught.value.hint and list(read(0))  # which starts none


def test_another_failure_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="something"), loader.loader_errors([object()]):
        raise RuntimeError("something")


def deadly(monkeypatch: pytest.MonkeyPatch, home: Path, deaths: int) -> None:
    """The process that reads the 65th sample of a training is killed, so many times."""
    kept = Latents.__getitems__

    def getitems(self: Any, slots: Any) -> Any:
        before = len(list(home.iterdir()))
        if multiprocessing.parent_process() and any(slot.slot == 64 for slot in slots) and before < deaths:
            (home / str(before)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return kept(self, slots)

    home.mkdir()
    monkeypatch.setattr(Latents, "__getitems__", getitems)


def test_a_training_goes_on_as_if_nothing_had_been(
    latents: Path, denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly(monkeypatch, tmp_path / "deaths", 2)
    words = ["--latents", latents, *tiny.DENOISER, "--num-workers", "2", "--micro-batch-size", "16"]
    assert tiny.call("train_denoiser", *words, "--output", tmp_path / "run") == 0
    assert len(list((tmp_path / "deaths").iterdir())) == 2
    assert tiny.call("train_denoiser", *words, "--output", tmp_path / "calm") == 0
    assert tiny.last_checkpoint(tmp_path / "run") == tiny.last_checkpoint(tmp_path / "calm")


def test_a_training_saves_and_stops(latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deadly(monkeypatch, tmp_path / "deaths", 3)
    words = ["--latents", latents, *tiny.DENOISER, "--num-workers", "2", "--output", tmp_path / "run"]
    problem = tiny.refused("train_denoiser", *words)
    newest = Checkpoints(tmp_path / "run").newest()
    assert newest and int(newest.name[-1]) in (1, 2, 3)  # as far as they had read
    assert problem.code == 6 and problem.what == f"loader processes die again and again: saved step {newest.name[-1]}"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped"
    assert tiny.call("train_denoiser", *words[:-4], "--num-workers", 0, *words[-2:], "--resume", "auto") == 0
