"""The last line of each step is the command of the next one: from pictures to drawn ones by pasting alone."""

from __future__ import annotations

import io
import shlex
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import tiny
from packs import png, tar
from PIL import Image

from ldm.text.tokenizer import WordTokenizer
from training.data.latents import Latents
from training.doors.make_shards import main as make_shards
from training.errors import Unreachable
from training.models.text_encoders import keep_vocabulary, known_words
from training.next_step import SCRIPTED, again, beside, prompt, tell_next
from training.next_step import encoding as encoding_of
from training.pictures import grids
from training.shards.reading import ShardSet
from training.stages.denoiser_job import DenoiserJob

Said = pytest.CaptureFixture[str]
QUICK = ["--max-steps", "2", "--batch-size", "8", "--train.validation_size", "4", "--config", "smoke"]
HURRIED = {
    "train_autoencoder": [*QUICK, "--model.channels", "8,8,8", "--model.groups", "4", "--discriminator.width", "4"],
    "encode_latents": ["--num-workers", "0"],
    "train_denoiser": [*QUICK, "--backbone.width", "16", "--backbone.depth", "1", "--sample.steps", "2"],
    "generate": ["--steps", "2"], "upscale": ["--steps", "2"],
    "evaluate": ["--count", "10", "--steps", "2"],
    "make_shards": ["--missing-caption", "empty"],
}


def told(said: str) -> list[list[str]]:
    """The words of each `next:` line, which are the last ones."""
    lines = said.splitlines()
    commands = [line.removeprefix("next: ") for line in lines if line.startswith("next: ")]
    assert commands and [f"next: {command}" for command in commands] == lines[-len(commands) :]
    return [shlex.split(command) for command in commands]


def paste(words: list[str], *more: object) -> None:
    """Run a command that was told, in this process, with what makes it short."""
    name, start = verb(words)
    assert tiny.call(name, *words[start:], *HURRIED[name], *more) == 0


def verb(words: list[str]) -> tuple[str, int]:
    """The door that a command opens, and where its own words begin."""
    start = 4 if words[1:3] == ["-m", "training"] else 2  # or a script of this folder
    return Path(words[start - 1]).stem.replace("-", "_"), start


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_from_pictures_to_pictures_by_the_lines_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    """With a blank and a quote in the paths; what is proposed is never there yet."""
    monkeypatch.chdir(tmp_path)
    folder = "Anna's pictures"
    pack = ["pack", "shapes", "--samples", "60", "--val-fraction", "0.2", "--output", f"{folder}/data"]
    assert tiny.call("make_shards", *pack) == 0
    [training] = told(capsys.readouterr().err)
    assert value(training, "--data") == f"{folder}/data" and value(training, "--output") == f"{folder}/autoencoder"
    paste(training, "--device", "cpu")
    [encoding] = told(capsys.readouterr().err)
    assert value(encoding, "--autoencoder") == f"{folder}/autoencoder" and value(encoding, "--device") == "cpu"
    paste(encoding, "--flip")
    [second] = told(capsys.readouterr().err)
    assert value(second, "--latents") == f"{folder}/latents" and value(second, "--train.flip") == "true"
    paste(second)
    drawing, measuring = told(capsys.readouterr().err)
    shards = ShardSet(Path(folder) / "data", "val")
    assert value(drawing, "--prompt") in {shards.read(place)["txt"].decode() for place in range(len(shards))}
    assert value(drawing, "--model") == value(measuring, "--model") == f"{folder}/denoiser"
    assert value(measuring, "--data") == f"{folder}/data"
    paste(drawing)
    assert (Path(folder) / "pictures" / "00000.png").is_file()
    capsys.readouterr()
    paste(measuring)
    assert "frechet_generated" in capsys.readouterr().out


def grey(level: int) -> bytes:
    """A picture of 32 x 32."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (level, level, level)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("path", "there", "proposed"), [
    ("runs/ae", [], "runs/latents"), ("runs/ae/final", [], "runs/latents"), ("photos", [], "photos-latents"),
    ("photos-data", ["photos-latents"], "photos-latents-2"), ("ae", ["latents", "latents-2"], "latents-3"),
    ("s3://bucket/my-data/?token=secret", [], "my-latents"),
])  # fmt: skip
def test_a_free_name(
    path: str, there: list[str], proposed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ["runs", *there]:
        (tmp_path / name).mkdir()
    assert beside(path, "latents") == proposed


def test_the_working_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    assert beside(".", "autoencoder") == str(tmp_path / "photos-autoencoder")


@pytest.mark.parametrize(("captions", "words"), [
    (["a red circle"], ["--prompt", "a red circle"]),
    (["", "two\nlines", "\x1b[2J", "x" * 201, "fine"], ["--prompt", "fine"]),
    (["--quiet"], ["--prompt=--quiet"]), (["", " "], ["--prompt", ""]), ([], ["--prompt", ""]),
    (["Anna's “dog”"], ["--prompt", "Anna's “dog”"]),
])  # fmt: skip
def test_a_prompt_that_can_be_pasted(captions: list[str], words: list[str]) -> None:
    assert prompt(captions) == words


def test_a_prompt_of_known_words() -> None:
    """Those after the first caption that the model does not know; the first, where it knows none."""
    captions = ["", "a broken heart", "a red heart", "a blue heart"]
    assert prompt(captions, lambda caption: "broken" not in caption) == ["--prompt", "a red heart"]
    assert prompt(captions, lambda caption: False) == ["--prompt", "a broken heart"]


def test_words_that_a_model_knows(tmp_path: Path) -> None:
    """By its vocabulary; every caption without one, or with labels."""
    assert known_words(tmp_path)("a dog")
    keep_vocabulary('{"classes": ["", "a cat"]}', tmp_path)
    assert known_words(tmp_path)("a dog")
    keep_vocabulary(WordTokenizer.build(["a cat", "classes"], 8, 100).to_json(), tmp_path)
    assert [known_words(tmp_path)(caption) for caption in ("a cat", "a dog")] == [True, False]
    assert known_words(tmp_path)("A cat classes")


def test_only_flags_that_say_something_are_given_again() -> None:
    assert again({"device": "auto", "tile": 0, "cache-dir": None, "channels": 4}) == ["--channels", "4"]


def test_no_secret_of_an_address_is_told(capsys: Said) -> None:
    command = encoding_of("demo", "https://me:word@host/photos?token=abc", {"cache-dir": "my cache"})
    tell_next(command)
    said = capsys.readouterr().err
    assert "--data 'https://HIDDEN@host/photos?HIDDEN' --output photos-latents --cache-dir 'my cache'" in said
    assert said.splitlines()[1].startswith("note: put user, password or query of the address back")
    assert "word" not in said.replace("password", "") and "abc" not in said


def test_scripts_know_the_next_step_themselves(capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SCRIPTED, "1")
    tell_next("a command")
    assert capsys.readouterr().err == ""
    assert f"export TOKENIZERS_PARALLELISM=false {SCRIPTED}=1" in (tiny.SCRIPTS / "environment.sh").read_text()


def test_tars_that_are_indexed_where_they_lie(tmp_path: Path, capsys: Said) -> None:
    """Without a word of their size; latents and what has nothing to train on get no line."""
    tar(tmp_path / "a" / "00.tar", {"0.png": png(0), "0.txt": "noise"})
    make_shards(["index", str(tmp_path / "a")])
    [training] = told(capsys.readouterr().err)
    assert value(training, "--data") == str(tmp_path / "a")
    (tmp_path / "a" / "00.tar").rename(tmp_path / "a" / "val.tar")
    make_shards(["index", str(tmp_path / "a")])
    assert "next: " not in capsys.readouterr().err


def test_a_stream_is_packed_before_it_is_encoded(tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for shard in "01":
        tar(tmp_path / "in" / f"{shard}.tar", {f"{shard}{number:02d}.png": grey(10 * number) for number in range(24)})
    words = ["--data", "in/{0..1}.tar", "--stream", "--resolution", "32", "--output", "runs/ae", "--device", "cpu"]
    assert tiny.call("train_autoencoder", *HURRIED["train_autoencoder"], *words, "--shuffle-buffer", "4") == 0
    packing, encoding = told(capsys.readouterr().err)
    assert packing[4:6] == ["pack", "in/{0..1}.tar"] and value(packing, "--resolution") == "32"
    assert value(packing, "--output") == value(encoding, "--data") == "runs/data"
    paste(packing)
    capsys.readouterr()
    paste(encoding)
    [second] = told(capsys.readouterr().err)
    assert value(second, "--latents") == "runs/latents"


def test_a_preview_is_measured(autoencoder: Path, shapes: Path, tmp_path: Path, capsys: Said) -> None:
    words = ["--config", "tiny", "--model.width", "8", "--teacher", autoencoder, "--data", shapes, *tiny.SHORT]
    assert tiny.call("train_autoencoder", *words, "--output", tmp_path / "run", "--max-steps", "1") == 0
    [measuring] = told(capsys.readouterr().err)
    capsys.readouterr()
    paste(measuring)
    assert "psnr" in capsys.readouterr().out


@pytest.mark.parametrize(("count", "split", "image", "verbs"), [
    (10, "val", "none", ["generate", "evaluate"]), (9, "val", "none", ["generate"]),
    (90, "train", "none", ["generate"]), (10, "val", "low-res", ["evaluate"]), (10, "val", "masked", [])])  # fmt: skip
def test_what_would_be_refused_is_not_proposed(
    count: int, split: str, image: str, verbs: list[str], latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer held-out pictures than are compared, or none, so that training ones stand in for them; drawings of a model
    that is shown a picture. The prompt has words that the model knows."""
    captions = {"captions.side_effect": lambda place: ["a cat" if place else "a dog"]}
    held_out = {"__len__.return_value": count, "shards.split": split, **captions}
    monkeypatch.setattr("training.stages.denoiser_job.noted_pictures", lambda folder: "data")
    job = object.__new__(DenoiserJob)
    job.args = Namespace(latents=latents, device="cpu", text_encoder=None)
    job.config = SimpleNamespace(text=None, image=SimpleNamespace(kind=image))  # type: ignore[assignment]
    job.dataset, job.held_out = Latents(ShardSet(latents)), MagicMock(**held_out)
    keep_vocabulary(WordTokenizer.build(["a cat"], 8, 100).to_json(), tmp_path / "run" / "final")
    commands = [shlex.split(command) for command in job.next_steps(tmp_path / "run")]
    assert [Path(words[1]).stem for words in commands] == verbs
    assert all(value(words, "--prompt") == "a cat" for words in commands if "--prompt" in words)
    assert any("--upscale" in words for words in commands) == (image == "low-res")


PROPOSED = {"low-res": ["upscale", "evaluate"], "masked": ["generate"], "source": ["generate"],
            "hint": ["generate", "evaluate"]}  # fmt: skip


@pytest.mark.parametrize("kind", PROPOSED)
def test_a_model_that_is_shown_pictures_ends_with_one_to_draw_by(
    kind: str, shapes: Path, autoencoder: Path, tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which lies in final/, is that of the caption which is proposed, and goes with the model where it is exported."""
    monkeypatch.chdir(tmp_path)
    data, more = shapes, {"low-res": ["--low-res", "4"], "source": ["--encode-hint"]}.get(kind, [])
    own = ["--image.factor", "4"] if kind == "low-res" else []
    if kind in ("source", "hint"):
        before = ["--hint", "picture", "--hint-files", tmp_path / "before"] if kind == "source" else ["--hint", "edges"]
        after, data = tmp_path / "after", tmp_path / "data"
        for folder in (after, tmp_path / "before"):
            folder.mkdir()
            for number in range(40):
                (folder / f"{number}.png").write_bytes(grey(5 * number + (folder == after)))
        words = ["--output", data, *before, "--missing-caption", "filename", "--resolution", "32"]
        assert tiny.call("make_shards", "pack", after, *words, "--val-fraction", "0.4") == 0
    encode = ["--autoencoder", autoencoder, "--data", data, "--output", tmp_path / "latents", *more]
    assert tiny.call("encode_latents", *encode, "--device", "cpu", "--num-workers", "0") == 0
    train = [*tiny.DENOISER, "--latents", tmp_path / "latents", "--output", "runs/it", "--max-steps", "1"]
    train += ["--batch-size", "8", "--image.kind", kind, *own]
    capsys.readouterr()
    assert tiny.call("train_denoiser", *train) == 0
    commands = told(capsys.readouterr().err)
    assert [verb(words)[0] for words in commands] == PROPOSED[kind]
    held_out = Latents(ShardSet(tmp_path / "latents", "val"))
    assert value(commands[0], "--prompt") == held_out.captions(0)[0]
    files = [word for word in commands[0] if word.endswith(".png")]
    assert files and all(Path(word).is_file() for word in files)
    size = (8, 8) if kind == "low-res" else (32, 32)
    assert {Image.open(word).size for word in files} == {size}
    for words in commands:
        paste(words)
    assert len(list(Path(value(commands[0], "--output")).glob("00000*.png"))) == 1
    assert tiny.call("export_model", "runs/it", "--output", "given") == 0
    assert all((Path("given") / Path(word).name).is_file() for word in files)
    [command] = [line for line in Path("given/README.md").read_text().splitlines() if line.startswith("latent-")]
    script, *rest = shlex.split(command.replace("FOLDER", "given"))
    door = script.removeprefix("latent-diffusion-")
    assert tiny.call(door, *rest, *HURRIED[door], "--device", "cpu") == 0
    for file in files:
        Path(file).unlink()
    assert tiny.call("train_denoiser", *train, "--resume", "auto") == 0  # as of an earlier version, which kept none
    said = capsys.readouterr().err
    assert [verb(words)[0] for words in (told(said) if "next: " in said else [])] == PROPOSED[kind][1:]


@pytest.mark.parametrize(("image", "door"), [("masked", "generate"), ("low-res", "upscale")])
def test_what_is_learned_upon_a_model_that_is_shown_pictures_is_drawn_with_one(
    image: str, door: str, latents: Path, upscaler: Path, tmp_path: Path, capsys: Said
) -> None:
    base, data = upscaler, upscaler.parent / "latents"
    if image == "masked":
        base, data = tmp_path / "base", latents
        words = [*tiny.DENOISER, "--latents", data, "--output", base, "--max-steps", "1", "--image.kind", image]
        assert tiny.call("train_denoiser", *words) == 0
    learn = ["--base", base, "--config", "lora", "--latents", data, "--output", tmp_path / "lora", "--device", "cpu"]
    learn += ["--max-steps", "1", "--batch-size", "8", "--sample.steps", "2"]
    capsys.readouterr()
    assert tiny.call("train_denoiser", *learn) == 0
    [command] = told(capsys.readouterr().err)
    assert verb(command)[0] == door
    paste(command)
    drawn = next(Path(value(command, "--output")).glob("0*.png"))
    assert grids.facts(drawn)["adapters"] == [["lora", 1.0]]


def test_a_finished_run_needs_no_next_step(
    latents: Path, tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No caption for it can be read any more, as where an address is gone: the run ended well all the same."""

    def gone(job: DenoiserJob, run: Path) -> list[str]:
        raise Unreachable("the address does not answer", hint="try again")

    monkeypatch.setattr(DenoiserJob, "next_steps", gone)
    words = ["train_denoiser", "--latents", latents, "--output", tmp_path / "run", *tiny.DENOISER, "--max-steps", 1]
    for said in (f"finished: {tmp_path / 'run' / 'final'}", f"{tmp_path / 'run'}: already complete at step 1"):
        assert tiny.call(*words, "--resume", "auto") == 0
        assert capsys.readouterr().err.splitlines()[-1] == said


def test_a_measured_autoencoder_encodes(autoencoder: Path, shapes: Path, capsys: Said) -> None:
    words = ["--model", autoencoder, "--data", shapes, "--count", "10", "--device", "cpu"]
    assert tiny.call("evaluate", *words) == 0
    [encoding] = told(capsys.readouterr().err)
    assert (value(encoding, "--autoencoder"), value(encoding, "--data")) == (str(autoencoder), str(shapes))
    assert not Path(value(encoding, "--output")).exists() and value(encoding, "--device") == "cpu"
