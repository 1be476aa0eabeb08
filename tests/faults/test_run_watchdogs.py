"""Watchdogs: what stops a step, what skips it, and that the detector's memory survives a resume."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator

from training.errors import UserError
from training.loop.watchdogs import IN_A_ROW, LEAST, Watchdogs, checksum, explain
from training.machine import faults
from training.machine.memory import memory_needed
from training.settings.sections import Train
from training.stages.denoiser import DenoiserStage
from training.tensors import load_tensors


@pytest.fixture
def dogs(tmp_path: Path) -> Watchdogs:
    return Watchdogs(tmp_path, Train(spike_factor=10), Accelerator(cpu=True))


def judge(dogs: Watchdogs, step: int, loss: float = 1.0, norm: float = 1.0) -> bool:
    return dogs.judge(step, [torch.tensor(1.0), torch.tensor(loss)], {"grad_norm/net": torch.tensor(norm)}, keys)


def keys(process: int, part: int) -> list[str]:
    return [f"{process}-{part}-{i}" for i in range(6)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stops(dogs: Watchdogs, bad: float, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        judge(dogs, 57, loss=bad)
    assert caught.value.code == 5
    assert caught.value.what == "loss is not finite at step 57 (samples 0-1-0, 0-1-1, 0-1-2, 0-1-3, 0-1-4, ...)"
    assert json.loads((tmp_path / "stopped-at-step-00000057.json").read_text())["samples"] == keys(0, 1)
    with pytest.raises(UserError, match="grad_norm of the net is not finite at step 58") as caught:
        judge(dogs, 58, norm=abs(bad))
    assert caught.value.code == 5
    assert len(json.loads((tmp_path / "stopped-at-step-00000058.json").read_text())["samples"]) == 12


def test_a_finite_spike_is_skipped_and_counted(dogs: Watchdogs, capsys: pytest.CaptureFixture[str]) -> None:
    assert judge(dogs, 0, norm=1e9)  # nothing is usual yet
    assert all(judge(dogs, n) for n in range(1, LEAST))
    assert judge(dogs, 20, norm=9.9) and not judge(dogs, 21, norm=10.1) and judge(dogs, 22)
    assert not judge(dogs, 23, norm=1e9) and dogs.skipped == 2
    assert "step 23 is skipped: grad_norm/net 1e+09 is over 10 times its median 1 (2 skipped" in capsys.readouterr().err


@pytest.mark.parametrize(("seen", "taken"), [(2, True), (LEAST - 1, True), (LEAST, False)])
def test_a_norm_is_judged_once_twenty_were_seen(dogs: Watchdogs, seen: int, taken: bool) -> None:
    """The first ones are far from what will be usual."""
    assert all(judge(dogs, n) for n in range(seen))
    assert judge(dogs, seen, norm=1e3) == taken


def test_a_spike_is_judged_by_the_median_of_the_last_hundred(dogs: Watchdogs) -> None:
    """After 100 norms of 1, 50 of 5 leave the median at 3 and 51 at 5: what 10 times it is follows."""
    assert all(judge(dogs, n) for n in range(100))
    assert all(judge(dogs, 100 + n, norm=5.0) for n in range(50))
    assert not judge(dogs, 150, norm=30.1)  # a spike is noted as well: 49 of 1, 50 of 5, and itself
    assert judge(dogs, 151, norm=49.9) and not judge(dogs, 152, norm=50.1)


def test_the_detector_goes_on_after_a_resume(dogs: Watchdogs, tmp_path: Path) -> None:
    values = [1.0, 2.0, 0.1 + 0.2] * 10 + [30.0]
    for n, value in enumerate(values):
        judge(dogs, n, norm=value)
    other = Watchdogs(tmp_path, Train(spike_factor=10), Accelerator(cpu=True))
    other.load(json.loads(json.dumps(dogs.state())))
    assert other.state() == dogs.state() and other.skipped == other.in_a_row == 1
    assert other.recent["grad_norm/net"].maxlen == dogs.recent["grad_norm/net"].maxlen


def test_too_many_in_a_row(dogs: Watchdogs) -> None:
    assert all(judge(dogs, n) for n in range(40))
    assert not any(judge(dogs, 40 + n, norm=1e3) for n in range(IN_A_ROW - 1))
    with pytest.raises(UserError, match="20 steps in a row were skipped, the last at step 59") as caught:
        judge(dogs, 59, norm=1e3)
    assert caught.value.code == 5


@pytest.fixture
def scaled(dogs: Watchdogs) -> Watchdogs:
    """Watchdogs of a training in fp16."""

    class Scaled:
        scaler = object()

        def __getattr__(self, name: str) -> Any:
            return getattr(accelerator, name)

    accelerator, dogs.accelerator = dogs.accelerator, Scaled()  # type: ignore[assignment]
    return dogs


def test_the_twentieth_overflow_in_a_row_stops(scaled: Watchdogs) -> None:
    assert not any(judge(scaled, n, norm=float("inf")) for n in range(IN_A_ROW - 1))
    with pytest.raises(UserError, match="20 steps in a row were skipped, the last at step 19") as caught:
        judge(scaled, 19, norm=float("inf"))
    assert caught.value.code == 5


def test_an_overflow_is_routine_under_a_scaler(scaled: Watchdogs) -> None:
    dogs = scaled
    assert not any(judge(dogs, n, norm=float("inf")) for n in range(IN_A_ROW - 1)) and dogs.skipped == 0
    assert judge(dogs, 19) and not judge(dogs, 20, norm=float("nan"))
    assert dogs.overflows == IN_A_ROW and dogs.skipped == 0
    with pytest.raises(UserError, match="loss is not finite"):  # scaling down does not mend a loss
        judge(dogs, 21, loss=float("nan"))


def test_off_by_default(tmp_path: Path) -> None:
    dogs = Watchdogs(tmp_path, Train(), Accelerator(cpu=True))
    assert all(judge(dogs, n, norm=10.0 ** (n % 9)) for n in range(60)) and not dogs.recent


def test_checksum() -> None:
    weight = torch.randn(8, 4, 3, 3)
    assert checksum(weight) == checksum(weight.to(memory_format=torch.channels_last))
    other = weight.clone()
    other[3, 2, 1, 0] = torch.nextafter(other[3, 2, 1, 0], torch.tensor(9.0))  # the last bit of one number
    assert checksum(weight) != checksum(other)
    for dtype in (torch.bfloat16, torch.float64, torch.int8):
        assert checksum(torch.ones(3, dtype=dtype)).dtype == torch.int64


@pytest.mark.parametrize(
    "failure",
    [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_is_explained(failure: RuntimeError) -> None:
    told = explain(failure, 3, 16, 64)
    assert isinstance(told, UserError) and told.code == 6
    assert told.what == "out of memory at step 3 with a micro-batch of 16"
    assert "--micro-batch-size 8, or auto, trains the same" in told.hint and "64" in told.hint
    assert told.hint.count("; or ") == 2  # three ways on
    assert "--micro-batch-size 8 trains the same" in getattr(explain(failure, 3, 16, 64, auto=True), "hint", "")
    assert "--micro-batch-size" not in getattr(explain(failure, 3, 1, 64), "hint", "")  # there is no smaller one
    other = RuntimeError("shapes do not match")
    assert explain(other, 3, 16, 64) is other


def test_what_was_needed_is_estimated() -> None:
    """The peak so far and what could not be had: more than the latter alone."""
    text = "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate {}."
    small, large = (memory_needed(text.format(size)) for size in ("512 bytes", "4398046511104 bytes. Error code 12"))
    first = re.compile(r" \(at least ([\d,.]+) GB needed, ([\d.]+) GB available\)")
    held, there = (float(number) for number in (first.match(small) or pytest.fail(small)).groups())
    assert 0 < held < there
    more = float((first.match(large) or pytest.fail(large))[1])
    assert 4398 + held - 0.2 < more < 4398 + held + 1
    assert memory_needed("Tried to allocate 2.00 GiB. GPU") and not memory_needed("out of memory")
    told = explain(RuntimeError(text.format("512 bytes")), 3, 16, 64)
    assert isinstance(told, UserError) and told.what.startswith("out of memory at step 3 with a micro-batch of 16 (at")


def test_a_compiler_that_is_not_there_is_explained() -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    told = explain(InvalidCxxCompiler(), 0, 16, 64)
    assert isinstance(told, UserError) and told.code == 2 and "--train.compile false" in told.hint


@pytest.mark.parametrize("kind", ["NaN", "memory"])
def test_a_training_stops_before_the_weights(
    kind: str, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, run = DenoiserStage.backward, tmp_path / "run"

    def backward(self: DenoiserStage, batch: Any, step: int, share: float) -> Any:
        if step == 3 and kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        values = kept(self, batch, step, share)
        return {**values, "loss": values["loss"] * float("nan")} if step == 3 else values

    monkeypatch.setattr(DenoiserStage, "backward", backward)
    words = ("--latents", latents, "--output", run, *tiny.DENOISER, "--save-every", "2", "--train.log_every", "100")
    problem = tiny.refused("train_denoiser", *words)
    assert problem.code == {"NaN": 5, "memory": 6}[kind] and "at step 3" in problem.what
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000002"]
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    if kind == "NaN":  # on a step that is not a logging one; what led to it is in the log
        assert [row["step"] for row in tiny.rows(run) if "loss" in row] == [1, 2, 3]
        assert len(json.loads((run / "stopped-at-step-00000003.json").read_text())["samples"]) == 32
    monkeypatch.setattr(DenoiserStage, "backward", kept)
    assert tiny.call("train_denoiser", *words, "--resume", "auto") == 0


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Memory for 8 images at a time from step 2 on, running out after the backward pass; (step, images) of each."""
    kept = DenoiserStage.backward
    tried: list[tuple[int, int]] = []

    def backward(self: DenoiserStage, batch: Any, step: int, share: float) -> Any:
        tried.append((step, len(batch.slots)))
        values = kept(self, batch, step, share)
        if step >= 2 and len(batch.slots) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return values

    monkeypatch.setattr(DenoiserStage, "backward", backward)
    return tried


def test_a_micro_batch_that_shrinks(
    narrow: list[tuple[int, int]],
    latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The losses, and but for rounding the weights, of a run that began with what fits; resumed, it goes on so."""
    run, flags = tmp_path / "run", ["--train.log_every", "1", "--save-every", "3", "--lr", "1e-4"]
    flags += ["--times.kind", "loss-aware", "--times.bins", "4"]  # the stage gathers losses over a step's passes
    words = ["train_denoiser", "--latents", latents, *tiny.DENOISER, *flags]
    auto = [*words, "--output", run, "--micro-batch-size", "auto", "--resume", "auto"]
    faults.visits.clear()
    monkeypatch.setenv("LDM_FAULT", "step:5=term")
    assert tiny.call(*auto) == 143
    said = capsys.readouterr().err
    assert said.count("note: out of memory at step 2 with a micro-batch of 32; going on with 16 (the global batch") == 1
    assert said.count("note: out of memory at step 2 with a micro-batch of 16; going on with 8 (the global batch") == 1
    monkeypatch.delenv("LDM_FAULT")
    assert tiny.call(*auto) == 0 and "out of memory" not in capsys.readouterr().err
    sizes = {step: [size for other, size in narrow if other == step] for step, _ in narrow}
    assert sizes == {0: [32], 1: [32], 2: [32, 16, 8, 8, 8, 8], **{step: [8] * 4 for step in (3, 4, 5)}}
    assert tiny.call(*words, "--output", tmp_path / "begun", "--micro-batch-size", "8") == 0
    ours, theirs = tiny.rows(run), tiny.rows(tmp_path / "begun")
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-6)
    weights, begun = (load_tensors(r / "final" / "model.safetensors") for r in (run, tmp_path / "begun"))
    for name, weight in begun.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4)


def test_a_micro_batch_of_one_that_does_not_fit(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def backward(self: DenoiserStage, batch: Any, step: int, share: float) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(DenoiserStage, "backward", backward)
    words = ("--latents", latents, "--output", tmp_path / "run", *tiny.DENOISER, "--micro-batch-size", "auto")
    problem = tiny.refused("train_denoiser", *words, "--batch-size", "12")
    assert problem.code == 6 and problem.what == "out of memory at step 0 with a micro-batch of 1"
    halved = re.findall(r"a micro-batch of (\d+); going on with (\d+)", capsys.readouterr().err)
    assert halved == [("12", "6"), ("6", "3"), ("3", "1")]
