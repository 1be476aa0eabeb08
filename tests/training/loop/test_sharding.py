"""Weights shared out over processes train what replicas train; what they save, any number of processes continues."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ldm.backbones import BACKBONES
from ldm.conditioning import Cond
from training.errors import UserError
from training.loop.sharding import shard
from training.models.folders import find, weights
from training.runs.checkpoint import TENSOR_FILES
from training.runs.checkpoints import Checkpoints
from training.settings.sections import Train

pytestmark = pytest.mark.timeout(900)  # seconds of work, but many of them where the cores are shared

SHARED = ["--train.sharding", "full"]
# A short average and a rate that moves it: pictures, export and validation of other weights would be told from these.
FLAGS = ["--backbone.depth", "2", "--lr", "2e-3", "--optimizer.warmup", "0", "--optimizer.decay", "constant"]
FLAGS += ["--train.ema", "0.5", "--train.ema_lengths", "0.05,0.1", "--train.ema_every", "2", "--train.log_every", "1"]
FLAGS += ["--save-every", "2", "--train.keep_last", "9"]


@pytest.fixture(scope="module")
def words(latents: Path) -> list[object]:
    return ["train_denoiser", "--latents", latents, *tiny.DENOISER, *FLAGS]


@pytest.fixture(scope="module")
def alone(words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine steps of one process that holds all."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert tiny.call(*words, "--output", run, "--max-steps", 9) == 0
    return run


@pytest.fixture(scope="module")
def shared(words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of one process, four more of two, which take back what that one saved whole."""
    home = tmp_path_factory.mktemp("shared")
    given = [*words, "--output", home / "run", "--gradient-accumulation-steps", "2", *SHARED]
    assert tiny.call(*given, "--max-steps", 2) == 0
    codes = ranks.start(2, home, *given, "--max-steps", 6, "--resume", "auto")
    assert codes == [0, 0], ranks.said(home)
    return home / "run"


def same_numbers(ours: Path, theirs: Path, last: int) -> None:
    """All that is logged up to step `last`, within 1e-5."""
    first, second = ([r for r in tiny.rows(run) if "loss" in r and r["step"] <= last] for run in (ours, theirs))
    assert [row["step"] for row in first] == [row["step"] for row in second] == list(range(1, last + 1))
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7), a["step"]


def test_shared_out_they_train_as_one(shared: Path, alone: Path) -> None:
    same_numbers(shared, alone, 6)
    looks = [{row["step"]: row for row in tiny.rows(run) if "val/loss" in row} for run in (shared, alone)]
    assert looks[0][4] == pytest.approx(looks[1][4], rel=1e-5)
    final, averages = load_file(shared / "final" / "model.safetensors"), weights_of(alone, 6, "ema")
    assert final.keys() == load_file(alone / "final" / "model.safetensors").keys()
    for name, weight in final.items():
        torch.testing.assert_close(weight, averages[f"denoiser.backbone.{name}"], rtol=0, atol=1e-5)
    kept = [load_file(run / "ema" / "step-00000006.safetensors") for run in (shared, alone)]
    torch.testing.assert_close(*kept, rtol=0, atol=1e-5)


def weights_of(run: Path, step: int, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, read by one process."""
    return dict(Checkpoints(run).load(run / "checkpoints" / f"step-{step:08d}").tensors[kind])


@pytest.mark.parametrize("kind", TENSOR_FILES)
def test_a_checkpoint_in_parts_holds_what_a_whole_one_holds(kind: str, shared: Path, alone: Path) -> None:
    ours, theirs = (weights_of(run, 6, kind) for run in (shared, alone))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    path = shared / "checkpoints" / "step-00000006"
    assert find(path).weights == path and "backbone.out.weight" in weights(path, "denoiser")


def test_each_process_writes_its_half(shared: Path) -> None:
    """Weights, averages and moments: of the numbers that belong to both, each file has about as many."""
    counts = list[int]()
    for file in sorted((shared / "checkpoints" / "step-00000006").glob("shard-*")):
        with safe_open(file, "pt") as opened:
            counts.append(sum(opened.get_tensor(key).numel() for key in opened.keys()))  # noqa: SIM118
    assert len(counts) == 2 and 0.4 * sum(counts) < counts[0] < 0.6 * sum(counts)


@pytest.mark.parametrize("wrong", ["a byte", "a file", "an end"])
def test_a_damaged_part_is_noticed(wrong: str, shared: Path, tmp_path: Path) -> None:
    shutil.copytree(shared / "checkpoints", tmp_path / "checkpoints")
    part = next((tmp_path / "checkpoints" / "step-00000006").glob("shard-00002-*"))
    data = part.read_bytes()
    part.write_bytes({"a byte": data[:-1] + bytes([data[-1] ^ 1]), "an end": data[:-1], "a file": b""}[wrong])
    if wrong == "a file":
        part.unlink()
    assert Checkpoints(tmp_path).newest() == tmp_path / "checkpoints" / "step-00000004"


def test_one_goes_on_where_two_ended(words: list[object], shared: Path, alone: Path, tmp_path: Path) -> None:
    shutil.copytree(shared, tmp_path / "run")
    again = [*words, "--output", tmp_path / "run", "--resume", "auto", "--max-steps", 9, "--train.sharding", "none"]
    assert tiny.call(*again) == 0
    same_numbers(tmp_path / "run", alone, 9)


@pytest.mark.many
def test_two_four_one(words: list[object], shared: Path, alone: Path, tmp_path: Path) -> None:
    """Whole tensors, then two parts, four, and whole again."""
    shutil.copytree(shared, tmp_path / "run")
    again = [*words, "--output", tmp_path / "run", "--resume", "auto", *SHARED, "--max-steps"]
    assert ranks.start(4, tmp_path, *again, 8) == [0] * 4, ranks.said(tmp_path)
    assert len(list((tmp_path / "run" / "checkpoints" / "step-00000008").glob("shard-*"))) == 4
    assert tiny.call(*again, 9) == 0
    same_numbers(tmp_path / "run", alone, 9)


def test_a_spike_in_one_and_a_full_disk_of_the_other(words: list[object], tmp_path: Path) -> None:
    """The spike of process 1 is skipped by both; where its disk is full, both end, and what was saved stays."""
    run, flags = tmp_path / "run", ["--train.spike_factor", "10", "--max-steps", "24", "--save-every", "11"]
    given = [*words, "--output", run, *flags, "--sample-every", "100", *SHARED]
    wrong = {0: "spike:21", 1: "checkpoint.file:2=enospc"}
    assert ranks.start(2, tmp_path, *given, wrong=wrong) == [6, 6], ranks.said(tmp_path)
    said, rows = ranks.said(tmp_path), [row for row in tiny.rows(run) if "loss" in row]
    assert [row["step"] for row in rows if "skipped" in row] == [22] and "step 21 is skipped: grad_norm" in said
    assert "No space left on device" in said and said.count("error: ") == 1 and "Traceback" not in said, said
    assert Checkpoints(run).newest() == run / "checkpoints" / "step-00000011" and not list(run.rglob(".tmp-*"))
    assert json.loads((run / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("kind", [kind for kind in BACKBONES if kind.small], ids=lambda kind: kind.__name__)
def test_units_are_called_one_by_one_and_hold_most_weights(kind: type) -> None:
    """No part of one is called but from within it: its weights are there only while it is at work."""
    network = kind(**kind.small).build(channels=4, context_dim=8, pooled_dim=8)
    units, inside, now = network.units(), set[nn.Module](), list[nn.Module]()
    for unit in units:
        assert not inside & set(unit.modules())
        inside |= set(unit.modules())
        unit.register_forward_pre_hook(lambda module, _: now.append(module))
        unit.register_forward_hook(lambda *_: now.pop() and None)
        for part in unit.modules():
            part.register_forward_pre_hook(lambda _, __, own=unit: None if now == [own] else pytest.fail("outside"))
    held = sum(p.numel() for unit in units for p in unit.parameters())
    assert held > 0.5 * sum(p.numel() for p in network.parameters())
    cond = Cond(torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 8))
    network(torch.randn(2, 4, 8, 8), torch.rand(2), cond)


@pytest.mark.parametrize(
    ("key", "value"),
    [("compile", True), ("save_async", True), ("mixed_precision", "fp16"), ("micro_batch_size", "auto")],
)
def test_what_does_not_go_with_it(key: str, value: object) -> None:
    Train(**{key: value})
    with pytest.raises(ValueError, match=f"sharding: full does not go with {key} {str(value).lower()}; set {key} to "):
        Train(sharding="full", **{key: value})


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["train_autoencoder", "--data", "{shapes}", *tiny.AUTOENCODER], "an autoencoder"),
        (["train_denoiser", "--latents", "{latents}", *tiny.DENOISER, "--objective.kind", "shortcut"], "kind shortcut"),
        (["train_denoiser", "--latents", "{latents}", *tiny.DENOISER, "--optimizer.matrices", "muon"], "whole"),
    ],
    ids=["stage one", "few steps", "muon"],
)
def test_who_shares_nothing_out(given: list[str], why: str, shapes: Path, latents: Path) -> None:
    problem = tiny.refused(*(word.format(shapes=shapes, latents=latents) for word in given), "--dry-run", *SHARED)
    assert problem.code == 2 and problem.what.startswith("train.sharding full: not with ") and why in problem.what
    assert problem.hint.endswith("give --train.sharding none")


def test_one_process_says_that_it_holds_all(
    words: list[object], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert tiny.call(*words, "--output", tmp_path / "run", "--max-steps", 1, *SHARED) == 0
    assert "note: train.sharding full: one process holds all" in capsys.readouterr().err


def test_a_checkpoint_of_other_tensors_is_refused(shared: Path) -> None:
    from training.runs import parts

    path = shared / "checkpoints" / "step-00000006"
    targets = {name: torch.zeros(size) for name, size in parts.sizes(path, "model").items()}
    parts.read_into(path, "model", targets)
    torch.testing.assert_close(targets, weights_of(shared, 6, "model"), rtol=0, atol=0)
    first = next(iter(targets))
    for wrong in ({**targets, first: torch.zeros(1)}, {**targets, "more": torch.zeros(1)}):
        with pytest.raises(UserError, match="does not fit its config: model "):
            parts.read_into(path, "model", wrong)
    del targets[first]
    with pytest.raises(UserError, match=f"does not fit its config: model {first}"):
        parts.read_into(path, "model", targets)


def test_a_part_that_cannot_be_read_is_told(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch raises there is no Exception, which would pass by whoever tells of one."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    def broken(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(HuggingFaceStorageReader, "read_data", broken)
    with pytest.raises(UserError, match=r"cannot be read \(the disk is gone\)") as caught:
        weights_of(shared, 6, "model")
    assert caught.value.code == 4 and caught.value.hint == "use --resume auto to take the newest sound one"


def test_units_are_shared_out_before_what_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """And autocast keeps no rounded weights beyond a call."""
    from torch.distributed import device_mesh, fsdp

    block = nn.Linear(2, 2)
    network, done = nn.Sequential(block, nn.Linear(2, 2)), list[nn.Module]()
    monkeypatch.setattr(device_mesh, "init_device_mesh", lambda kind, sizes: (kind, sizes))
    monkeypatch.setattr(fsdp, "fully_shard", lambda part, mesh: done.append(part) or mesh)
    prepared = {"device_placement": False, "evaluation_mode": True}
    prepare = lambda part, **how: part if how == prepared else None  # noqa: E731
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=2, prepare_model=prepare)
    stage = SimpleNamespace(networks={"denoiser": network}, units=lambda: [block])
    shard(stage, accelerator)  # type: ignore[arg-type]
    assert done == [block, network] and stage.wrapped == {"denoiser": network}
    assert accelerator.autocast_handler.cache_enabled is False
