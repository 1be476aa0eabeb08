"""Pairs of a teacher: each a function of seed and number, written whole or gone on with, and a data set of latents."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import students
import tiny
import torch
from donors import frozen_encoder

from ldm.denoiser import Denoiser
from ldm.diffusion import Diffusion
from ldm.grids import Given, Uniform
from ldm.guidance import ClassifierFree
from ldm.image_conditions.source import Source
from ldm.noise import Noise
from ldm.objectives.reflow import NOISE, ReflowConfig
from ldm.pairing import Independent
from ldm.pipeline import Sampling
from ldm.predictions import V
from ldm.samplers import DDIM, DDPM, ConsistencySampler, DPMpp2M, Euler, HeunChurn, JumpSampler, sample
from ldm.schedules import VP
from ldm.times import UniformTimes
from ldm.weighting import UniformWeight
from training.data.latents import Latents
from training.data.order import DataOrder, Slot
from training.encoding import pairs
from training.encoding.pairs import write_pairs
from training.encoding.shard import npy
from training.errors import UserError
from training.guarding import read_record
from training.models.assembly import HashedPipeline, load_pipeline
from training.shards.index import noted_pictures, read_index, write_index
from training.shards.reading import ShardSet
from training.shards.verifying import verify
from training.shards.writing import write_shard

PLAN = Sampling(sampler=DPMpp2M(), grid=Uniform(), guidance=ClassifierFree(scale=2.0), steps=3)
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def teacher(denoiser: Path, tmp_path_factory: pytest.TempPathFactory) -> HashedPipeline:
    """A model that hears its captions."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    shutil.copytree(denoiser, run)
    tiny.shake(run / "final")
    return load_pipeline(run, "cpu")


@pytest.fixture
def write(teacher: HashedPipeline, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes pairs in shards of eight, whatever is not said otherwise; returns their folder."""
    monkeypatch.setattr(pairs, "SHARD", 8)

    def call(name: str = "pairs", model: HashedPipeline = teacher, data: Path = latents, **how: Any) -> Path:
        settings = {"count": 20, "seed": 3, "sampling": PLAN, "batch_size": 5, "held_out": 6, **how}
        write_pairs(model, data, tmp_path / name, **settings)
        return tmp_path / name

    return call


def stored(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """The fields of every pair, arrays and JSON read."""
    shards = ShardSet(folder, split)
    readers: dict[str, Callable[[bytes], Any]] = {"npy": lambda data: np.load(io.BytesIO(data)), "json": json.loads}
    return [{name: readers.get(name.rpartition(".")[2], bytes.decode)(data) for name, data in shards.read(i).items()
             if not name.endswith("safetensors")} for i in range(len(shards))]


def retold(latents: Path, folder: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> Path:
    """The same latents, the fields of each changed."""
    shutil.copytree(latents / "autoencoder", folder / "autoencoder")
    sets = [ShardSet(latents, split) for split in ("train", "val")]
    infos = [write_shard(folder, f"{source.split}-000000", [(source.key(i), change(source.read(i)))
                                                            for i in range(len(source))]) for source in sets]
    write_index(folder, infos, sets[0].summary, "latents")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_pair_is_what_the_teacher_draws_of_its_number(write: Write, teacher: HashedPipeline, split: str) -> None:
    """Drawn one by one, as a pipeline draws: the noise of the number in its split, to the last bit; and its latents."""
    rows = stored(write(), split)
    assert len(rows) == {"train": 20, "val": 6}[split]
    for number in (0, 7, len(rows) - 1) if split == "train" else (0, 5):
        row = rows[number]
        noise = Noise.from_seeds([number]).fold(3, "pairs", split)
        denoise = teacher.guided([row["txt"]], plan=PLAN)
        x0 = teacher.latents(denoise, noise, (4, 8, 8), PLAN)
        assert np.array_equal(row["extra-eps.npy"], noise.normal((4, 8, 8), "prior")[0].numpy())
        mean, logvar = np.split(row["moments.npy"], 2)
        assert (logvar == -30).all() and row["moments.npy"].dtype == np.float32
        torch.testing.assert_close(teacher.autoencoder.norm(torch.from_numpy(mean)[None]), x0, rtol=0, atol=1e-4)
        unguided = teacher.latents(teacher.guided([row["txt"]], plan=dataclasses.replace(
            PLAN, guidance=ClassifierFree(scale=1.0))), noise, (4, 8, 8), PLAN)
        assert (unguided - x0).abs().max() > 1e-3  # the guidance is in it


def test_latents_open_them_and_no_noise_is_added(write: Write, teacher: HashedPipeline) -> None:
    """A fresh draw of a pair's posterior is off by 3e-7 of z, so that latents are those that were drawn; eps is an
    extra of each."""
    folder = write()
    data, norm = Latents(ShardSet(folder)), teacher.autoencoder.norm
    batch = data.__getitems__([Slot(i, 0, i) for i in range(20)])
    drawn = norm.mean_latents(batch.data)
    again = norm.latents(batch.data, Noise.from_seeds(range(20)).normal((4, 8, 8), "posterior"))
    off = (again - drawn) * norm.scale
    assert off.abs().max() < 3e-6 and off.square().mean().sqrt() < 5e-7 and drawn.std() > 0.1
    assert list(batch.extras) == [NOISE] and batch.extras[NOISE].shape == drawn.shape
    assert batch.extras[NOISE].std().item() == pytest.approx(1, abs=0.05)
    assert verify(folder).problems == ()


def test_the_objective_reads_them(write: Write, teacher: HashedPipeline) -> None:
    """The loss of an answer of zero is the mean square of eps - x0 of the pairs."""
    batch = Latents(ShardSet(write())).__getitems__([Slot(i, 0, i) for i in range(4)])
    x0 = teacher.autoencoder.norm.mean_latents(batch.data)
    made = ReflowConfig().build(diffusion=teacher.denoiser.diffusion, times=UniformTimes(), weighting=UniformWeight(),
                                pairing=Independent())
    cond = teacher.text(batch.captions)._replace(extras=batch.extras)
    draw = made.draw(x0, Noise(batch.slots))
    found = made.losses(lambda x, *_: torch.zeros_like(x), x0, cond, draw).total
    wanted = made.diffusion.target(x0, batch.extras[NOISE], draw.t).square().flatten(1).mean(1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (batch.extras[NOISE] - draw.eps).abs().min() > 0


def test_same_seed_same_bytes(write: Write) -> None:
    first, again, other = write("a"), write("b"), write("c", seed=4)
    names = sorted(path.name for path in first.glob("*.*") if path.is_file())
    assert [name for name in names if name.endswith(".tar")] == [
        "train-000000.tar", "train-000001.tar", "train-000002.tar", "val-000000.tar"]
    for name in names:
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    assert not any(np.array_equal(one["extra-eps.npy"], two["extra-eps.npy"])
                   for one, two in zip(stored(first), stored(other), strict=True))
    ours = [row["extra-eps.npy"].tobytes() for split in ("train", "val") for row in stored(first, split)]
    assert len(set(ours)) == 26


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_batch_changes_what_is_rounded_alone(write: Write, batch: int) -> None:
    """Of z, which goes up to 10 here, by less than 1e-4."""
    for one, two in zip(stored(write("a")), stored(write("b", batch_size=batch)), strict=True):
        assert np.array_equal(one["extra-eps.npy"], two["extra-eps.npy"])
        assert (one["json"], one["txt"]) == (two["json"], two["txt"])
        np.testing.assert_allclose(one["moments.npy"], two["moments.npy"], rtol=0, atol=1e-4)


def test_more_pairs_begin_with_the_same(write: Write) -> None:
    few, many = stored(write("a", count=11)), stored(write("b", count=20))
    for one, two in zip(few, many, strict=False):
        assert np.array_equal(one["extra-eps.npy"], two["extra-eps.npy"]) and one["txt"] == two["txt"]


def test_pairs_begun_by_the_first_order_go_on_by_it(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their folder names no order: there was no other."""
    with monkeypatch.context() as patch:
        patch.setattr(pairs, "RULE", 1)
        folder = write()
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    (folder / "train-000001.tar").unlink()
    write()
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    anew = write("anew")
    assert ["order" in read_index(made)[0]["summary"]["pairs"] for made in (folder, anew)] == [False, True]
    assert [row["txt"] for row in stored(folder)] != [row["txt"] for row in stored(anew)]


def test_a_broken_off_writing_goes_on(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    """Whole shards are kept, a damaged one is drawn again, and all ends as if nothing had been."""
    straight, calls = write("straight"), [0]

    def killed(*words: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:  # in the third shard, after its first batch
            raise SystemError
        return sample(*words)

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr("training.encoding.pairs.sample", killed)
        write()
    folder = tmp_path / "pairs"
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    assert len(kept) == 2 and not (folder / "index.json").exists()
    damaged = max(kept)
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    (folder / ".train-000002.tar.99.partial").write_bytes(b"half")
    capsys.readouterr()
    write()
    assert "kept: 1 of 4 shards of pairs" in capsys.readouterr().err
    assert min(kept).stat().st_mtime_ns == kept[min(kept)] and damaged.stat().st_mtime_ns != kept[damaged]
    for path in sorted(straight.rglob("*")):
        if path.is_file():
            assert (folder / path.relative_to(straight)).read_bytes() == path.read_bytes(), path
    assert not list(folder.glob(".*"))
    with monkeypatch.context() as patch:  # nothing is left to draw
        patch.setattr(pairs.Drawing, "drawn", None)
        write()


def test_of_several_processes_each_has_shards_of_its_own(write: Write, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two writes the second and the fourth; the first writes the others, the index and what lies beside.
    """
    straight, folder = write("straight"), tmp_path / "pairs"
    monkeypatch.setattr("training.encoding.pairs.meeting.is_distributed", lambda: True)
    monkeypatch.setattr("training.encoding.pairs.meeting.meet", lambda: None)
    monkeypatch.setattr("training.encoding.pairs.distributed.get_world_size", lambda: 2)
    folder.mkdir()
    monkeypatch.setattr("training.encoding.pairs.distributed.get_rank", lambda: 1)
    write()
    assert sorted(path.name for path in folder.glob("*.*")) == [
        f"{name}.{end}" for name in ("train-000001", "val-000000") for end in ("index.npy", "tar")]
    shutil.move(folder, tmp_path / "second")
    monkeypatch.setattr("training.encoding.pairs.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("training.encoding.pairs.meeting.meet", lambda: [shutil.copy(path, folder)
                                                        for path in (tmp_path / "second").iterdir()])
    write()
    for path in straight.glob("*.*"):
        assert (folder / path.name).read_bytes() == path.read_bytes(), path


def test_captions_are_those_of_the_samples(write: Write, latents: Path, tmp_path: Path) -> None:
    """Each sample once before any comes again; of several captions the one that it was drawn with, alone."""
    def more(fields: dict[str, bytes]) -> dict[str, bytes]:
        notes = json.loads(fields["json"])
        notes["captions"] = [*notes["captions"], f"also {notes['captions'][0]}"]
        return {**fields, "json": json.dumps(notes).encode()}

    data = retold(latents, tmp_path / "two", more)
    source = Latents(ShardSet(data))
    every = {tuple(source.captions(i)) for i in range(len(source))}
    rows = stored(write(data=data, count=len(source) + 5, batch_size=64))
    assert all(row["json"]["captions"] == [row["txt"]] for row in rows)
    assert {row["txt"] for row in rows} <= {text for texts in every for text in texts}
    assert {row["txt"].startswith("also") for row in rows} == {True, False}
    order = DataOrder(len(source), 1, 3).at(0, 0, len(rows))
    assert all(row["txt"] in source.captions(slot.index) for row, slot in zip(rows, order, strict=True))
    assert sorted(slot.index for slot in order[:len(source)]) == list(range(len(source)))


def test_the_index(write: Write, teacher: HashedPipeline, latents: Path, shapes: Path) -> None:
    """Of which teacher, drawn how and from what; kept where an index is made anew; and the pictures of the latents."""
    folder = write()
    summary, source = ShardSet(folder).summary, ShardSet(latents).summary
    told = summary["pairs"]
    assert told["teacher"] == teacher.hashes and "denoiser" in told["teacher"]
    assert (told["seed"], told["counts"], told["guidance_scale"]) == (3, {"train": 20, "val": 6}, 2.0)
    assert told["sampling"]["sampler"]["kind"] == "dpmpp-2m" and told["sampling"]["steps"] == 3
    assert told["sampling"]["grid"]["kind"] == "uniform" and told["sampling"]["guidance"]["scale"] == 2.0
    assert summary["latent"] == {**source["latent"], "dtype": "float32"} and summary["encoder"] == source["encoder"]
    assert not summary["mirrored"] and summary["order"] == "mixed" and summary["counts"] == {"train": 20, "val": 6}
    assert read_record(folder / "captions.json", {})["captions"] is not None
    assert Path(noted_pictures(folder)).resolve() == shapes.resolve() == Path(noted_pictures(latents)).resolve()
    assert read_record(folder / "encoding.json", {})["data"] == read_record(latents / "encoding.json", {})["data"]
    (folder / "index.json").unlink()
    assert tiny.call("make_shards", "index", folder) == 0
    assert ShardSet(folder).summary["pairs"] == told


def test_a_student_has_them_drawn_and_opens_them(denoiser: Path, latents: Path, tmp_path: Path) -> None:
    """The pairs of the teacher as it draws, beside the run; a second student takes those that are there."""
    words = ("--teacher", denoiser, "--latents", latents, "--config", "reflow", "--objective.pairs", 16,
             "--max-steps", 2, "--objective.at_noise", 0.5, *students.BRIEF, "--output")
    assert tiny.call("distill_denoiser", *words, tmp_path / "run") == 0
    assert np.isfinite([row["val/loss"] for row in tiny.rows(tmp_path / "run") if "val/loss" in row]).all()
    told = ShardSet(tmp_path / "run-pairs").summary["pairs"]
    own = load_pipeline(denoiser, "cpu")
    assert told["counts"]["train"] == 16 and told["guidance_scale"] == own.sampling.guidance.scale  # type: ignore[attr-defined]
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run-pairs").glob("*.tar")}
    assert tiny.call("distill_denoiser", *words, tmp_path / "more", "--pairs", tmp_path / "run-pairs") == 0
    assert before == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run-pairs").glob("*.tar")}
    assert not (tmp_path / "more-pairs").exists()
    refused = tiny.refused("distill_denoiser", *words, tmp_path / "other", "--student.guidance_scale", "1,3")
    assert "pairs of one guidance scale" in refused.what and refused.hint == "--student.guidance_scale 1"


def test_embeddings_go_with_their_captions(shapes: Path, autoencoder: Path, write: Write, tmp_path: Path) -> None:
    """Those of the caption alone, bit for bit; that of the empty one, the encoder and its tokenizer lie beside."""
    words = ("--autoencoder", autoencoder, "--data", shapes, "--output", tmp_path / "told", "--device", "cpu")
    asked = ("--text-encoder", frozen_encoder(tmp_path / "t5", 1), "--text-length", 8)
    assert tiny.call("encode_latents", *words, *asked, "--num-workers", 0) == 0
    text = ("--text.kind", "huggingface", "--text.length", 8)
    train = ("--latents", tmp_path / "told", "--output", tmp_path / "run", *tiny.DENOISER[:6], *tiny.SHORT)
    assert tiny.call("train_denoiser", *train, *text, "--max-steps", 1) == 0
    tiny.shake(tmp_path / "run" / "final")
    folder = write(model=load_pipeline(tmp_path / "run", "cpu"), data=tmp_path / "told")
    ours, theirs = Latents(ShardSet(folder)), Latents(ShardSet(tmp_path / "told"))
    order = DataOrder(len(theirs), 1, 3).at(0, 0, 20)
    found, wanted = ours.__getitems__([Slot(i, 0, i) for i in range(20)]), theirs.__getitems__(order)
    assert found.captions == wanted.captions and found.text is not None and wanted.text is not None
    assert torch.equal(found.text.context, wanted.text.context) and torch.equal(found.text.mask, wanted.text.mask)
    for name in ("text_encoder", "tokenizer"):
        for file in (tmp_path / "told" / name).iterdir():
            assert (folder / name / file.name).read_bytes() == file.read_bytes()
    again = ("--latents", folder, "--output", tmp_path / "student", *train[4:], *text, "--batch-size", 8)
    assert tiny.call("train_denoiser", *again, "--dry-run") == 0


def test_what_is_stored_beside_the_latents_goes_with_them(latents: Path, write: Write, teacher: HashedPipeline,
                                                          tmp_path: Path) -> None:
    """And reaches the teacher; but for mirrored ones, and the noise of other pairs."""

    def more(fields: dict[str, bytes]) -> dict[str, bytes]:
        hue = np.frombuffer(fields["moments.npy"], np.uint8)[-200:-199].reshape(1, 1, 1)  # any number of its own
        return {**fields, **{name: npy(hue) for name in ("extra-hue.npy", "mirror-hue.npy", "extra-eps.npy")}}

    told: list[Any] = []

    class Heard(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = teacher.denoiser.backbone

        def forward(self, x: torch.Tensor, level: torch.Tensor, cond: Any) -> torch.Tensor:
            told.append(dict(cond.extras))
            return self.inner(x, level, cond)

    model = dataclasses.replace(teacher, denoiser=Denoiser(Heard(), teacher.denoiser.diffusion))
    folder = write(model=model, data=retold(latents, tmp_path / "hues", more))
    data, shards = Latents(ShardSet(tmp_path / "hues")), ShardSet(folder)
    order = DataOrder(len(data), 1, 3).at(0, 0, 5)
    wanted = data.__getitems__(order).extras["hue"]
    assert list(told[0]) == ["hue"] and torch.equal(told[0]["hue"], torch.cat([wanted, wanted]))
    assert set(shards.fields) == {"moments.npy", "extra-eps.npy", "extra-hue.npy", "txt", "json"}
    for i, slot in enumerate(order):
        assert shards.read_field(i, "extra-hue.npy") == data.shards.read_field(slot.index, "extra-hue.npy")
    assert np.load(io.BytesIO(shards.read_field(0, "extra-eps.npy"))).shape == (4, 8, 8)


def test_on_a_process_that_ends_above_noise_a_pair_makes_up_where_it_began(write: Write,
                                                                           teacher: HashedPipeline) -> None:
    """x at t = 1 of VP is the noise itself, and alpha is not 0: what stands beside x0 in it is stored."""
    process = Diffusion(schedule=VP(), prediction=V())
    model = dataclasses.replace(teacher, denoiser=Denoiser(teacher.denoiser.backbone, process))
    folder = write(model=model)
    alpha, sigma = VP()(torch.ones((), dtype=torch.float64))
    for number, row in enumerate(stored(folder)):
        start = Noise.from_seeds([number]).fold(3, "pairs", "train").normal((4, 8, 8), "prior")[0]
        x0 = teacher.autoencoder.norm(torch.from_numpy(row["moments.npy"][None, :4]))[0]
        eps = torch.from_numpy(row["extra-eps.npy"])
        torch.testing.assert_close(alpha * x0 + sigma * eps, start, rtol=0, atol=1e-5)
        assert (eps - start).abs().max() > 1e-4


def changed(**how: Any) -> dict[str, Any]:
    return {"sampling": dataclasses.replace(PLAN, **how)}


@pytest.mark.parametrize(("how", "said"), [
    ({"seed": 4}, "pairs.seed 3, now 4"), ({"count": 21}, "pairs.counts.train 20, now 21"),
    ({"held_out": 0}, "pairs.counts.val 6, now None"), (changed(steps=4), "pairs.sampling.steps 3, now 4"),
    (changed(guidance=ClassifierFree(scale=3.0)), "pairs.sampling.guidance.scale 2.0, now 3.0"),
    (changed(sampler=Euler()), "pairs.sampling.sampler.kind dpmpp-2m, now euler"),
])
def test_a_folder_of_other_pairs_is_refused(write: Write, how: dict[str, Any], said: str) -> None:
    before = {path: path.read_bytes() for path in write().rglob("*") if path.is_file()}
    with pytest.raises(UserError) as problem:
        write(**how)
    assert problem.value.code == 4 and said in problem.value.what and "choose another --output" in problem.value.hint
    assert all(path.read_bytes() == data for path, data in before.items())


def test_shards_of_another_size_are_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version may cut pairs into others: none of an earlier one is left between them."""
    write()
    monkeypatch.setattr(pairs, "SHARD", 9)
    with pytest.raises(UserError, match="pairs.per_shard 8, now 9"):
        write()


def test_other_teachers_and_folders_are_refused(write: Write, denoiser: Path, shapes: Path, autoencoder: Path,
                                                grey: Path, tmp_path: Path) -> None:
    write()
    with pytest.raises(UserError, match=r"made from something else \(pairs.teacher.denoiser \w{12}, now \w{12}\)"):
        write(model=load_pipeline(denoiser, "cpu"))
    with pytest.raises(UserError, match=r"is of autoencoder \w{12}, the teacher's is \w{12}") as problem:
        write("new", model=load_pipeline(grey / "run", "cpu"))
    assert problem.value.code == 4 and not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="not empty and holds no latents"):
        write("full")
    words = ("--autoencoder", autoencoder, "--data", shapes, "--output", tmp_path / "pairs", "--device", "cpu")
    refused = tiny.refused("encode_latents", *words)
    assert refused.code == 4 and "latents made from something else" in refused.what


@pytest.mark.parametrize(("how", "said"), [
    (changed(sampler=DDPM()), "sampler ddpm adds noise"), (changed(sampler=DDIM(eta=0.5)), "sampler ddim adds noise"),
    (changed(sampler=HeunChurn()), "sampler heun-churn adds noise"),
    (changed(sampler=ConsistencySampler()), "sampler consistency adds noise"),
    (changed(sampler=JumpSampler(noise=0.5)), "sampler jump adds noise"),
    (changed(grid=Given(times=(0.9, 0.5, 0.2, 0.0))), "grid given goes from t = 0.9 to 0,"),
    ({"count": 0}, "must be at least 1"), ({"batch_size": 0}, "must be at least 1"),
])
def test_what_is_no_map_from_noise_is_refused(write: Write, tmp_path: Path, how: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as problem:
        write(**how)
    assert said in problem.value.what and not (tmp_path / "pairs").exists()


def test_without_noise_they_are_taken(write: Write) -> None:
    one, two = write("a", **changed(sampler=DDIM())), write("b", **changed(sampler=Euler()))
    assert len(stored(one)) == len(stored(two)) == 20


def test_images_that_are_drawn_anew_are_refused(write: Write, upscaler: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"image.kind low-res draws an image anew"):
        write(model=load_pipeline(upscaler, "cpu"), data=upscaler.parent / "latents")
    with pytest.raises(UserError, match=r"image.kind source draws an image anew"):
        write(model=dataclasses.replace(load_pipeline(upscaler, "cpu"), image=Source()),
              data=upscaler.parent / "latents")
    assert not (tmp_path / "pairs").exists()


def test_what_is_not_finite_is_refused(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.encoding.pairs.sample", lambda *words: sample(*words) / 0)
    with pytest.raises(UserError, match="pair 0 of train, .* is not finite") as problem:
        write()
    assert problem.value.code == 5 and not list((tmp_path / "pairs").glob("*.tar"))
