"""From captions to pictures: what a picture depends on, what it carries, what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranks
import tiny
import torch
from PIL import Image

from autoencoder.images import to_uint8, to_unit
from autoencoder.tiles import decode_tiled, encode_tiled
from training.drawing.requests import ask
from training.machine import launcher
from training.models.assembly import load_pipeline
from training.models.judge import Classifier, Judge
from training.pictures import grids
from training.tensors import save_tensors

CAPTIONS = ["a red circle at the top", "a small blue square", "a <b>bold</b> claim | ../../x"]


def generate(run: Path, output: Path, *words: object) -> Path:
    asked = [word for caption in CAPTIONS for word in ("--prompt", caption)]
    assert tiny.call("generate", "--model", run, "--output", output, "--device", "cpu", *asked, *words) == 0
    return output


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def unit(path: Path) -> torch.Tensor:
    """The picture as the networks see it, (1,3,H,W) in [-1, 1]."""
    return to_unit(torch.from_numpy(pixels(path).astype(np.uint8)).permute(2, 0, 1)[None])


def test_pictures_carry_how_they_were_made(denoiser: Path, tmp_path: Path) -> None:
    made = generate(denoiser, tmp_path / "out", "--seed", 7, "--num-images", 2, "--sampler", "euler", "--steps", 3)
    assert sorted(p.name for p in made.iterdir()) == [f"{i:05d}.png" for i in range(6)] + ["grid.png"]
    facts = grids.facts(made / "00005.png")
    assert facts["prompt"] == CAPTIONS[2] and facts["seed"] == 8
    assert facts["settings"]["sampler"]["kind"] == "euler" and facts["settings"]["sample"]["steps"] == 3
    record = json.loads((denoiser / "run.json").read_text())
    assert facts["hashes"]["autoencoder"] == record["hashes"]["autoencoder"]
    assert facts["hashes"]["denoiser"] == record["model"]
    assert str(Path.home()) not in json.dumps(facts)


def test_a_picture_depends_on_prompt_and_seed_alone(denoiser: Path, tmp_path: Path) -> None:
    """Another batch size and another order of prompts: pixels within 1 of 255."""
    one = generate(denoiser, tmp_path / "one", "--num-images", 2, "--batch-size", 1)
    all_at_once = generate(denoiser, tmp_path / "all", "--num-images", 2)
    for number in range(6):
        assert np.abs(pixels(one / f"{number:05d}.png") - pixels(all_at_once / f"{number:05d}.png")).max() <= 1
    alone = tmp_path / "alone"
    words = ("--model", denoiser, "--prompt", CAPTIONS[1], "--output", alone, "--seed", 1, "--device", "cpu")
    assert tiny.call("generate", *words) == 0
    assert np.abs(pixels(alone / "00000.png") - pixels(one / "00003.png")).max() <= 1
    assert np.abs(pixels(one / "00002.png") - pixels(one / "00003.png")).max() > 1  # seeds differ


def test_repeated_prompts_get_new_seeds_and_order_does_not_matter() -> None:
    requests = ask(["a", "b", "a"], 2, 10)
    assert [(r.prompt, r.seed) for r in requests] == [("a", 10), ("a", 11), ("b", 10), ("b", 11), ("a", 12), ("a", 13)]
    assert {(r.prompt, r.seed) for r in ask(["b", "a", "a"], 2, 10)} == {(r.prompt, r.seed) for r in requests}


def test_two_processes_make_the_pictures_of_one(denoiser: Path, tmp_path: Path) -> None:
    one = generate(denoiser, tmp_path / "one")
    asked = [word for caption in CAPTIONS for word in ("--prompt", caption)]
    words = ("--model", denoiser, "--output", tmp_path / "two", "--device", "cpu", *asked)
    assert ranks.start(2, tmp_path, "generate", *words) == [0, 0], ranks.said(tmp_path)
    assert (tmp_path / "two" / "grid.png").exists()
    for number in range(3):
        assert np.abs(pixels(one / f"{number:05d}.png") - pixels(tmp_path / "two" / f"{number:05d}.png")).max() <= 1


def test_each_process_draws_its_share_alone(denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three pictures the second process draws the second; the first draws the others, and then the grid of all."""
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    cpu, output = torch.device("cpu"), tmp_path / "out"
    monkeypatch.setattr("training.drawing.generate.processes", lambda args: (cpu, 1, 2))
    generate(denoiser, output)
    assert [path.name for path in output.iterdir()] == ["00001.png"]
    Image.new("RGB", (32, 32), "red").save(output / "00001.png")
    monkeypatch.setattr("training.drawing.generate.processes", lambda args: (cpu, 0, 2))
    generate(denoiser, output, "--overwrite")
    assert sorted(path.name for path in output.iterdir()) == ["00000.png", "00001.png", "00002.png", "grid.png"]
    assert (pixels(output / "00001.png") == [255, 0, 0]).all()
    shown = [Image.open(output / f"0000{n}.png") for n in range(3)]
    assert np.array_equal(pixels(output / "grid.png"), np.asarray(grids.grid(shown, 3, captions=CAPTIONS)))


def test_python_does_what_the_script_does(denoiser: Path, tmp_path: Path) -> None:
    made = generate(denoiser, tmp_path / "out")
    images = load_pipeline(denoiser, "cpu")(CAPTIONS, seeds=[0, 0, 0])
    for number, image in enumerate(images):
        assert np.abs(np.asarray(image).astype(int) - pixels(made / f"{number:05d}.png")).max() <= 1


def test_final_is_self_contained(denoiser: Path, tmp_path: Path) -> None:
    """A copy of final/ elsewhere draws the same picture."""
    shutil.copytree(denoiser / "final", tmp_path / "elsewhere")
    here, there = (load_pipeline(p, "cpu")(CAPTIONS[:1], seeds=3)[0] for p in (denoiser, tmp_path / "elsewhere"))
    assert np.array_equal(np.asarray(here), np.asarray(there))


def test_a_checkpoint_draws_too(denoiser: Path, tmp_path: Path) -> None:
    """The last checkpoint holds the averaged weights that final/ holds."""
    newest = max((denoiser / "checkpoints").glob("step-*"))
    here, there = (load_pipeline(p, "cpu")(CAPTIONS[:1], seeds=3)[0] for p in (denoiser, newest))
    assert np.array_equal(np.asarray(here), np.asarray(there))


def test_prompt_files(denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa red circle\r\n\r\n# a comment\n  a blue square  \n")
    words = ("--model", denoiser, "--output", tmp_path / "out", "--device", "cpu", "--prompts", file)
    assert tiny.call("generate", *words) == 0
    assert "ignored 2: blank or comment lines" in capsys.readouterr().err
    assert [grids.facts(tmp_path / "out" / f"0000{i}.png")["prompt"] for i in (0, 1)] == [
        "a red circle",
        "a blue square",
    ]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--prompt", "x", "--steps", "0"], 2, "steps: must be > 0"),
        (["--prompt", "x", "--sampler", "eulr"], 2, "did you mean 'euler'"),
        (["--prompt", "x", "--guidance-scale", "-1"], 2, "guidance"),
        (["--prompt", "x", "--size", "30"], 2, "nearest 24 or 32"),
        (["--prompt", "x", "--size", "big"], 2, "expected a number"),
        (["--prompt", "x", "--num-images", "0"], 2, "must be at least 1"),
        (["--prompt", "x", "--train.seed", "1"], 2, "settled by training"),
        (["--prompt", "x", "--grid.kind", "given"], 2, "2 given times"),
        (["--prompts", "nowhere.txt"], 3, "no such file of prompts"),
    ],
)
def test_what_is_refused(denoiser: Path, tmp_path: Path, words: list[str], code: int, said: str) -> None:
    problem = tiny.refused("generate", "--model", denoiser, "--output", tmp_path / "out", "--device", "cpu", *words)
    assert problem.code == code and said in problem.what + problem.hint


def test_empty_prompt_files_and_overwriting(denoiser: Path, tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n# nothing\n")
    output = generate(denoiser, tmp_path / "out")
    problem = tiny.refused("generate", "--model", denoiser, "--output", output, "--prompts", tmp_path / "none.txt")
    assert problem.code == 3 and "no prompts" in problem.what
    problem = tiny.refused("generate", "--model", denoiser, "--output", output, "--prompt", "x")
    assert "already holds pictures" in problem.what
    generate(denoiser, output, "--overwrite")


def test_a_run_of_the_other_stage_is_refused(autoencoder: Path, tmp_path: Path) -> None:
    problem = tiny.refused("generate", "--model", autoencoder, "--output", tmp_path / "out", "--prompt", "x")
    assert problem.code == 4 and "expected denoiser" in problem.what


def drawn(run: Path, output: Path, *words: object) -> Path:
    assert tiny.call("generate", "--model", run, "--output", output, "--device", "cpu", *words) == 0
    return output / "00000.png"


@pytest.fixture(scope="module")
def listening(denoiser: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The denoiser, with weights that listen to captions."""
    return tiny.shake(Path(shutil.copytree(denoiser / "final", tmp_path_factory.mktemp("listening") / "final")))


def test_further_captions_have_their_own_weights(listening: Path, tmp_path: Path) -> None:
    """Weight 0 changes nothing, the prompt again with the rest of its scale makes it up, another caption matters."""
    words = ("--prompt", CAPTIONS[0], "--guidance-scale")
    plain = pixels(drawn(listening, tmp_path / "plain", *words, 3))
    assert np.abs(pixels(drawn(listening, tmp_path / "unguided", *words, 1)) - plain).max() > 1
    nothing = drawn(listening, tmp_path / "nothing", *words, 3, "--also", 0, CAPTIONS[1])
    rest = drawn(listening, tmp_path / "rest", *words, 1, "--also", 2, CAPTIONS[0])
    assert np.abs(pixels(nothing) - plain).max() <= 1 and np.abs(pixels(rest) - plain).max() <= 1
    other = drawn(listening, tmp_path / "other", *words, 3, "--also", -2, CAPTIONS[1])
    assert np.abs(pixels(other) - plain).max() > 1
    assert grids.facts(other)["also"] == [[CAPTIONS[1], -2.0]]
    words = ("--model", listening, "--output", tmp_path / "no", "--device", "cpu", "--prompt", "x", "--also")
    assert "expected a number" in str(tiny.refused("generate", *words, "x", "y"))
    assert "not rescaled" in str(tiny.refused("generate", *words, "1", "y", "--guidance.rescale", "0.5"))


def test_a_picture_is_inverted_and_drawn_again(denoiser: Path, autoencoder: Path, tmp_path: Path) -> None:
    """With its own caption the decoder's picture of it comes back; without inversion another one does."""
    words = ("--sampler", "ddim", "--guidance-scale", "1", "--steps", "60", "--prompt", CAPTIONS[0])
    first = drawn(denoiser, tmp_path / "first", *words)
    back = ("--seed", "5", "--invert", first, "--invert-prompt", CAPTIONS[0])
    again = drawn(denoiser, tmp_path / "again", *words, *back)
    other = drawn(denoiser, tmp_path / "other", *words, "--seed", "5")
    pipeline = load_pipeline(denoiser, "cpu")
    with torch.no_grad():
        moments = pipeline.autoencoder.encode(unit(first))
        decoded = to_uint8(pipeline.autoencoder.decode(pipeline.autoencoder.norm.mean_latents(moments)))
    wanted = decoded[0].permute(1, 2, 0).numpy().astype(int)
    far, near = np.abs(pixels(other) - wanted).mean(), np.abs(pixels(again) - wanted).mean()
    assert near < 0.2 * far, (near, far)
    missing = tiny.refused("generate", "--model", denoiser, "--output", tmp_path / "no", *words, "--invert", "none.png")
    assert missing.code == 3 and "none.png" in str(missing)


def test_classifier_guidance_raises_what_its_classifier_believes(denoiser: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, folder = Classifier((CAPTIONS[0], CAPTIONS[1]), 4).eval(), tmp_path / "classifier"
    folder.mkdir()
    save_tensors(folder / "model.safetensors", model.state_dict())
    (folder / "config.json").write_text(json.dumps({"classes": model.classes, "width": 4}))
    belief = []
    for strength in (0, 200):
        words = ("--guidance.kind", "classifier", "--guidance.strength", strength, "--steps", 8, "--classifier", folder)
        picture = drawn(denoiser, tmp_path / str(strength), *words, "--prompt", CAPTIONS[0])
        belief.append(Judge(model)(unit(picture), [CAPTIONS[0]]).item())
    assert belief[1] > belief[0] and "classifier" in grids.facts(picture)["hashes"]
    words = ("--model", denoiser, "--output", tmp_path / "no", "--device", "cpu", "--guidance.kind", "classifier")
    assert "log p(condition" in str(tiny.refused("generate", *words, "--prompt", CAPTIONS[0]))
    other = tiny.refused("generate", *words, "--prompt", CAPTIONS[2], "--classifier", folder)
    assert "not one of the classifier's 2 classes" in str(other)
    assert tiny.refused("generate", *words, "--prompt", "x", "--classifier", tmp_path).code == 3


def test_like_makes_the_same_pixels_or_says_what_differs(
    denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = generate(denoiser, tmp_path / "made", "--seed", 7, "--sampler", "euler", "--steps", 3, "--guidance-scale", 2,
                    "--negative-prompt", "a cross", "--also", "0.5", "a green cross")  # fmt: skip
    again = drawn(denoiser, tmp_path / "again", "--like", made / "00001.png")
    assert "the same pixels as" in capsys.readouterr().err
    assert again.read_bytes() == (made / "00001.png").read_bytes()  # what it says of itself too
    twice = tiny.refused("generate", "--model", denoiser, "--output", tmp_path / "no", "--like", again, "--steps", "4")
    assert "leave out --steps" in str(twice)
    facts = grids.facts(again)
    grids.save(Image.open(again), again, facts | {"hashes": facts["hashes"] | {"text_encoder": "0" * 64}})
    words = ("--model", denoiser, "--output", tmp_path / "other", "--device", "cpu")
    changed = tiny.refused("generate", *words, "--like", again)
    assert changed.code == 4 and "made with text_encoder 000000000000, this is" in str(changed)
    Image.open(again).save(again)
    assert "does not say how it was made" in str(tiny.refused("generate", *words, "--like", again))


def test_a_launcher_decides_the_precision_where_no_flag_or_picture_does(
    denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = drawn(denoiser, tmp_path / "plain", "--prompt", CAPTIONS[0], "--steps", 2)
    monkeypatch.setenv(launcher.PRECISION, "bf16")
    made = drawn(denoiser, tmp_path / "made", "--prompt", CAPTIONS[0], "--steps", 2)
    assert grids.facts(plain)["precision"] == "no" and grids.facts(made)["precision"] == "bf16"
    assert "note: --mixed-precision bf16, as ACCELERATE_MIXED_PRECISION asks" in capsys.readouterr().err
    words = ("--model", denoiser, "--output", tmp_path / "no", "--device", "cpu")
    told = tiny.refused("generate", *words, "--prompt", "x", "--mixed-precision", "no")
    assert told.code == 2 and told.hint.startswith("give --mixed-precision bf16, or start with")
    assert drawn(denoiser, tmp_path / "again", "--like", plain).read_bytes() == plain.read_bytes()
    assert "not used: ACCELERATE_MIXED_PRECISION=bf16" in capsys.readouterr().err
    told = tiny.refused("generate", *words, "--like", plain, "--mixed-precision", "no")
    assert told.what.endswith("leave out --mixed-precision")


def test_tiles(denoiser: Path, tmp_path: Path) -> None:
    """A picture within one tile is that of the whole, bit for bit; a larger one is put together of tiles."""
    whole = generate(denoiser, tmp_path / "whole", "--size", "48x96")
    one = generate(denoiser, tmp_path / "one", "--size", "48x96", "--tile", 24)
    tiled = generate(denoiser, tmp_path / "tiled", "--size", "48x96", "--tile", 16)
    assert np.array_equal(pixels(one / "00000.png"), pixels(whole / "00000.png"))
    assert grids.facts(tiled / "00000.png")["tile"] == 16 and grids.facts(whole / "00000.png")["tile"] == 0
    pipeline = replace(load_pipeline(denoiser, "cpu"), tile=16)
    latents, images = torch.randn(1, 4, 12, 24), torch.rand(1, 3, 48, 96) * 2 - 1
    with torch.no_grad():
        wanted = decode_tiled(pipeline.autoencoder, latents, tile=16, overlap=4)
        assert torch.equal(pipeline.decode(latents), wanted)
        assert torch.equal(pipeline.encode(images), encode_tiled(pipeline.autoencoder, images, tile=16, overlap=4))
    # Drawn alone, not in the command's batch, a convolution may round the other way: one step of 255 at the most.
    alone = next(pipeline.pixels([CAPTIONS[0]], [0], size=(48, 96)))[0].permute(1, 2, 0).numpy()
    assert np.abs(alone.astype(int) - pixels(tiled / "00000.png")).max() <= 1
    again = ("--model", denoiser, "--output", tmp_path / "again", "--device", "cpu", "--like", tiled / "00000.png")
    assert tiny.call("generate", *again) == 0
    assert grids.facts(tmp_path / "again" / "00000.png")["tile"] == 16
    assert np.array_equal(pixels(tmp_path / "again" / "00000.png"), pixels(tiled / "00000.png"))
    assert "--tile" in tiny.refused("generate", *again, "--overwrite", "--tile", 3).what


def test_a_picture_of_another_shape_is_cut_and_that_is_told(
    denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGBA", (50, 37), (200, 30, 30, 128)).save(tmp_path / "odd.png")
    words = ("--sampler", "ddim", "--guidance-scale", "1", "--prompt", CAPTIONS[0])
    drawn(denoiser, tmp_path / "out", *words, "--invert", tmp_path / "odd.png")
    said = capsys.readouterr().err
    assert "cut 1: picture of --invert, its middle resized to 32x32 (odd.png 50x37)" in said
    assert "replaced 1: transparency, laid on the background" in said
    drawn(denoiser, tmp_path / "again", *words, "--invert", tmp_path / "out" / "00000.png")
    assert "--invert" not in capsys.readouterr().err
