"""Checkpoints: what damages them is found, what is damaged is never used, what is good is never lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from rights import deny

from training.errors import UserError
from training.files import atomic_write, file_sha256, write_bytes
from training.runs import checkpoint as checkpoint_module
from training.runs.checkpoint import Checkpoint, damage, score
from training.runs.checkpoints import Checkpoints
from training.runs.folder import Run
from training.runs.journal import Journal
from training.settings.decoding import load
from training.settings.sections import Train
from training.tensors import content_hash, load_tensors, save_tensors


def checkpoint(step: int, value: float | None = None) -> Checkpoint:
    weights = {"net.weight": torch.full((4, 3), float(step if value is None else value))}
    moments = {"net/net.weight.step": torch.tensor(float(step))}
    return Checkpoint(step, {"model": weights, "ema": weights, "optimizer": moments}, {"ema_updates": step})


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoints:
    """A run with checkpoints of steps 10 and 20."""
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (10, 20):
        checkpoints.save(checkpoint(step))
    return checkpoints


def newest(kept: Checkpoints) -> Path:
    return kept.folder / "step-00000020"


def test_round_trip_and_prune(kept: Checkpoints) -> None:
    path = kept.save(checkpoint(30))
    assert sorted(p.name for p in kept.folder.iterdir()) == ["latest", "step-00000020", "step-00000030"]
    assert (kept.folder / "latest").read_text() == "step-00000030\n" and kept.newest() == path
    again = kept.load(path)
    assert again.step == 30 and again.state == {"ema_updates": 30}
    assert torch.equal(again.tensors["model"]["net.weight"], torch.full((4, 3), 30.0))
    assert again.tensors["optimizer"]["net/net.weight.step"] == 30


def test_saving_from_an_earlier_step_drops_the_abandoned_future(kept: Checkpoints) -> None:
    kept.save(checkpoint(15))
    assert sorted(p.name for p in kept.folder.glob("step-*")) == ["step-00000010", "step-00000015"]
    kept.save(checkpoint(15, 7.0))  # the same step again
    assert kept.load(kept.folder / "step-00000015").tensors["model"]["net.weight"][0, 0] == 7


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")
DAMAGES = {
    **{f"flip {name}": lambda p, n=name: flip(p / n) for name in FILES},
    **{f"cut {name}": lambda p, n=name: os.truncate(p / n, 5) for name in FILES},
    **{f"lose {name}": lambda p, n=name: (p / n).unlink() for name in (*FILES, "manifest.json")},
    "empty": lambda p: os.truncate(p / "ema.safetensors", 0),
    "no object": lambda p: (p / "manifest.json").write_text("{}"),
    "a list": lambda p: (p / "manifest.json").write_text("[]"),
    "deep": lambda p: (p / "manifest.json").write_text("[" * 200_000),
    "an infinite format": lambda p: edit(p, lambda m: m.update(format=float("inf"))),
    "an infinite step": lambda p: edit(p, lambda m: m.update(step=float("inf"))),
    "no json": lambda p: (p / "manifest.json").write_bytes(b"\xff\x00"),
    "no step": lambda p: edit(p, lambda m: m.pop("step")),
    "unlisted": lambda p: edit(p, lambda m: m["files"].pop("state.json")),
    "linked": lambda p: link(p),
}


def edit(path: Path, change: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)  # type: ignore[operator]
    (path / "manifest.json").write_text(json.dumps(manifest))


def link(path: Path) -> None:
    """A file that lies elsewhere is not part of the checkpoint, even with the right bytes."""
    outside = path.parent.parent / "outside"
    (path / "state.json").rename(outside)
    (path / "state.json").symlink_to(outside)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_passed_over(kind: str, kept: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    DAMAGES[kind](newest(kept))
    assert kept.newest() == kept.folder / "step-00000010"
    said = capsys.readouterr().err
    assert "warning: checkpoint step-00000020 is damaged (" in said and "using step-00000010" in said
    with pytest.raises(UserError, match="step-00000020 is damaged") as caught:  # asked for by name: no fallback
        kept.load(newest(kept))
    assert caught.value.code == 4
    DAMAGES[kind](kept.folder / "step-00000010") if kind != "linked" else shutil.rmtree(kept.folder / "step-00000010")
    with pytest.raises(UserError, match="no usable checkpoint .* all damaged") as caught:
        kept.newest()
    assert caught.value.code == 4
    with pytest.raises(UserError):
        kept.find("auto")


def test_the_reason_names_the_file(kept: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    flip(newest(kept) / "ema.safetensors")
    kept.newest()
    assert "(ema.safetensors: sha256 differs)" in capsys.readouterr().err


def test_a_newer_format_is_not_damage(kept: Checkpoints) -> None:
    edit(newest(kept), lambda m: m.update(format=3))
    with pytest.raises(UserError, match=r"format 3 is newer than this program understands \(2\)"):
        kept.newest()


@pytest.mark.parametrize("file", ["model", "ema"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_never_saved(kept: Checkpoints, file: str, value: float) -> None:
    bad, before = checkpoint(30), sorted(p.name for p in kept.folder.iterdir())
    bad.tensors[file]["net.other"] = torch.tensor([1.0, value])  # type: ignore[index]
    with pytest.raises(UserError, match=r"refusing to save: 1 tensors are not finite \(first: net.other\)") as caught:
        kept.save(bad)
    assert caught.value.code == 5 and sorted(p.name for p in kept.folder.iterdir()) == before


def test_a_pickle_is_refused_by_content(kept: Checkpoints, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(canary),)

    weights = newest(kept) / "model.safetensors"
    for write in (lambda: torch.save(Payload(), weights), lambda: weights.write_bytes(pickle.dumps(Payload()))):
        write()
        size, digest = weights.stat().st_size, file_sha256(weights)
        edit(newest(kept), lambda m, s=size, d=digest: m["files"].update({weights.name: {"bytes": s, "sha256": d}}))
        with pytest.raises(UserError, match="refusing to load a pickle file; only safetensors is read") as caught:
            kept.load(newest(kept))
        assert caught.value.code == 4 and not canary.exists()


@pytest.mark.parametrize(
    "head", [b"", b"1234567", b"\xff" * 8 + b"{}", (1 << 63).to_bytes(8, "little"), b"<html></html>"]
)
def test_what_is_no_safetensors(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(head)
    with pytest.raises(UserError) as caught:
        load_tensors(tmp_path / "x.safetensors")
    assert caught.value.code == 4 and "x.safetensors" in caught.value.what


def test_leftovers(kept: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    leftover = kept.folder / ".tmp-step-00000030-99"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert kept.newest() == newest(kept) and leftover.exists()  # a reader, as generate is, lets a save go on
    kept.sweep()
    assert not leftover.exists() and f"removed unfinished checkpoint {leftover.name}" in capsys.readouterr().err


def test_a_failing_save_keeps_the_old_ones(kept: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("save_tensors", "write_json", "write_bytes", "sync_folder"):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left") as caught:
            patch.setattr(f"training.runs.checkpoints.{name}", full)
            kept.save(checkpoint(30))
        assert caught.value.code == 6 and not list(kept.folder.glob(".tmp*"))
    assert newest(kept).is_dir()


def test_safetensors_own_error_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        save_tensors(tmp_path / "missing" / "x.safetensors", {"a": torch.zeros(1)})
    assert caught.value.code == 6


def test_find(kept: Checkpoints, tmp_path: Path) -> None:
    assert kept.find(None) is None and kept.find("auto") == kept.find("latest") == newest(kept)
    assert kept.find("step-00000010") == kept.find(str(kept.folder / "step-00000010"))
    with pytest.raises(UserError, match="no checkpoint step-7") as caught:
        kept.find("step-7")
    assert "step-00000010, step-00000020" in caught.value.hint
    empty = Checkpoints(tmp_path / "none")
    assert empty.find("auto") is None
    with pytest.raises(UserError, match="no checkpoint in"):
        empty.find("latest")


def test_a_checkpoint_of_another_run_is_refused(kept: Checkpoints, tmp_path: Path) -> None:
    """Its step is not this run's. One of this run that lies elsewhere behind a link is its own."""
    other = Checkpoints(tmp_path / "other")
    theirs = other.save(checkpoint(20))
    for asked in (theirs, other.folder, tmp_path, kept.folder, kept.folder / ".", kept.folder / "..", "..", "."):
        with pytest.raises(UserError, match="is not a checkpoint of this run") as caught:
            kept.find(str(asked))
        assert caught.value.code == 4 and "--init-from" in caught.value.hint
    (kept.folder / "step-00000030").symlink_to(other.save(checkpoint(30)))
    assert kept.find("step-00000030") == kept.folder / "step-00000030"
    shutil.copytree(theirs, kept.folder / "copied")  # which sorts before all steps: they would be its future
    with pytest.raises(UserError, match="no checkpoint copied"):
        kept.find("copied")


def test_a_state_that_is_no_json(kept: Checkpoints) -> None:
    """Its manifest may vouch for it; looking for the best score passes over it."""
    state = newest(kept) / "state.json"
    for text in ("[" * 200_000, '{"score": 1' + "0" * 400 + "}"):
        state.write_text(text)
        assert score(newest(kept)) is None
    state.write_text("[" * 200_000)
    entry = {"bytes": state.stat().st_size, "sha256": file_sha256(state)}
    edit(newest(kept), lambda m: m["files"].update({"state.json": entry}))
    with pytest.raises(UserError, match="state.json: not readable as JSON") as caught:
        kept.load(newest(kept))
    assert caught.value.code == 4


def test_new_names_in_the_run_folder_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synced inside a folder is lost with the folder's own name: the run's, `checkpoints`, `metrics.jsonl`."""
    seen: list[tuple[Path, list[str]]] = []
    sync = os.fsync

    def noted(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        seen.append((path, sorted(os.listdir(path)) if path.is_dir() else []))
        sync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    run = Run(tmp_path / "run", "denoiser", load("denoiser", "smoke"), None).folder
    assert seen == [(tmp_path, ["run"])]
    journal = Journal(run, Train(), Accelerator(cpu=True))
    journal.look(1, {"loss": 1.0}, tmp_path)
    seen.clear()
    journal.state()
    assert [path for path, _ in seen] == [run / "metrics.jsonl", run] and "metrics.jsonl" in seen[1][1]
    seen.clear()
    Checkpoints(run).save(checkpoint(10))
    assert seen[0][0] == run and "checkpoints" in seen[0][1]
    seen.clear()
    Checkpoints(run).save(checkpoint(20))
    assert run not in [path for path, _ in seen]


def test_staged_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_content_hash() -> None:
    a, b = torch.arange(6.0), torch.ones(2, dtype=torch.bfloat16)
    whole = content_hash({"a": a, "b": b})
    assert whole == content_hash({"b": b, "a": a.clone()}) == content_hash({"a": a.view(3, 2).reshape(6), "b": b})
    others = [{"a": a.view(2, 3), "b": b}, {"a": a.double(), "b": b}, {"c": a, "b": b}, {"a": a + 1, "b": b}, {}]
    assert len({whole, *map(content_hash, others)}) == 6
    transposed = a.view(2, 3).t()
    assert content_hash({"a": transposed}) == content_hash({"a": transposed.contiguous()})


def steps(kept: Checkpoints) -> list[str]:
    return sorted(path.name for path in kept.folder.iterdir() if path.is_dir())


def test_pruning_removes_only_what_was_written_here(kept: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    """Notes beside a checkpoint, folders of other names, one of another step, one without a manifest: all stay."""
    (kept.folder / "step-00000010" / "notes.txt").write_text("mine")
    shutil.copytree(kept.folder / "step-00000020", kept.folder / "step-00000020-backup")
    shutil.copytree(kept.folder / "step-00000020", kept.folder / "step-00000005")
    (kept.folder / "step-00000004").mkdir()
    (kept.folder / "step-00000004" / "mine.safetensors").write_text("mine")
    (kept.folder / "step-notes").mkdir()
    for step in (30, 40, 50):
        kept.save(checkpoint(step))
    assert steps(kept) == ["step-00000004", "step-00000005", "step-00000010", "step-00000020-backup", "step-00000040",
                           "step-00000050", "step-notes"]  # fmt: skip
    assert (kept.folder / "step-00000010" / "notes.txt").read_text() == "mine"
    told = capsys.readouterr().err
    assert told.count("is not removed") == 3 and told.count("step-00000010 is not removed") == 1  # once, not at each


def test_a_save_puts_notes_aside(kept: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the same step is saved again, after a resume from an earlier one."""
    for number in (1, 2):
        (newest(kept) / "notes.txt").write_text(f"mine {number}")
        kept.save(checkpoint(20))
        assert (kept.folder / f"kept-step-00000020-{number}" / "notes.txt").read_text() == f"mine {number}"
    assert not (newest(kept) / "notes.txt").exists() and not damage(newest(kept))
    assert capsys.readouterr().err.count("it is kept-step-00000020-") == 2
    assert kept.newest() == kept.folder / "step-00000020"


def test_a_manifest_of_another_step_is_passed_over(kept: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    """To go on from there would count its steps wrong."""
    (kept.folder / "step-00000020").rename(kept.folder / "step-00000030")
    assert kept.newest() == kept.folder / "step-00000010"
    assert "step-00000030 is damaged (its manifest is that of step 20)" in capsys.readouterr().err
    with pytest.raises(UserError, match="its manifest is that of step 20"):
        kept.load(kept.folder / "step-00000030")


@pytest.mark.parametrize("text", [None, b"", b"step-00000099\n", b"../../x", b"\xff" * 1000, b"step-00000010/../x"])
def test_a_pointer_to_nothing_is_told(
    text: bytes | None, kept: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kept.newest() == newest(kept) and capsys.readouterr().err == ""
    pointer = kept.folder / "latest"
    pointer.write_text("step-00000010\n")  # behind, as after a kill: no harm
    assert kept.newest() == newest(kept) and capsys.readouterr().err == ""
    pointer.unlink() if text is None else pointer.write_bytes(text)
    assert kept.newest() == newest(kept)
    told = capsys.readouterr().err
    assert told.startswith("warning: ") and "latest" in told and "step-00000020" in told and told.count("\n") == 1


def test_a_checkpoint_that_may_not_be_read_is_not_damaged(kept: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """No older one stands in for it: the training since would be lost for a missing right."""
    deny(monkeypatch, "step-00000020/manifest.json")
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read \(Permission denied\)") as caught:
        kept.newest()
    assert caught.value.code == 4 and "damaged" not in str(caught.value)


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """checkpoints/ that leads out of the run: nothing is put there, and nothing there is pruned."""
    outside = Checkpoints(tmp_path / "outside")
    for step in (1, 2):
        outside.save(checkpoint(step))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(outside.folder)
    with pytest.raises(UserError, match="checkpoints is a link that leads out"):
        Checkpoints(tmp_path / "run").save(checkpoint(3))
    assert steps(outside) == ["step-00000001", "step-00000002"]


def test_a_checkpoint_is_hashed_once_and_read_file_by_file(
    kept: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the processes of a resume one verifies; each then holds one file at a time."""
    hashed, read = list[str](), list[str]()
    for name, told in (("file_sha256", hashed), ("load_tensors", read)):
        call = getattr(checkpoint_module, name)
        wrapper = lambda path, _call=call, _told=told: _told.append(path.name) or _call(path)  # noqa: E731
        monkeypatch.setattr(checkpoint_module, name, wrapper)
    path = kept.find("auto")
    assert path is not None and len(hashed) == len(set(hashed)) == 4
    checkpoint = kept.load(path, verified=True)
    assert len(hashed) == 4 and not read
    assert set(checkpoint.tensors["ema"]) and read == ["ema.safetensors"]
    assert list(checkpoint.tensors) == ["model", "ema", "optimizer"] and len(checkpoint.tensors) == 3
    hashed.clear()
    assert kept.find(path.name) == path and len(hashed) == 4  # one that is named is verified as well
