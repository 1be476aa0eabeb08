"""Adapters trained upon a finished denoiser: the base stays as it is, the run holds no more than was learned, and every
kind is stopped and resumed exactly."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from hashlib import sha256
from pathlib import Path

import pytest
import ranks
import tiny
import torch
from packs import retold
from PIL import Image

from ldm.adapters import ADAPTERS
from ldm.adapters.controlled import ControlConfig
from training.loop.loop import Loop
from training.models.adapters import Chosen, at_work, parse_chosen
from training.models.assembly import HashedPipeline, load_pipeline

KINDS = [adapter.kind for adapter in ADAPTERS if adapter.kind != "none"]
TRAINING = ["--config", "lora", *tiny.SHORT, "--batch-size", "16", "--lr", "0.01"]
# What a kind is told besides its name, where its own settings do not do.
OF_KIND = {
    "lora": ["--adapter.rank", "2"],
    "dora": ["--adapter.rank", "2"],
    "textual-inversion": ["--adapter.words", '["blicket"]', "--adapter.kin", '["red"]'],
}
HINTED = [adapter.kind for adapter in ADAPTERS if issubclass(adapter, ControlConfig)]
UNET = "--backbone.kind unet --backbone.channels 8,16 --backbone.attention 0,1 --backbone.heads 2 --backbone.groups 4"
UNET += " --backbone.blocks 1 --backbone.depth 1 --text.width 16 --text.depth 1 --sample.steps 2"
BASE = ["--config", "smoke", *UNET.split(), *tiny.SHORT]


@pytest.fixture(scope="module")
def unshaken(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small U-Net, which all adapters can be put on."""
    run = tmp_path_factory.mktemp("unshaken") / "run"
    assert tiny.call("train_denoiser", "--latents", latents, "--output", run, *BASE, "--max-steps", "1") == 0
    return run


@pytest.fixture(scope="module")
def base(unshaken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That with output layers that are not zero."""
    run: Path = shutil.copytree(unshaken, tmp_path_factory.mktemp("base") / "base")
    tiny.shake(run / "final")
    return run


@pytest.fixture(scope="module")
def hinted(autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of shapes with their edges, as of `latents`, and a word in their captions that the base does not know."""
    root = tmp_path_factory.mktemp("hinted")
    words = "pack shapes --samples 96 --val-fraction 0.2 --samples-per-shard 40 --hint edges"
    assert tiny.call("make_shards", *words.split(), "--output", root / "shapes") == 0
    given = ("--autoencoder", autoencoder, "--data", root / "shapes", "--output", root / "latents", "--device", "cpu")
    assert tiny.call("encode_latents", *given) == 0
    return retold(root / "latents", root / "told", lambda caption: f"blicket, {caption}")


def train(kind: str, base: Path, latents: Path, run: Path, *words: object) -> int:
    own = ("--adapter.kind", kind, *OF_KIND.get(kind, []), *words)
    return tiny.call("train_denoiser", "--base", base, "--latents", latents, "--output", run, *TRAINING, *own)


@pytest.fixture(scope="module")
def trained(base: Path, hinted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of six steps of every kind."""
    runs = {kind: tmp_path_factory.mktemp(kind) / "run" for kind in KINDS}
    before = tree(base)
    for kind, run in runs.items():
        assert train(kind, base, hinted, run) == 0
    assert tree(base) == before
    return runs


def tree(folder: Path) -> dict[str, str]:
    """The hash of every file."""
    return {str(f.relative_to(folder)): sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()}


def drawn(pipeline: HashedPipeline) -> torch.Tensor:
    """Latents of two captions, shown a hint where an adapter reads one."""
    hint = {"image": (torch.arange(32 * 32).view(1, 1, 32, 32) % 7 == 0).float()}
    captions = ["a red circle", "a blicket above a blue square"]
    return torch.cat(list(pipeline.pixels(captions, extras=hint))).float()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_holds_what_it_learned_and_names_its_base(kind: str, trained: dict[str, Path], base: Path) -> None:
    """At strength 0 it draws as the base does, bit for bit; at 1 otherwise; and the base's hashes are still its own."""
    final = trained[kind] / "final"
    held = {path.name for path in final.iterdir()}
    assert held <= {"base.json", "card.json", "config.json", "ingredients.json", "model.safetensors", "README.md",
                    "samples.png", *(("hint.json", "hint.png") if kind in HINTED else ())}  # fmt: skip
    plain = load_pipeline(base, "cpu")
    of_base = json.loads((final / "base.json").read_text())["hashes"]
    assert of_base == {name: plain.hashes[name] for name in of_base} and len(of_base) == 4
    off = load_pipeline(base, "cpu", adapters=[Chosen(trained[kind], 0.0)])
    on = load_pipeline(trained[kind], "cpu")
    assert torch.equal(drawn(off), drawn(plain))
    assert not torch.equal(drawn(on), drawn(plain))
    told = json.loads((final / "card.json").read_text())["hashes"]
    assert on.hashes == off.hashes and on.hashes["adapter-1"] == told["adapter"]
    assert {name: on.hashes[name] for name in plain.hashes} == plain.hashes


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_ends_with_the_same_bytes(kind: str, trained: dict[str, Path], base: Path, hinted: Path,
                                                         tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, poll = Loop.step, Loop._poll_signals
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", lambda self, n, rate: (setattr(self, "now", n + 1), step(self, n, rate))[1])
        patch.setattr(Loop, "_poll_signals", lambda self: int(signal.SIGTERM) if self.now == 3 else poll(self))
        assert train(kind, base, hinted, tmp_path / "run") == 128 + signal.SIGTERM
    assert train(kind, base, hinted, tmp_path / "run", "--resume", "auto") == 0
    assert tiny.last_checkpoint(tmp_path / "run") == tiny.last_checkpoint(trained[kind])
    for name in ("model.safetensors", "config.json", "base.json"):
        assert (tmp_path / "run" / "final" / name).read_bytes() == (trained[kind] / "final" / name).read_bytes()


@pytest.mark.timeout(600)
def test_two_processes_train_a_control_as_one(trained: dict[str, Path], base: Path, hinted: Path,
                                              tmp_path: Path) -> None:
    words = ("--base", base, "--latents", hinted, *TRAINING, "--adapter.kind", "controlnet")
    codes = ranks.start(2, tmp_path, "train_denoiser", *words, "--output", tmp_path / "run")
    assert codes == [0, 0], ranks.said(tmp_path)
    for ours, theirs in zip(tiny.rows(tmp_path / "run"), tiny.rows(trained["controlnet"]), strict=True):
        assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-5)
    ranks.same_weights(tmp_path / "run", trained["controlnet"])


def test_only_the_adapter_is_trained_averaged_and_saved(trained: dict[str, Path]) -> None:
    checkpoint = next((trained["lora"] / "checkpoints").glob("step-*6"))
    from safetensors import safe_open

    for name in ("model", "ema", "optimizer"):
        with safe_open(checkpoint / f"{name}.safetensors", "pt") as file:
            assert all("adapter." in key for key in file.keys())  # noqa: SIM118  # it is no mapping


def test_a_checkpoint_is_drawn_with_as_well(trained: dict[str, Path], base: Path) -> None:
    checkpoint = next((trained["lora"] / "checkpoints").glob("step-*6"))
    ours = load_pipeline(base, "cpu", adapters=[Chosen(checkpoint)])
    assert torch.equal(drawn(ours), drawn(load_pipeline(trained["lora"], "cpu")))


def test_several_adapters_are_at_work_together(trained: dict[str, Path], base: Path) -> None:
    """Two halves are one; each that reads a hint reads its own."""
    halves = load_pipeline(base, "cpu", adapters=[Chosen(trained["lora"], 0.5)] * 2)
    assert (drawn(halves) - drawn(load_pipeline(trained["lora"], "cpu"))).abs().max() <= 1
    plain = load_pipeline(base, "cpu")
    chosen = [Chosen(trained[kind]) for kind in ("controlnet", "controlnet", "lora")]
    denoiser, text, hashes = at_work(plain, plain.hashes, chosen)
    assert list(hashes) == ["adapter-1", "adapter-2", "adapter-3"] and hashes["adapter-1"] == hashes["adapter-2"]
    with pytest.raises(ValueError, match="image-2"):
        drawn(HashedPipeline(**vars(plain) | {"denoiser": denoiser, "text": text}))


def test_another_base_is_refused(trained: dict[str, Path], base: Path, unshaken: Path) -> None:
    words = ("--model", unshaken, "--adapter", trained["lora"], "--prompt", "x", "--output", "o")
    problem = tiny.refused("generate", *words)
    assert "was learned upon base, whose denoiser is" in problem.what and problem.code == 4
    assert "--model" in problem.hint
    assert load_pipeline(base, "cpu", adapters=[trained["lora"]]).hashes["adapter-1"]


def test_a_base_that_is_gone_is_named(base: Path, hinted: Path, tmp_path: Path) -> None:
    """Its place is told; with the base elsewhere both are given, and it draws."""
    moving, run, output = tmp_path / "moving", tmp_path / "run", tmp_path / "out"
    shutil.copytree(base, moving)
    assert train("lora", moving, hinted, run, "--max-steps", "1") == 0
    moving.rename(tmp_path / "moved")
    problem = tiny.refused("generate", "--model", run, "--prompt", "x", "--output", output)
    assert f"is an adapter upon moving, which is not at {moving} any more" in problem.what
    assert problem.hint == "give --model BASE --adapter RUN"
    words = ("--model", tmp_path / "moved", "--adapter", run, "--prompt", "red", "--output", output, "--steps", 2)
    assert tiny.call("generate", *words) == 0


def test_what_is_no_adapter_and_what_is_no_base(trained: dict[str, Path], base: Path, hinted: Path,
                                                tmp_path: Path) -> None:
    run, given = trained["lora"], ("--latents", hinted, "--output", tmp_path / "run")
    words = ("--model", base, "--adapter", base, "--prompt", "x", "--output", tmp_path / "o")
    no_adapter = tiny.refused("generate", *words)
    assert "is a whole model, not an adapter" in no_adapter.what
    upon = tiny.refused("train_denoiser", "--base", run, "--config", "lora", *given)
    assert f"{run} is an adapter upon base, not a whole model" in upon.what
    begun = tiny.refused("train_denoiser", "--init-from", run, *tiny.DENOISER, *given)
    assert f"{run} is an adapter upon base, not a whole model" in begun.what
    both = tiny.refused("train_denoiser", "--base", base, "--init-from", base, "--config", "lora", *given)
    assert both.what == "--base and --init-from are two ways to begin"
    changed = tiny.refused("train_denoiser", "--base", base, "--config", "lora", *given, "--backbone.heads", 4)
    assert "backbone.heads: 2 -> 4" in changed.what and "--init-from" in changed.hint
    whole = tiny.refused("train_denoiser", "--base", base, "--config", base / "final" / "config.json", *given)
    assert "has no [adapter]" in whole.what
    assert "name it with --base RUN" in tiny.refused("train_denoiser", "--config", run, *given).hint
    dry = ("--latents", hinted, "--dry-run", "--batch-size", 8, "--device", "cpu")
    assert tiny.call("train_denoiser", "--base", base, "--config", run, *dry) == 0


def test_a_control_is_not_put_on_a_model_that_is_shown_an_image(hinted: Path, tmp_path: Path) -> None:
    """Both would read the same extra; a low-rank adapter reads none."""
    run, dry = tmp_path / "masked", ("--dry-run", "--batch-size", 8, "--device", "cpu", "--latents", hinted)
    given = ("--latents", hinted, "--output", run, *BASE, "--image.kind", "masked", "--max-steps", 1)
    assert tiny.call("train_denoiser", *given) == 0
    problem = tiny.refused("train_denoiser", "--base", run, "--config", "controlnet", *dry)
    assert "is itself shown an image (image.kind masked)" in problem.what
    assert tiny.call("train_denoiser", "--base", run, "--config", "lora", *dry) == 0


def test_words_that_are_none_are_named(base: Path, hinted: Path, tmp_path: Path) -> None:
    """Those of the captions are found by --new-words, beside one that is named or not."""
    given = ("--base", base, "--config", "lora", "--latents", hinted, "--dry-run", "--batch-size", 8, "--device", "cpu")
    problem = tiny.refused("train_denoiser", *given, "--adapter.words", "two words")
    assert "words" in problem.what
    assert tiny.call("train_denoiser", *given, "--adapter.words", "blicket", "--new-words") == 0
    assert tiny.call("train_denoiser", *given, "--new-words") == 0


def test_the_command_that_is_proposed_draws(trained: dict[str, Path], base: Path, hinted: Path, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    """Of a control with the hint that it keeps."""
    for kind, flags in (("lora", "--adapter"), ("controlnet", "--control")):
        capsys.readouterr()
        assert train(kind, base, hinted, trained[kind], "--resume", "auto") == 0
        command = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("next: "))
        words = shlex.split(command)
        assert flags in words and ("--hint" in words) == (kind == "controlnet")
        place = words.index("--output") + 1
        words[place] = str(tmp_path / kind)
        assert tiny.call("generate", *words[words.index("--model") :], "--steps", "2") == 0


def test_latents_of_another_autoencoder_are_refused(base: Path, hinted: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "base")
    told = json.loads((other / "final" / "ingredients.json").read_text())
    (other / "final" / "ingredients.json").write_text(json.dumps(told | {"autoencoder": "0" * 64}))
    given = ("--base", other, "--config", "lora", "--latents", hinted, "--output", tmp_path / "run")
    problem = tiny.refused("train_denoiser", *given, "--device", "cpu")
    assert "draws with autoencoder 000000000000" in problem.what and "encode_latents.py --autoencoder" in problem.hint


def test_a_resume_upon_another_base_is_refused(trained: dict[str, Path], base: Path, hinted: Path,
                                               tmp_path: Path) -> None:
    run, other = shutil.copytree(trained["lora"], tmp_path / "run"), shutil.copytree(base, tmp_path / "base")
    tiny.shake(other / "final")
    problem = tiny.refused("train_denoiser", "--base", other, "--latents", hinted, "--output", run, *TRAINING,
                           "--adapter.rank", 2, "--resume", "auto", "--max-steps", 8)  # fmt: skip
    assert "made with base denoiser" in problem.what and "another with --output" in problem.hint


def test_new_words_of_the_captions_are_learned_beside(base: Path, autoencoder: Path, tmp_path: Path) -> None:
    """Words that the base does not know; without --new-words they are named and read as unknown."""
    (tmp_path / "in").mkdir()
    for i in range(16):
        Image.new("RGB", (32, 32), (10 * i, 0, 0)).save(tmp_path / "in" / f"{i}.png")
        (tmp_path / "in" / f"{i}.txt").write_text("a red blicket" if i % 2 else "a wug, red")
    packed = ("--output", tmp_path / "data", "--resolution", 32, "--val-fraction", 0)
    assert tiny.call("make_shards", "pack", tmp_path / "in", *packed) == 0
    given = ("--autoencoder", autoencoder, "--data", tmp_path / "data", "--output", tmp_path / "latents")
    assert tiny.call("encode_latents", *given, "--device", "cpu") == 0
    assert train("lora", base, tmp_path / "latents", tmp_path / "run", "--new-words", "--max-steps", "1") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert sorted(config["adapter"]["words"]) == ["blicket", "wug"]
    pipeline = load_pipeline(tmp_path / "run", "cpu")
    assert not pipeline.text.readings(["a blicket and a wug"])[0].unknown
    assert list(load_pipeline(base, "cpu").text.readings(["a blicket"])[0].unknown) == ["blicket"]


def test_a_picture_says_with_what_it_was_drawn(trained: dict[str, Path], base: Path, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    """Names, weights, hashes; and --like draws it again with the same ones alone."""
    from training.pictures import grids

    run, drawn, how = trained["lora"], tmp_path / "drawn", ("--model", base, "--output", tmp_path / "again")
    words = ("--model", base, "--adapter", f"{run}:0.5", "--prompt", "red", "--output", drawn, "--steps", 2)
    assert tiny.call("generate", *words) == 0
    picture = drawn / "00000.png"
    facts = grids.facts(picture)
    assert facts["adapters"] == [["run", 0.5]] and "adapter-1" in facts["hashes"]
    assert tiny.call("generate", *how, "--adapter", run, "--like", picture) == 0
    assert f"the same pixels as {picture}" in capsys.readouterr().err
    weighed = tiny.refused("generate", *how, "--overwrite", "--adapter", f"{run}:0.8", "--like", picture)
    assert "which says 0.5" in weighed.what and weighed.hint == f"leave the weight out: --adapter {run}"
    none = tiny.refused("generate", *how, "--overwrite", "--like", picture)
    assert "was drawn with 1 adapters (run), 0 are given" in none.what and "--adapter" in none.hint
    other = tiny.refused("generate", *how, "--overwrite", "--adapter", trained["dora"], "--like", picture)
    assert "was made with adapter-1" in other.what and "--adapter" in other.hint


def test_a_base_and_its_adapters_become_one_model(trained: dict[str, Path], base: Path, tmp_path: Path) -> None:
    """Weights and words: it draws the same pixels; a control cannot."""
    chosen = [word for kind in ("lora", "dora", "textual-inversion") for word in ("--adapter", trained[kind])]
    one = tmp_path / "one"
    assert tiny.call("export_model", base, *chosen, "--output", one, "--dtype", "float32") == 0
    whole = load_pipeline(one, "cpu")
    together = [trained["lora"], (trained["dora"], 1.0), str(trained["textual-inversion"])]
    several = load_pipeline(base, "cpu", adapters=together)
    assert torch.equal(drawn(whole), drawn(several))
    assert not torch.equal(drawn(whole), drawn(load_pipeline(base, "cpu")))
    control = tiny.refused("export_model", base, "--adapter", trained["controlnet"], "--output", tmp_path / "two")
    assert "cannot become one" in control.what and "--control" in control.hint and not (tmp_path / "two").exists()
    alone = tiny.refused("export_model", trained["lora"], "--output", tmp_path / "two")
    assert "is an adapter upon base" in alone.what and "--adapter" in alone.hint


@pytest.mark.parametrize("kind", ["lora", "controlnet"])
def test_the_card_of_an_adapter_names_its_base(kind: str, trained: dict[str, Path],
                                               capsys: pytest.CaptureFixture[str]) -> None:
    """And how both are used; it is published without the base, and without its place."""
    card = (trained[kind] / "final" / "README.md").read_text()
    flag = "--adapter FOLDER" if kind == "lora" else "--control FOLDER --hint FOLDER/hint.png"
    assert "# Adapter of base" in card and f"--model BASE {flag}" in card and "words" not in card
    assert tiny.call("publish", trained[kind], "--repo", "me/mine", "--dry-run") == 0
    sent = capsys.readouterr().out
    assert "base.json" in sent and "autoencoder" not in sent and ("hint.png" in sent) == (kind == "controlnet")


@pytest.mark.parametrize(("text", "run", "weight"), [
    ("runs/a", "runs/a", 1.0), ("runs/a:0.5", "runs/a", 0.5), ("hf:ORG/NAME", "hf:ORG/NAME", 1.0), ("C:x", "C:x", 1.0),
    ("hf:ORG/NAME:-1", "hf:ORG/NAME", -1.0)])  # fmt: skip
def test_a_run_and_its_weight(text: str, run: str, weight: float) -> None:
    assert parse_chosen("--adapter", text) == (run, weight)


def test_a_weight_is_finite() -> None:
    with pytest.raises(Exception, match="finite"):
        parse_chosen("--adapter", "runs/a:nan")


def test_the_rest_of_the_config_is_the_base_s(base: Path, trained: dict[str, Path]) -> None:
    """All of it but what belongs to a training, and what the adapter's config says."""
    ours, theirs = (json.loads((run / "config.json").read_text()) for run in (trained["lora"], base))
    assert ours["optimizer"]["lr"] == 0.01
    differing = {section for section in ours if ours[section] != theirs[section]}
    assert differing == {"adapter", "optimizer", "train"}


def test_the_model_of_the_package_is_a_base(shapes: Path, tmp_path: Path) -> None:
    """Its weights are stored in less precision than they work in, of which its hash is."""
    given = ("--autoencoder", "demo", "--data", shapes, "--output", tmp_path / "latents", "--device", "cpu")
    assert tiny.call("encode_latents", *given) == 0
    words = ["--config", "lora", "--latents", tmp_path / "latents", "--output", tmp_path / "run", *tiny.SHORT]
    assert tiny.call("train_denoiser", "--base", "demo", *words, "--max-steps", "1", "--sample.steps", "1") == 0
