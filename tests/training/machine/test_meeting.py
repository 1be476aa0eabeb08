"""Processes that join, wait and agree through a store: no wait without an end, none that ends too early."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
from torch.distributed import HashStore

from training.errors import UserError
from training.machine import meeting
from training.machine.meeting import Meetings

GROUP = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "False"}


@pytest.fixture
def pair() -> list[Meetings]:
    store = HashStore()
    return [Meetings(store, rank, 2) for rank in range(2)]


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free one, named in the environment of process 0 of two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = int(free.getsockname()[1])
    for name, value in {**GROUP, "MASTER_PORT": str(number)}.items():
        monkeypatch.setenv(name, value)
    return number


def test_who_comes_late_is_waited_for(pair: list[Meetings], monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a silence may be: it beats."""
    monkeypatch.setattr(meeting, "BEAT", 0.05)
    monkeypatch.setattr(meeting, "LOST_AFTER", 0.5)
    pair[1].beat()
    with ThreadPoolExecutor() as pool:
        waits = pool.submit(pair[0].meet)
        time.sleep(1.5)
        assert not waits.done()
        pair[1].meet()
        assert waits.result(5) is None
        for _ in range(3):
            list(pool.map(Meetings.meet, pair))
    pair[1].stop.set()


def test_silence_ends_the_wait(pair: list[Meetings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "BEAT", 0.05)
    monkeypatch.setattr(meeting, "LOST_AFTER", 0.5)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"lost another process \(process 1 of 2, silent for 0.5 s\)") as caught:
        pair[0].meet()
    assert caught.value.code == 1 and 0.4 < time.monotonic() - began < 3


def test_a_dead_process_here_is_noticed_at_once(pair: list[Meetings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "BEAT", 0.05)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    pair[0].store.set("training/who/1", json.dumps(meeting._who(process.pid)))
    assert not meeting._gone(meeting._who(process.pid)) and not meeting._gone(["elsewhere", 1 << 22, 0.0])
    process.kill()
    with pytest.raises(UserError, match=r"\(process 1 of 2\)"):
        pair[0].meet()
    process.wait()


def test_a_failure_elsewhere_ends_the_wait(pair: list[Meetings]) -> None:
    pair[0].store.set(meeting.FAILURE, "[1, 3]")
    with pytest.raises(UserError, match="another process ended"):
        pair[0].meet()


def test_who_works_alone_looks_after_the_others(pair: list[Meetings], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks a silence counts, a sign of life does not; a failure counts at once."""
    monkeypatch.setattr(meeting, "LOST_AFTER", 0.2)
    for beat in range(3):
        pair[0].store.set("training/beat/1", str(beat))
        pair[0].watch()
        time.sleep(0.3)
    with pytest.raises(UserError, match=r"lost another process \(process 1 of 2, silent for 0.2 s\)"):
        pair[0].watch()
    pair[1].watch()  # sees process 0 for the first time
    pair[1].store.set(meeting.FAILURE, "[0, 3]")
    with pytest.raises(UserError, match="another process ended"):
        pair[1].watch()


def test_what_differs_is_named_in_all(pair: list[Meetings]) -> None:
    facts: list[dict[str, Any]] = [{"seed": 0, "data": "a", "lr": 1e-4}, {"seed": 1, "data": "a", "lr": 2e-4}]
    said = "processes were started with different settings: "
    said += "seed 0 in process 0, 1 in process 1; lr 0.0001 in process 0, 0.0002 in process 1"

    def end(rank: int) -> str:
        with pytest.raises(UserError) as caught:
            pair[rank].agree(facts[rank])
        assert caught.value.code == 2
        return caught.value.what

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(end, range(2))) == [said, said]
        list(pool.map(lambda one: one.agree({"same": [1, None]}), pair))


def test_who_never_starts_is_named(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meeting, "TOLD_AFTER", 0.2)
    monkeypatch.setattr(meeting, "JOIN_WITHIN", 1.0)
    with pytest.raises(UserError, match=r"after 1 s only 1 of 2 processes have joined \(missing: 1\)") as caught:
        meeting.join("gloo")
    assert caught.value.code == 1
    assert capsys.readouterr().err == (
        "note: process 0 waits: 1 of 2 processes have joined (missing: 1); it ends after 1 s\n"
    )


def test_a_first_process_that_never_starts(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(meeting, "TOLD_AFTER", 0.2)
    monkeypatch.setattr(meeting, "JOIN_WITHIN", 2.0)
    with pytest.raises(UserError, match=f"nobody answers at 127.0.0.1:{port}") as caught:
        meeting.join("gloo")
    assert caught.value.code == 1
    assert f"note: process 1 waits for an answer at 127.0.0.1:{port}" in capsys.readouterr().err


def test_a_port_in_use(port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        with pytest.raises(UserError, match=f"MASTER_PORT {port} is in use") as caught:
            meeting.join("gloo")
    assert caught.value.code == 2


@pytest.mark.parametrize("text", ["http", "0", "70000", "-1"])
def test_a_port_that_is_none(text: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", text)
    with pytest.raises(UserError, match=f"MASTER_PORT={text}: expected a port"):
        meeting.join("gloo")


def test_alone_there_is_nobody_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in meeting.JOINING:
        monkeypatch.delenv(name, raising=False)
    meeting.join("gloo")
    meeting.meet()
    meeting.agree({"a": os.getpid()})


WORDS = ["--save-every", "2", "--train.log_every", "1", "--sample-every", "2", "--lr", "1e-4"]


def test_work_longer_than_the_limit_of_the_process_group(latents: Path, tmp_path: Path) -> None:
    """Pictures of process 0 take 4 s, an exchange may take 2."""
    words = ["train_denoiser", "--latents", latents, *tiny.DENOISER, *WORDS, "--output", tmp_path / "run"]
    codes = ranks.start(2, tmp_path, *words, wrong={0: "impatient:4", 1: "impatient:0"})
    assert codes == [0, 0], ranks.said(tmp_path)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--seed 1", "train.seed 0 in process 0, 1 in process 1"),
        ("--batch-size 16", "train.batch_size 32 in process 0, 16 in process 1"),
        ("--save-every 3 --max-steps 5", "train.max_steps 6 in process 0, 5 in process 1; train.save_every 2 in"),
        ("--lr 2e-4", "optimizer.lr 0.0001 in process 0, 0.0002 in process 1"),
        ("--resume auto", "--resume None in process 0, auto in process 1"),
    ],
)
def test_processes_started_otherwise_end_together(flags: str, said: str, latents: Path, tmp_path: Path) -> None:
    words = ["train_denoiser", "--latents", latents, *tiny.DENOISER, *WORDS, "--output", tmp_path / "run"]
    codes = ranks.start(2, tmp_path, *words, wrong={1: f"words:{flags}"})
    assert codes == [2, 2], ranks.said(tmp_path)
    assert ranks.said(tmp_path).count("error: ") == 1 and said in ranks.said(tmp_path), ranks.said(tmp_path)
    assert not (tmp_path / "run").exists()
