"""Rows H1 and H2 of the battery of faults: pickles and forged safetensors files; I1 and I2 for pack and encode."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peaks import told
from PIL import Image

from training.doors.make_shards import main
from training.errors import UserError
from training.guarding import check_output
from training.shards.reading import ShardSet
from training.shards.verifying import verify
from training.tensors import PICKLES, load_tensors, save_tensors


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def refused(path: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        load_tensors(path)
    assert caught.value.code == 4 and str(path) in caught.value.what and "\n" not in caught.value.what
    return caught.value


@pytest.mark.parametrize("name", ["model.pt", "model.ckpt", "pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("form", ["torch", "old torch", *[f"protocol {i}" for i in range(6)]])
def test_h1_pickles_are_never_opened(tmp_path: Path, name: str, form: str) -> None:
    canary, path = Canary(tmp_path / "canary"), tmp_path / name
    if "torch" in form:
        torch.save({"weight": canary}, path, _use_new_zipfile_serialization=form == "torch")
    else:
        path.write_bytes(pickle.dumps({"weight": canary}, int(form[-1])))
    said = refused(path).what
    assert not canary.path.exists()
    if form not in ("protocol 0", "protocol 1"):  # which begin with no mark of their own
        assert "refusing to load a pickle file; only safetensors is read" in said
    if "protocol" in form:
        pickle.loads(path.read_bytes())
        assert canary.path.exists()  # the payload works


def test_h1_a_header_that_begins_as_a_pickle_does(tmp_path: Path) -> None:
    """A safetensors file begins with its header's length: at 640 bytes with those of a pickle of protocol 2."""
    path, seen = tmp_path / "x.safetensors", 0
    for width in range(1, 2000):
        save_tensors(path, {"w": torch.ones(1)}, {"format": "p" * width}) if width % 8 == 0 else None
        if width % 8 == 0 and path.read_bytes()[:2] in [mark[:2] for mark in PICKLES]:
            assert torch.equal(load_tensors(path)["w"], torch.ones(1))
            seen += 1
    assert seen >= 3


def forged(header: bytes | dict[str, Any], data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int = 0, end: int = 8, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [2] if shape is None else shape, "data_offsets": [start, end]}


FORGED: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x05\0\0",
    "length 2^63": forged({"a": entry()}, length=1 << 63),
    "length beyond the file": forged({"a": entry()}, length=10_000),
    "not UTF-8": forged(b'{"\xff": 1}'),
    "not JSON": forged(b"{oops"),
    "a list": forged(b"[1, 2]"),
    "deep": forged(b"[" * 100_000),
    "duplicate key": forged(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2)),
    "duplicate field": forged(b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8],"shape":[2]}}'),
    "negative offset": forged({"a": entry(-8, 0)}),
    "overlap": forged({"a": entry(), "b": entry(4, 12)}, bytes(12)),
    "hole": forged({"a": entry(), "b": entry(12, 20)}, bytes(20)),
    "beyond the end": forged({"a": entry(0, 1 << 40, [1 << 38])}),
    "overflowing shape": forged({"a": entry(0, 8, [1 << 62, 1 << 62])}),
    "shape and dtype": forged({"a": entry(0, 8, [3])}),
    "unknown dtype": forged({"a": entry(dtype="X7")}),
    "trailing bytes": forged({"a": entry()}, bytes(9)),
    "entry of another kind": forged({"a": [0, 8]}),
}


@pytest.mark.parametrize("case", FORGED)
def test_h2_forged_headers(tmp_path: Path, case: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(FORGED[case])
    refused(path)


def test_h2_duplicates_are_named_and_nothing_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(FORGED["duplicate key"])
    assert "'a' is given twice" in refused(path).what
    path.write_bytes(forged({"none": entry(0, 0, [0, 5]), "a": entry()}))
    assert load_tensors(path)["none"].shape == (0, 5)


def test_h2_a_million_tensors_are_refused_unread(tmp_path: Path) -> None:
    """And a sound file is read in less than twice its size."""
    header = (
        b"{" + b",".join(b'"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**6)) + b"}"
    )
    (tmp_path / "many.safetensors").write_bytes(forged(header, b""))
    save_tensors(tmp_path / "sound.safetensors", {"w": torch.zeros(25_000_000)})
    code = f"""
import torch, safetensors.torch
from pathlib import Path
from training.files import UserError
from training.tensors import load_tensors
start = peak()
try:
    load_tensors(Path({str(tmp_path)!r}) / "many.safetensors")
except UserError as error:
    print(error.code, peak() - start)
load_tensors(Path({str(tmp_path)!r}) / "sound.safetensors")["w"].sum()  # which reads what was only mapped
print(0, peak() - start)
"""
    (refusal, grown), (_, whole) = [map(int, line.split()) for line in told(code)]
    assert refusal == 4 and grown < 20_000 and 90_000 < whole < 200_000  # kB


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("words")
    return folder


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))  # the kernel's answer is EFBIG, root or not
sys.argv = {words!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def limited(limit: int, script: str, *words: object) -> subprocess.CompletedProcess[str]:
    """A script in a process that cannot write files beyond `limit` bytes: a disk that fills up."""
    path = str(tiny.SCRIPTS / f"{script}.py")
    return tiny.spawn("-c", LIMITED.format(limit=limit, words=[path, *map(str, words)], script=path))


def test_i1_disk_full_while_packing(tmp_path: Path) -> None:
    source, target = pictures(tmp_path / "in", 12), tmp_path / "out"
    words = ("pack", source, "--output", target, "--val-fraction", "0", "--samples-per-shard", "4")
    done = limited(30_000, "make_shards", *words)
    assert done.returncode == 6 and "Traceback" not in done.stderr
    assert "error: cannot write" in done.stderr and "free)" in done.stderr and "hint: free disk space" in done.stderr
    assert not list(target.glob(".*")) and not list(target.glob("*.tar"))  # staging removed
    main(list(map(str, words)))
    assert verify(target).problems == () and len(ShardSet(target)) == 12


def test_i1_and_f5_disk_full_while_encoding(shapes: Path, autoencoder: Path, tmp_path: Path) -> None:
    target = tmp_path / "latents"
    words = ("--autoencoder", autoencoder, "--data", shapes, "--output", target, "--device", "cpu")
    done = limited(60_000, "encode_latents", *words)
    assert done.returncode == 6 and "Traceback" not in done.stderr and "error: cannot write" in done.stderr
    assert not list(target.glob(".*")) and not (target / "index.json").exists()
    assert tiny.call("encode_latents", *words) == 0
    assert verify(target).problems == ()


def unwritable(tmp_path: Path) -> list[Path]:
    """Places where nobody, root included, can make a folder."""
    (tmp_path / "file").write_text("mine")
    return [tmp_path / "file", tmp_path / "file" / "below" / "it", Path("/proc/none/here")]


def test_i2_outputs_that_cannot_be(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autoencoder: Path
) -> None:
    source = pictures(tmp_path / "in", 1)

    def built(*arguments: object) -> None:
        raise AssertionError("the model was built before the folder was looked at")

    monkeypatch.setattr("training.encoding.data_set.load_autoencoder", built)
    for place in unwritable(tmp_path):
        problem = tiny.refused("make_shards", "pack", source, "--output", place)
        assert problem.code == 6, problem
        if not str(place).startswith("/proc"):
            problem = tiny.refused("encode_latents", "--autoencoder", autoencoder, "--data", shapes, "--output", place)
            assert problem.code == 6 and "is not a folder" in problem.what
    assert (tmp_path / "file").read_text() == "mine"
    deep = tmp_path / "a" / "b" / "c"  # missing parents are made
    main(["pack", str(source), "--output", str(deep)])
    assert len(ShardSet(deep)) == 1


def test_i2_a_read_only_folder(read_only: Path, shapes: Path, autoencoder: Path, tmp_path: Path) -> None:
    encode = ("--autoencoder", autoencoder, "--data", shapes)
    train = ("--data", shapes, *tiny.AUTOENCODER)
    for script, words in (("make_shards", ("pack", pictures(tmp_path / "in", 1))), ("encode_latents", encode),
                          ("train_autoencoder", train)):  # fmt: skip
        for output in (read_only, read_only / "deep" / "out"):
            problem = tiny.refused(script, *words, "--output", output)
            assert problem.code == 6 and str(read_only) in problem.what and "another --output" in problem.hint


def test_i1_space_is_asked_for_beforehand(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs 1000000.0 GB, [\d.]+ [GM]B free") as caught:
        check_output(tmp_path / "out", 10**15)
    assert caught.value.code == 6 and not (tmp_path / "out").exists()


def test_staging_lies_beside_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny temporary partition does not matter: nothing is staged there."""
    seen: list[Path] = []
    whole: Callable[..., Path] = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (seen.append(self), whole(self, target))[1])
    main(["pack", str(pictures(tmp_path / "in", 2)), "--output", str(tmp_path / "out")])
    assert seen and all(path.parent == tmp_path / "out" for path in seen)
