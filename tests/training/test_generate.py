"""From captions to pictures: what a picture depends on, what it carries, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from training import pictures
from training.generate import ask
from training.system import load_pipeline

CAPTIONS = ["a red circle at the top", "a small blue square", "a <b>bold</b> claim | ../../x"]


def generate(run: Path, output: Path, *words: object) -> Path:
    asked = [word for caption in CAPTIONS for word in ("--prompt", caption)]
    assert tiny.call("generate", "--model", run, "--output", output, "--device", "cpu", *asked, *words) == 0
    return output


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_pictures_carry_how_they_were_made(denoiser: Path, tmp_path: Path) -> None:
    made = generate(denoiser, tmp_path / "out", "--seed", 7, "--num-images", 2, "--sampler", "euler", "--steps", 3)
    assert sorted(p.name for p in made.iterdir()) == [f"{i:05d}.png" for i in range(6)] + ["grid.png"]
    facts = pictures.facts(made / "00005.png")
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
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = tiny.spawn(*torchrun, tiny.SCRIPTS / "generate.py", *words, limit=240)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two" / "grid.png").exists()
    for number in range(3):
        assert np.abs(pixels(one / f"{number:05d}.png") - pixels(tmp_path / "two" / f"{number:05d}.png")).max() <= 1


def test_python_does_what_the_script_does(denoiser: Path, tmp_path: Path) -> None:
    made = generate(denoiser, tmp_path / "out")
    images = load_pipeline(denoiser, "cpu")(CAPTIONS, seeds=[0, 0, 0])
    for number, image in enumerate(images):
        assert np.abs(np.asarray(image).astype(int) - pixels(made / f"{number:05d}.png")).max() <= 1


def test_final_is_self_contained(denoiser: Path, tmp_path: Path) -> None:
    """A copy of final/ elsewhere draws the same picture."""
    import shutil

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
    assert "2 blank or comment lines skipped" in capsys.readouterr().err
    assert [pictures.facts(tmp_path / "out" / f"0000{i}.png")["prompt"] for i in (0, 1)] == [
        "a red circle",
        "a blue square",
    ]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--prompt", "x", "--steps", "0"], 2, "steps: must be > 0"),
        (["--prompt", "x", "--sampler", "eulr"], 2, "did you mean 'euler'"),
        (["--prompt", "x", "--guidance-scale", "-1"], 2, "guidance"),
        (["--prompt", "x", "--size", "30"], 2, "nearest 28 or 32"),
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
