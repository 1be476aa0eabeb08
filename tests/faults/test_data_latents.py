"""Rows F (latents and embeddings) of the battery of faults, and the policy on samples that cannot be read."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load as load_safetensors

from autoencoder.kl import KLAutoencoder
from training.data.images import Images
from training.data.latents import Latents
from training.data.loader import stream
from training.data.order import Batches, DataOrder, Slot, substitute
from training.encoding import shard
from training.errors import UserError
from training.models.captions_read import CaptionTally
from training.shards.index import read_index, write_index
from training.shards.reading import ShardSet
from training.shards.verifying import verify
from training.shards.writing import ShardWriter
from training.tensors import load_tensors, save_tensors

LATENT = {"latent": {"shape": [4, 2, 2], "dtype": "float16", "picture": [8, 8], "factor": 4}}


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def latents(folder: Path, count: int, broken: dict[int, dict[str, bytes]]) -> ShardSet:
    """Sample i is filled with i; the fields of `broken` are put in its place."""
    folder.mkdir()
    writer = ShardWriter(folder, "train")
    for i in range(count):
        fields = {"moments.npy": npy(np.full((4, 2, 2), i, np.float16)), "json": b'{"captions": ["words"]}'}
        writer.add(f"{i:04d}", fields | broken.get(i, {}))
    write_index(folder, writer.finish(), LATENT, "latents")
    return ShardSet(folder)


NAN = {"moments.npy": npy(np.full((4, 2, 2), np.nan, np.float16))}
BROKEN = {
    "not finite": NAN,
    "no array": {"moments.npy": b"words"},
    "another shape": {"moments.npy": npy(np.zeros((4, 2, 3), np.float16))},
    "another type": {"moments.npy": npy(np.zeros((4, 2, 2), np.float32))},
    "no captions": {"json": b"{}"},
    "captions of no kind": {"json": b'{"captions": [1]}'},
    "no JSON": {"json": b"[" * 5000},
}


@pytest.mark.parametrize("case", BROKEN)
def test_f1_and_f4_broken_latents_follow_the_policy(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = latents(tmp_path / "x", 150, {7: BROKEN[case]})
    slots = [Slot(i, 0, i) for i in range(5, 10)]
    with pytest.raises(UserError, match="0007: ") as caught:
        Latents(shards, on_bad_data="error").__getitems__(slots)
    assert caught.value.code == (5 if case == "not finite" else 3)
    data = Latents(shards, seed=3)
    batch = data.__getitems__(slots)
    stand_in = substitute(Slot(7, 0, 7), 0, 150, 3).index
    assert batch.data[:, 0, 0, 0].tolist() == [5, 6, stand_in, 8, 9] and batch.slots.tolist() == [5, 6, 7, 8, 9]
    assert list(data.bad) == [7] and "warning: sample left out, another in its place: 0007" in capsys.readouterr().err
    data.__getitems__(slots)
    assert capsys.readouterr().err == "" and shards.read(7)["json"]  # said once; never deleted
    assert data.captions(7) == ([""] if "json" in BROKEN[case] else ["words"])


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_skipped_slots_are_the_same_in_every_division(tmp_path: Path, workers: int) -> None:
    """The stream with substitutes is a function of (seed, slot): not of workers, processes or micro-batches."""
    shards = latents(tmp_path / "x", 120, {7: NAN, 50: {"json": b"?"}})
    order = DataOrder(120, 24, 5)
    whole = Latents(shards, seed=5)
    wanted = {s: v for b in stream(whole, Batches(order, 24, 1, 0, 1, 0, 7), 0)
              for s, v in zip(b.slots.tolist(), b.data[:, 0, 0, 0].tolist(), strict=True)}  # fmt: skip
    found: dict[int, float] = {}
    bad: set[int] = set()
    for process in range(2):
        part = Latents(shards, seed=5)
        for batch in stream(part, Batches(order, 6, 2, process, 2, 0, 7), workers):
            found |= zip(batch.slots.tolist(), batch.data[:, 0, 0, 0].tolist(), strict=True)
        bad |= set(part.bad)
    assert found == wanted and len(found) == 7 * 24 and bad == set(whole.bad) == {7, 50}


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_one_percent_is_refused(tmp_path: Path, workers: int) -> None:
    shards = latents(tmp_path / "x", 120, dict.fromkeys((3, 30, 90), NAN))
    with pytest.raises(UserError, match="3 of 120 samples cannot be read, more than 1%: 0") as caught:
        list(stream(Latents(shards), Batches(DataOrder(120, 30, 0), 30, 1, 0, 1, 0, 5), workers))
    assert caught.value.code == 3 and "make_shards.py verify" in caught.value.hint
    everything = latents(tmp_path / "y", 30, dict.fromkeys(range(30), NAN))
    with pytest.raises(UserError, match="not finite"):
        Latents(everything)[0]


def test_f1_verify_finds_stored_ones(tmp_path: Path) -> None:
    latents(tmp_path / "x", 12, {7: NAN, 9: {"text.safetensors": b"?" * 40}})
    problems = verify(tmp_path / "x").problems
    assert len(problems) == 2
    assert "0007: moments.npy is not finite" in problems[0] and "0009: text.safetensors cannot" in problems[1]
    problem = tiny.refused("make_shards", "verify", tmp_path / "x")
    assert problem.code == 3 and "0007" in problem.what
    assert tiny.call("make_shards", "verify", tmp_path / "x", "--on-bad-data", "skip") == 0


def words(autoencoder: Path, data: Path, output: Path, *more: object) -> tuple[object, ...]:
    return ("--autoencoder", autoencoder, "--data", data, "--output", output, "--device", "cpu", *more)


def test_f1_not_finite_while_encoding(
    shapes: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KLAutoencoder, "encode", lambda self, x: torch.full((len(x), 16, 8, 8), float("nan")))
    problem = tiny.refused("encode_latents", *words(autoencoder, shapes, tmp_path / "x", "--on-bad-data", "skip"))
    assert problem.code == 5 and "latents are not finite" in problem.what and "--mixed-precision no" in problem.hint


def test_f2_another_autoencoder_is_named_with_both_hashes(latents: Path, shapes: Path, tmp_path: Path) -> None:
    copy = tmp_path / "latents"
    shutil.copytree(latents, copy)
    index = json.loads((copy / "index.json").read_text())
    ours = index["summary"]["encoder"]
    index["summary"]["encoder"] = "3fa9" * 16
    (copy / "index.json").write_text(json.dumps(index))
    problem = tiny.refused("train_denoiser", "--latents", copy, "--output", tmp_path / "run", *tiny.DENOISER)
    assert problem.code == 4 and "3fa93fa93fa9" in problem.what and ours[:12] in problem.what
    assert "encode_latents" in problem.hint
    plan = json.loads((copy / "encoding.json").read_text())
    (copy / "encoding.json").write_text(json.dumps(plan | {"encoder": "3fa9" * 16}))
    problem = tiny.refused("encode_latents", *words(copy / "autoencoder", shapes, copy, "--flip"))
    assert problem.code == 4 and f"encoder 3fa93fa93fa9, now {ours[:12]}" in problem.what


def test_f2_another_autoencoder_in_the_run_is_named_with_both_hashes(denoiser: Path, tmp_path: Path) -> None:
    """Retrained in place under the same path, and then drawn with."""
    run = tmp_path / "run"
    shutil.copytree(denoiser, run)
    known = json.loads((run / "run.json").read_text())["hashes"]["autoencoder"]
    words = ("generate", "--model", run, "--prompt", "a circle", "--steps", "1", "--device", "cpu", "--output")
    assert tiny.call(*words, tmp_path / "before") == 0
    weights = run / "final" / "autoencoder" / "model.safetensors"
    tensors = load_tensors(weights)
    save_tensors(weights, {name: value + 1 if "scale" in name else value for name, value in tensors.items()})
    problem = tiny.refused(*words, tmp_path / "after")
    assert problem.code == 4 and f"the denoiser was trained with {known[:12]}" in problem.what
    assert "final/autoencoder is " in problem.what and not (tmp_path / "after").exists()


def test_f4_dead_channels_are_named(
    shapes: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = KLAutoencoder.encode
    dead = torch.tensor([2])
    monkeypatch.setattr(KLAutoencoder, "encode", lambda self, x: whole(self, x).index_fill(1, dead, 0.5))
    assert tiny.call("encode_latents", *words(autoencoder, shapes, tmp_path / "x")) == 0
    assert "warning: latent channels [2] hardly vary" in capsys.readouterr().err


ONE_SHARD = """
import os, runpy, signal, sys
from training.encoding import data_set

write = data_set.write_shard

def stopped(*words):
    write(*words)
    os.kill(os.getpid(), signal.SIGSTOP)

data_set.write_shard = stopped
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_f5_encode_killed_and_run_again(shapes: Path, autoencoder: Path, latents: Path, tmp_path: Path) -> None:
    """Killed after its first shard, where it waits, however busy the machine is."""
    target = tmp_path / "latents"
    arguments = list(map(str, words(autoencoder, shapes, target, "--flip")))
    command = [sys.executable, "-c", ONE_SHARD, str(tiny.SCRIPTS / "encode_latents.py"), *arguments]
    run = subprocess.Popen(command, env=tiny.ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while run.poll() is None and not list(target.glob("*.tar")):
        time.sleep(0.002)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert children
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 100
    while left := [child for child in children if Path(f"/proc/{child}").exists()]:
        assert time.monotonic() < deadline, left  # loaders that outlive their run hold its memory
        time.sleep(0.05)
    with pytest.raises(UserError, match="holds no index"):
        ShardSet(target)
    assert tiny.call("encode_latents", *arguments) == 0
    for path in latents.glob("*.tar"):
        assert (target / path.name).read_bytes() == path.read_bytes()
    assert verify(target).problems == () and not list(target.glob(".*"))


def test_f5_a_batch_that_does_not_fit_is_halved(
    shapes: Path, autoencoder: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole, sizes = KLAutoencoder.encode, []

    def tight(self: KLAutoencoder, images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, images)

    most = 12
    monkeypatch.setattr(KLAutoencoder, "encode", tight)
    assert tiny.call("encode_latents", *words(autoencoder, shapes, tmp_path / "x", "--flip")) == 0
    ours, theirs = ShardSet(tmp_path / "x"), ShardSet(latents)
    assert [ours.key(i) for i in range(96)] == [theirs.key(i) for i in range(96)]  # no holes
    for i in range(0, 96, 7):
        assert np.allclose(Latents(ours).moments(i), Latents(theirs).moments(i), atol=2e-3)
    assert sizes.count(40) == 1 and "out of memory with 40 images" in capsys.readouterr().err  # halved for good
    most = 0
    problem = tiny.refused("encode_latents", *words(autoencoder, shapes, tmp_path / "y"))
    assert problem.code == 6 and "single picture" in problem.what


def test_captions_that_do_not_fit_are_embedded_in_parts(
    shapes: Path, autoencoder: Path, text_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Halved for good; the same embeddings, no holes."""
    whole, sizes = shard.embeddings, []

    def tight(encoder: Any, captions: list[str]) -> Any:
        sizes.append(len(captions))
        if len(captions) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(encoder, captions)

    asked = ("--text-encoder", text_encoder, "--text-length", 8)
    assert tiny.call("encode_latents", *words(autoencoder, shapes, tmp_path / "straight", *asked)) == 0
    most = 25
    monkeypatch.setattr(shard, "embeddings", tight)
    assert tiny.call("encode_latents", *words(autoencoder, shapes, tmp_path / "x", *asked)) == 0
    ours, theirs = ShardSet(tmp_path / "x"), ShardSet(tmp_path / "straight")
    for i in range(0, 96, 5):
        pair = [load_safetensors(shards.read_field(i, "text.safetensors")) for shards in (ours, theirs)]
        assert pair[0].keys() == pair[1].keys()
        assert all(torch.allclose(pair[0][name], pair[1][name], atol=2e-3) for name in pair[0])
    said = capsys.readouterr().err
    assert "captions at once; now 20" in said and sizes.count(40) == 1 and max(sizes[3:]) <= 25
    most = 0
    problem = tiny.refused("encode_latents", *words(autoencoder, shapes, tmp_path / "y", *asked))
    assert problem.code == 6 and "single caption" in problem.what


def test_encode_leaves_out_what_it_cannot_read(
    shapes: Path, autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    source = ShardSet(shapes)
    writer = ShardWriter(data, "train", 30)
    for i in range(60):
        fields = source.read(i)
        writer.add(source.key(i), fields | ({"png": fields["png"][:90]} if i == 40 else {}))
    write_index(data, writer.finish(), {})
    problem = tiny.refused("encode_latents", *words(autoencoder, data, tmp_path / "x", "--on-bad-data", "error"))
    assert problem.code == 3 and problem.what.startswith(f"{source.key(40)}: not a readable picture")
    unasked = tiny.refused("encode_latents", *words(autoencoder, data, tmp_path / "x"))  # all the same all is written
    assert unasked.code == 3 and "1 of 60 samples could not be read" in unasked.what
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").glob("*.tar")}
    assert tiny.call("encode_latents", *words(autoencoder, data, tmp_path / "x", "--on-bad-data", "skip")) == 0
    assert written == {path: path.stat().st_mtime_ns for path in written}  # as the hint says, and at no cost
    stored = ShardSet(tmp_path / "x")
    assert len(stored) == 59 and stored.summary["left_out"] == 1
    assert stored.summary["ledger"]["left out"]["sample that cannot be read"]["count"] == 1
    assert stored.key(40) == source.key(41)
    assert "(59 samples of 8x8x8, 1 left out)" in capsys.readouterr().err
    assert json.loads((tmp_path / "x" / "index.json").read_text())["shards"][1]["samples"] == 29
    writer = ShardWriter(data, "train", 30)
    for i in range(60):
        writer.add(source.key(i), {"png": b"?"} if i in (3, 50) else source.read(i))
    write_index(data, writer.finish(), {})
    problem = tiny.refused("encode_latents", *words(autoencoder, data, tmp_path / "y"))
    assert problem.code == 3 and "2 of 60 samples cannot be read, more than 1%" in problem.what


def test_training_goes_on_past_an_unreadable_sample(autoencoder: Path, shapes: Path, tmp_path: Path) -> None:
    """Both datasets of a stage, through the script: counted, never deleted, and the run ends well."""
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    tar = data / "train-000001.tar"
    before = tar.read_bytes()
    place = before.index(b"IDAT", len(before) // 2)
    tar.write_bytes(before[:place] + os.urandom(64) + before[place + 64 :])
    flags = [*tiny.AUTOENCODER, "--max-steps", "4"]  # more than one epoch of 96
    assert tiny.call("train_autoencoder", "--data", data, "--output", tmp_path / "run", *flags) == 0
    strict = tiny.refused("train_autoencoder", "--data", data, "--output", tmp_path / "strict", *flags,
                          "--on-bad-data", "error")  # fmt: skip
    assert strict.code == 3 and "has other bytes than were indexed" in strict.what
    assert tar.exists() and len(Images(ShardSet(data))) == 96
    assert "sha256 differs" in "\n".join(verify(data).problems)


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 whose tokenizer knows four words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    home = tmp_path_factory.mktemp("encoder") / "t5"
    known = {word: i for i, word in enumerate(("<pad>", "<unk>", "</s>", "a", "red", "circle"))}
    words = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(home)
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=6, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(home)
    return home


def test_f3_f6_and_e10_stored_embeddings(
    shapes: Path, autoencoder: Path, text_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What captions lose is counted; the embedding of the empty caption is stored once and missed before training; a
    folder is not gone on with by another encoder, nor by the same with other settings."""
    target = tmp_path / "latents"
    asked = ("--text-encoder", text_encoder, "--text-length")
    assert tiny.call("encode_latents", *words(autoencoder, shapes, target, *asked, 4)) == 0
    said = capsys.readouterr().err
    source = [ShardSet(shapes, split) for split in ("train", "val")]
    captions = [c for part in source for i in range(len(part)) for c in json.loads(part.read(i)["json"])["captions"]]
    assert f"cut {sum(len(c.split()) > 4 for c in captions):,}: captions exceed 4 tokens (train-00000000" in said
    assert [path.name for path in target.rglob("null.safetensors")] == ["null.safetensors"]
    summary = read_index(target)[0]["summary"]
    tally = CaptionTally(SimpleNamespace(trainable=False), Latents(ShardSet(target)))  # type: ignore[arg-type]
    assert tally.counted.report() == {"cut": summary["ledger"]["cut"]} and not tally.waiting  # as training tells it
    for older in (False, False, True, True):  # gone on with: nothing is counted twice, and nothing is forgotten
        if older:
            index = json.loads((target / "index.json").read_text())
            index["summary"].pop("ledgers", None)
            (target / "index.json").write_text(json.dumps(index))
        else:
            min(target.glob("train-*.tar")).unlink()
        assert tiny.call("encode_latents", *words(autoencoder, shapes, target, *asked, 4)) == 0
        assert read_index(target)[0]["summary"]["ledger"]["cut"] == summary["ledger"]["cut"]
    problem = tiny.refused("encode_latents", *words(autoencoder, shapes, target, *asked, 5))
    assert problem.code == 4 and "text_encoder " in problem.what and ", now " in problem.what
    config = tmp_path / "frozen.toml"
    backbone = '[backbone]\nkind = "dit"\nwidth = 16\ndepth = 1\nheads = 2\nbase_size = 8\n'
    train = ("--latents", target, "--output", tmp_path / "run", "--config", config, *tiny.SHORT, "--dry-run")
    for length, code in ((5, 4), (4, 0)):
        config.write_text(f'{backbone}[text]\nkind = "huggingface"\nlength = {length}\n')
        if code:
            problem = tiny.refused("train_denoiser", *train)
            assert problem.code == code and "text encoder" in problem.what
        else:
            assert tiny.call("train_denoiser", *train) == 0
    (target / "text_encoder" / "null.safetensors").unlink()
    problem = tiny.refused("train_denoiser", *train)
    assert problem.code == 4 and "not that of the empty caption (text_encoder/null.safetensors)" in problem.what
    asked = words(autoencoder, shapes, target, *asked, 4)
    assert tiny.call("encode_latents", *asked) == 0  # as its hint says: that file alone was missing
    assert tiny.call("train_denoiser", *train) == 0
