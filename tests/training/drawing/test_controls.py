"""Drawings by a hint: what reaches the network, what a picture says of it, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from training.data.latents import Latents
from training.drawing.given import Given
from training.drawing.hints import Shown
from training.errors import UserError
from training.ledger import Ledger
from training.models.adapters import Chosen
from training.models.assembly import load_pipeline
from training.models.hints import HintRead, hint_read, keep_hint
from training.pictures import grids
from training.pictures.hints import RULES, Edges, edges
from training.shards.reading import ShardSet
from training.tensors import load_tensors, save_tensors

CONFIG = '[adapter]\nkind = "controlnet"\nhint_channels = 1\nfactor = 4\n'


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hinted")
    tiny.call("make_shards", *f"pack shapes --samples 24 --hint edges --output {root}/shapes".split())
    words = f"--autoencoder demo --data {root}/shapes --output {root}/latents --device cpu --num-workers 0"
    tiny.call("encode_latents", *words.split())
    return root / "latents"


@pytest.fixture(scope="module")
def control(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A control of edges upon the demo, whose layers that speak are not 0."""
    root = tmp_path_factory.mktemp("control")
    (root / "control.toml").write_text(CONFIG)
    run = root / "run"
    words = f"--base demo --config {root}/control.toml --latents {latents} --output {run} --max-steps 1 --batch-size 4"
    tiny.call("train_denoiser", *f"{words} --device cpu --num-workers 0 --sample.steps 1 --sample-every 10".split())
    file = run / "final" / "model.safetensors"
    draw = torch.Generator().manual_seed(0)
    save_tensors(file, {name: value + 0.05 * torch.randn(value.shape, generator=draw)
                        for name, value in load_tensors(file).items()})
    return run


@pytest.fixture(scope="module")
def hint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outline of a square."""
    values = np.zeros((32, 32), np.uint8)
    values[8:24, 8:24] = 255
    values[9:23, 9:23] = 0
    path = tmp_path_factory.mktemp("hints") / "square.png"
    Image.fromarray(values).save(path)
    return path


def draw(output: Path, *words: object) -> np.ndarray:
    asked = ([] if "--model" in words else ["--model", "demo"]) + ["--device", "cpu", "--output", output]
    given = [] if "--like" in words else ["--prompt", "a red square", "--steps", 2]
    assert tiny.call("generate", *asked, *given, *words) == 0
    return np.asarray(Image.open(output / "00000.png")).astype(int)


def refused(output: Path, *words: object) -> UserError:
    with pytest.raises(UserError) as caught:
        draw(output, *words)
    return caught.value


def test_a_control_says_what_it_is_shown(control: Path, latents: Path) -> None:
    assert hint_read(control) == (1, "edges", False, None)
    kept = Image.open(control / "final" / "hint.png")
    first = np.load(io.BytesIO(ShardSet(latents, "val").read_field(0, "extra-image.npy")))
    assert np.array_equal(np.asarray(kept)[None], first)
    sheet = next((control / "samples").glob("*/grid.png"))
    assert grids.facts(sheet)["captions"]


def test_hints_are_obeyed_and_weights_are_theirs(control: Path, hint: Path, tmp_path: Path) -> None:
    plain = draw(tmp_path / "plain")
    shown = draw(tmp_path / "shown", "--control", control, "--hint", hint)
    assert not np.array_equal(shown, plain)
    for name, words in {
        "weight": ("--control", f"{control}:0", "--hint", hint),
        "scale": ("--control", control, "--hint", hint, "--control-scale", 0),
        "never": ("--control", control, "--hint", hint, "--control-interval", 0, 0),
    }.items():
        assert np.array_equal(draw(tmp_path / name, *words), plain), name
    halves = ("--control", f"{control}:0.25", "--hint", hint, "--control", control, "--hint", hint)
    both = draw(tmp_path / "halves", *halves, "--control-scale", 2, 0.5)
    assert abs(both - shown).max() <= 1
    turned = tmp_path / "turned.png"
    Image.open(hint).transpose(Image.Transpose.ROTATE_90).transform(
        (32, 32), Image.Transform.AFFINE, (1, 0, 5, 0, 1, 5)).save(turned)
    assert not np.array_equal(draw(tmp_path / "other", "--control", control, "--hint", turned), shown)


def test_what_reaches_the_network(control: Path, hint: Path, tmp_path: Path) -> None:
    """The drawing from Python by the same hint in [0, 1] is the same picture."""
    shown = draw(tmp_path / "shown", "--control", f"{control}:0.8", "--hint", hint)
    pipeline = load_pipeline("demo", "cpu", adapters=[Chosen(control, 0.8)])
    values = torch.from_numpy(np.asarray(Image.open(hint)).copy())[None, None] / 255
    (picture,) = pipeline("a red square", seeds=0, extras={"image": values}, num_inference_steps=2)
    assert abs(np.asarray(picture).astype(int) - shown).max() <= 1
    for wrong in (values * 2 - 1, values * 255, values * float("nan")):
        with pytest.raises(ValueError, match=r"'image' is a hint, which has values in \[0, 1\]"):
            pipeline("a red square", seeds=0, extras={"image": wrong})
    pipeline("a red square", seeds=0, extras={"image": values * 1.0005}, num_inference_steps=1)
    with pytest.raises(ValueError, match="reads the hint 'image'"):
        pipeline("a red square", seeds=0, num_inference_steps=2)


def test_a_hint_is_made_of_a_picture(control: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = Image.new("RGB", (32, 32), "white")
    photo.paste((200, 0, 0), (6, 6, 20, 20))
    photo.save(tmp_path / "photo.png")
    Image.fromarray(edges(np.asarray(photo))).save(tmp_path / "edges.png")
    made = draw(tmp_path / "made", "--control", control, "--hint-of", tmp_path / "photo.png")
    assert np.array_equal(made, draw(tmp_path / "given", "--control", control, "--hint", tmp_path / "edges.png"))
    assert "resized" not in capsys.readouterr().err
    photo.resize((96, 64)).save(tmp_path / "wide.png")
    draw(tmp_path / "wide", "--control", control, "--hint-of", tmp_path / "wide.png")
    assert "cut 1: picture of --hint-of, its middle resized to 32x32 (wide.png 96x64)" in "".join(capsys.readouterr())
    again = ("--like", tmp_path / "made" / "00000.png", "--control", control)
    assert "--hint-of" in refused(tmp_path / "x", *again, "--hint", tmp_path / "edges.png").hint
    assert np.array_equal(draw(tmp_path / "again", *again, "--hint-of", tmp_path / "photo.png"), made)


@pytest.mark.parametrize("rule", ["background", "alpha"])
def test_the_rule_that_made_a_silhouette_is_told(rule: str) -> None:
    """And a larger picture's resizing; the silhouette is that of the picture, not of what it is laid on."""
    photo = Image.new("RGBA", (64, 64), "white")
    photo.paste((255, 255, 250, 0) if rule == "alpha" else (200, 0, 0), (16, 16, 48, 48))
    given, ledger = Given("hint-of", "photo.png", file_of(photo)), Ledger()
    shown = Shown("RUN", None, HintRead(1, "mask", False), "--hint-of", lambda source: source, made=True)
    values = shown.values(given, (32, 32), ledger)[..., 0]
    inside = np.zeros((32, 32), bool)
    inside[8:24, 8:24] = True
    assert ((values > 0) == (inside != (rule == "alpha"))).mean() > 0.9
    effect, why = RULES[rule]
    resized = "replaced 1: picture of --hint-of, resized to 32x32 (photo.png 64x64)"
    assert sorted(ledger.lines()) == sorted([resized, f"{effect} 1: {why} (photo.png)"])


def file_of(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def test_a_picture_can_be_drawn_again_by_its_hint_alone(control: Path, hint: Path, tmp_path: Path) -> None:
    words = ("--control-interval", 0.2, 1, "--control-scale", 0.7)
    first = draw(tmp_path / "first", "--control", control, "--hint", hint, *words)
    facts = grids.facts(tmp_path / "first" / "00000.png")["controls"]
    assert facts["runs"] == [["run", 0.7]] and facts["interval"] == [0.2, 1.0] and facts["made"] is False
    assert facts["hints"][0][0] == "square.png" and len(facts["hints"][0][1]) == 64
    like = ("--like", tmp_path / "first" / "00000.png")
    both = ("--control", control, "--hint", hint)
    assert np.array_equal(draw(tmp_path / "again", *like, *both), first)
    assert "drawn with 1 controls (run), 0 are given" in refused(tmp_path / "x", *like).what
    assert "--hint" in refused(tmp_path / "x", *like, "--control", control).hint
    assert "leave out --control-scale" in refused(tmp_path / "x", *like, *both, "--control-scale", 1).what
    weighed = refused(tmp_path / "x", *like, "--control", f"{control}:0.5", "--hint", hint)
    assert "its picture, which says 0.7: --control" in weighed.what and f"--control {control}" in weighed.hint
    draw(tmp_path / "same", *like, "--control", f"{control}:0.7", "--hint", hint)
    other = tmp_path / "other.png"
    Image.open(hint).rotate(180).transpose(Image.Transpose.FLIP_LEFT_RIGHT).point(lambda v: v // 2).save(other)
    problem = refused(tmp_path / "x", *like, "--control", control, "--hint", other)
    assert problem.code == 4 and "another hint than the one given for square.png" in problem.what
    changed = shutil.copytree(control, tmp_path / "changed")
    file = changed / "final" / "model.safetensors"
    save_tensors(file, {name: value * 1.01 for name, value in load_tensors(file).items()})
    problem = refused(tmp_path / "x", *like, "--control", changed, "--hint", hint)
    assert problem.code == 4 and "adapter-1" in problem.what and "--control" in problem.hint
    forged = Image.open(tmp_path / "first" / "00000.png")
    told = grids.facts(tmp_path / "first" / "00000.png") | {"controls": {**facts, "runs": [["run", "much"]]}}
    grids.save(forged, tmp_path / "forged.png", told)
    assert "does not say how" in refused(tmp_path / "x", "--like", tmp_path / "forged.png", *both).what


def save(path: Path, values: Any, form: str = "PNG") -> Path:
    Image.fromarray(values).save(path, form)
    return path


def test_hints_of_other_sizes_are_resized_and_told(
    control: Path, hint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines of one pixel stay: the larger hint is the hint once it is resized."""
    small = np.asarray(Image.open(hint))
    wanted = draw(tmp_path / "exact", "--control", control, "--hint", hint)
    thin = np.zeros((96, 96), np.uint8)
    thin[2::3, 1::3] = small  # one pixel of nine
    large = save(tmp_path / "large.png", thin)
    capsys.readouterr()
    assert np.array_equal(draw(tmp_path / "large", "--control", control, "--hint", large), wanted)
    assert "hint of --hint, resized to 32x32 (large.png 96x96)" in "".join(capsys.readouterr())
    wide = save(tmp_path / "wide.png", np.pad(small, ((0, 0), (8, 8))))
    assert np.array_equal(draw(tmp_path / "wide", "--control", control, "--hint", wide), wanted)
    assert "cut 1: hint of --hint, its middle resized to 32x32 (wide.png 48x32)" in "".join(capsys.readouterr())
    draw(tmp_path / "larger", "--control", control, "--hint", hint, "--size", "40x40")
    said = "".join(capsys.readouterr())
    assert "things may be repeated or torn" in said and "--windows" not in said  # which are refused beside a hint
    deep = save(tmp_path / "deep.png", small.astype(np.uint16) * 257)
    assert np.array_equal(draw(tmp_path / "deep", "--control", control, "--hint", deep), wanted)
    blank = save(tmp_path / "blank.png", np.zeros((32, 32), np.uint8))
    draw(tmp_path / "blank", "--control", control, "--hint", blank)
    assert "one value everywhere" in "".join(capsys.readouterr())


def test_deep_hints_are_read_as_those_that_were_learned_from(
    control: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the range that they were packed with, which data, latents and run say; else that of their type, and told."""
    depths = (np.arange(1024).reshape(32, 32) * 9 + np.arange(3)[:, None, None] * 200).astype(np.uint16)
    for number, values in enumerate(depths):
        for folder, picture in (("photos", Image.new("RGB", (32, 32), (9 * number, 0, 0))), ("depths", values)):
            (tmp_path / folder).mkdir(exist_ok=True)
            file = tmp_path / folder / f"{number}.png"
            picture.save(file) if isinstance(picture, Image.Image) else save(file, picture)
    words = f"pack {tmp_path}/photos --output {tmp_path}/data --resolution 32 --val-fraction 0.9 --hint depth"
    also = f"--hint-files {tmp_path}/depths --hint-range 0 10000 --missing-caption empty"
    tiny.call("make_shards", *words.split(), *also.split())
    words = f"--autoencoder demo --data {tmp_path}/data --output {tmp_path}/latents --device cpu --num-workers 0"
    tiny.call("encode_latents", *words.split())
    packed = ShardSet(tmp_path / "latents", "val")
    run = shutil.copytree(control, tmp_path / "run")
    keep_hint(run / "final", packed.summary["hint"], Latents(packed))
    assert hint_read(run) == (1, "depth", False, (0.0, 10000.0))
    source = tmp_path / "depths" / f"{packed.key(0)}.png"
    shown = draw(tmp_path / "deep", "--control", run, "--hint", source)
    how = "hint of more than 8 bits, read from 0 to 10000, that of the hints it learned from"
    assert f"replaced 1: {how} ({source.name})" in "".join(capsys.readouterr())
    assert np.array_equal(shown, draw(tmp_path / "kept", "--control", run, "--hint", run / "final" / "hint.png"))
    noted = run / "final" / "hint.json"
    noted.write_text(noted.read_text().replace("10000", "65535"))
    assert not np.array_equal(shown, draw(tmp_path / "other", "--control", run, "--hint", source))
    noted.write_text(noted.read_text().replace("65535", "-1"))
    assert "not LOW HIGH" in refused(tmp_path / "x", "--control", run, "--hint", source).what
    capsys.readouterr()
    draw(tmp_path / "unsaid", "--control", control, "--hint", source)
    assert "guessed 1: hint of more than 8 bits, read from 0 to 65535" in "".join(capsys.readouterr())


def test_a_run_that_does_not_say_what_its_hints_are(control: Path, hint: Path, tmp_path: Path) -> None:
    """As one of another program: nothing says how its hints may be resized."""
    silent = shutil.copytree(control, tmp_path / "silent")
    (silent / "final" / "hint.json").unlink()
    shown = draw(tmp_path / "shown", "--control", silent, "--hint", hint)
    assert np.array_equal(shown, draw(tmp_path / "said", "--control", control, "--hint", hint))
    large = save(tmp_path / "large.png", np.eye(64, dtype=np.uint8) * 255)
    assert "does not say what its hints are" in refused(tmp_path / "x", "--control", silent, "--hint", large).what
    assert "--hint FILE" in refused(tmp_path / "x", "--control", silent, "--hint-of", large).hint


def test_hints_go_with_the_pictures_of_a_folder(
    control: Path, hint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name, at the size of each picture, whose sides nothing divides."""
    for name in ("pictures", "hints"):
        (tmp_path / name).mkdir()
    for number, size in enumerate(((30, 34), (32, 32))):
        Image.new("RGB", size, (90 * number, 60, 0)).save(tmp_path / "pictures" / f"{number}.png")
        line = np.zeros((size[1], size[0]), np.uint8)
        line[:, 7 + 9 * number] = 255
        save(tmp_path / "hints" / f"{number}.png", line)
    words = ("--image", tmp_path / "pictures", "--control", control, "--prompt", "a red square", "--steps", 2)
    output = tmp_path / "out"
    asked = ("--model", "demo", "--device", "cpu", "--output", output, *words, "--hint", tmp_path / "hints")
    assert tiny.call("generate", *asked) == 0
    said = "".join(capsys.readouterr())
    assert "drawn at another size than the trained 32x32: --size (30x34)" in said and "--windows" not in said
    made = sorted(output.glob("0*.png"))
    assert [Image.open(path).size for path in made] == [(30, 34), (32, 32)]
    assert [grids.facts(path)["controls"]["hints"][0][0] for path in made] == ["0.png", "1.png"]
    alone = draw(tmp_path / "alone", "--image", tmp_path / "pictures" / "1.png", "--control", control,
                 "--hint", tmp_path / "hints" / "1.png")
    assert abs(alone - np.asarray(Image.open(made[1])).astype(int)).max() <= 1
    (tmp_path / "hints" / "1.png").unlink()
    assert "none for 1.png" in refused(tmp_path / "x", *words, "--hint", tmp_path / "hints").what
    problem = refused(tmp_path / "x", "--control", control, "--hint", tmp_path / "hints")
    assert "nothing says which picture" in problem.what


def test_a_model_that_is_itself_shown_a_hint(
    control: Path, latents: Path, hint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By further input channels: the hint is the model's own, and no control is needed."""
    run = tmp_path / "run"
    words = ("--latents", latents, "--output", run, *tiny.DENOISER, "--max-steps", 1, "--sample-every", 10)
    words = (*words, "--batch-size", 8, "--image.kind", "hint")
    problem = tiny.refused("train_denoiser", *words, "--image.hint_channels", 3)
    assert problem.what == "image.hint_channels is 3, the hints of these latents have 1" and not run.exists()
    assert "leave image.hint_channels out" in problem.hint
    tiny.call("train_denoiser", *words)
    assert json.loads((run / "config.json").read_text())["image"]["hint_channels"] == 1
    assert hint_read(run) == (1, "edges", True, None) and (run / "final" / "hint.png").is_file()
    first = draw(tmp_path / "first", "--model", run, "--hint", hint)
    facts = grids.facts(tmp_path / "first" / "00000.png")["controls"]
    assert facts["runs"] == [] and facts["hints"][0][0] == "square.png"
    like = ("--model", run, "--like", tmp_path / "first" / "00000.png")
    assert np.array_equal(draw(tmp_path / "again", *like, "--hint", hint), first)
    assert "--hint" in refused(tmp_path / "x", *like).hint
    assert "model is shown one" in refused(tmp_path / "x", "--model", run).what
    assert "itself shown a hint" in refused(
        tmp_path / "x", "--model", run, "--hint", hint, "--control", control, "--hint", hint).what
    assert "are of controls" in refused(tmp_path / "x", "--model", run, "--hint", hint, "--control-scale", 2).what
    # A control's run as --model is its base with the control at work.
    whole = draw(tmp_path / "whole", "--model", control, "--hint", hint)
    assert np.array_equal(whole, draw(tmp_path / "parts", "--control", control, "--hint", hint))


def test_what_does_not_go_together(control: Path, hint: Path, tmp_path: Path) -> None:
    out, both = tmp_path / "out", ("--control", control, "--hint", hint)
    assert "0 hints were given, and 1 controls" in refused(out, "--control", control).what
    assert "1 hints were given, and 0 controls" in refused(out, "--hint", hint).what
    assert "leave one of them out" in refused(out, *both, "--hint-of", hint).hint
    assert "--control" in refused(out, "--adapter", control).hint
    assert "is no control" in refused(out, "--control", "demo", "--hint", hint).what
    assert "not with --windows" in refused(out, *both, "--windows", 4).what
    assert "not with inversion" in refused(out, *both, "--invert", hint).what
    assert "2 numbers for 1 controls" in refused(out, *both, "--control-scale", 1, 2).what
    assert "finite" in refused(out, *both, "--control-scale", "nan").what
    assert "0 <= low <= high <= 1" in refused(out, *both, "--control-interval", 0.5, 0.2).what
    colour = save(tmp_path / "colour.png", np.full((32, 32, 3), (255, 0, 0), np.uint8))
    problem = refused(out, "--control", control, "--hint", colour)
    assert "colour in a hint of edges" in problem.what and "hints of edges, of 1 channels" in problem.hint
    (tmp_path / "text.png").write_text("a hint")
    assert "not an image" in refused(out, "--control", control, "--hint", tmp_path / "text.png").what
    assert refused(out, "--control", control, "--hint", tmp_path / "no.png").code == 3
    assert not out.exists() or not list(out.glob("0*.png"))
    assert Edges().of_pixels
