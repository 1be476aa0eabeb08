"""Drawings of an open model: those of generate, one at a time, each kept apart, with what makes them again."""

from __future__ import annotations

import shlex
from pathlib import Path
from threading import Event, Thread
from time import sleep

import numpy as np
import pytest
import tiny
from PIL import Image

from training.errors import UserError
from training.pictures import grids
from training.studio.edit import Edit
from training.studio.inpaint import hole
from training.studio.model import Stopped, Studio, asked
from training.studio.restore import Restore

CAPTION = "a red circle above a blue square"
FEW = {"--prompt": CAPTION, "--num-images": 2, "--seed": 3, "--steps": 2}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio.opened("demo", tmp_path_factory.mktemp("drawn"), None, "cpu", None)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def drawn(studio: Studio, values: dict[str, object]) -> list[Path]:
    with studio.turn() as turn:
        return turn.draw(asked(values)).pictures


def test_the_command_draws_the_same(studio: Studio, tmp_path: Path) -> None:
    with studio.turn() as turn:
        made = turn.draw(asked({**FEW, "--negative-prompt": "-blue", "--guidance-scale": 2.5, "--size": ""}))
    _, script, *words = shlex.split(made.command)
    assert script == "scripts/generate.py" and words[:2] == ["--model", "demo"] and "--size" not in words
    words[words.index("--output") + 1] = str(tmp_path / "out")
    assert tiny.call("generate", *words, "--device", "cpu") == 0
    for path in made.pictures:
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert made.facts["negative_prompt"] == "-blue" and made.facts["settings"]["guidance"]["scale"] == 2.5
    assert len(made.pictures) == 2 and made.calls == 2
    assert made.told == ["replaced 1: words that the vocabulary has not, read as unknown (-)"]


def test_a_picture_is_drawn_again_by_like(studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = drawn(studio, FEW)[1]
    again = studio.command_again(picture.name, grids.facts(picture))
    assert again.endswith(" scripts/generate.py --model demo --like 00001.png --output again")
    words = ("--model", "demo", "--like", picture, "--output", tmp_path, "--device", "cpu")
    assert tiny.call("generate", *words) == 0
    assert f"the same pixels as {picture}" in capsys.readouterr().err


def test_an_edit_is_drawn_again_with_its_file(studio: Studio, tmp_path: Path) -> None:
    source = studio.taken(drawn(studio, FEW)[0])
    values = {**FEW, "--image": str(source), "--size": "trained", "--strength": 0.5}
    with studio.turn() as turn:
        made = turn.draw(Edit().words(studio, values))
    assert made.given[0].name == source.name and made.given[0].read_bytes() == source.read_bytes()
    assert made.facts["image"]["name"] == source.name and made.facts["image"]["strength"] == 0.5
    again = studio.command_again("x.png", made.facts)
    assert f"--like x.png --image {source.name} --output" in again
    words = ("--model", "demo", "--like", made.pictures[0], "--image", source, "--output", tmp_path)
    assert tiny.call("generate", *words, "--device", "cpu") == 0
    assert (pixels(tmp_path / "00000.png") == pixels(made.pictures[0])).all()


def test_outside_the_hole_every_pixel_stays(studio: Studio, tmp_path: Path) -> None:
    source = drawn(studio, FEW)[0]
    layer = Image.new("RGBA", (512, 512))
    layer.paste((255, 0, 0, 255), (8 * 16, 8 * 16, 20 * 16 + 7, 20 * 16 + 9))
    mask = hole([layer], (32, 32))
    wanted = np.zeros((32, 32), bool)
    wanted[8:21, 8:20] = True  # where at least half of the pixel was brushed
    assert (np.asarray(mask) == 255 * wanted).all()
    mask.save(tmp_path / "mask.png")
    made = pixels(drawn(studio, {**FEW, "--image": source, "--mask": tmp_path / "mask.png"})[0])
    assert (made[~wanted] == pixels(source)[~wanted]).all() and (made[wanted] != pixels(source)[wanted]).any()
    for layers in ([], [Image.new("RGBA", (64, 64))]):
        with pytest.raises(UserError, match="nothing is brushed"):
            hole(layers, (32, 32))


def test_a_measurement_is_taken_first_or_given(studio: Studio, tmp_path: Path) -> None:
    values = {**FEW, "--restore": "box", "--method": "ddnm", "--sigma-y": 0.1, "--size": "trained"}
    source, small = drawn(studio, FEW)[0], tmp_path / "small.png"
    Image.new("RGB", (8, 8), "grey").save(small)
    with studio.turn() as turn:
        first = turn.draw(Restore().words(studio, {**values, "--image": str(source), "given": "image"}))
        second = turn.draw(Restore().words(studio, {**values, "--image": str(small), "given": "measurement"}))
    assert [m.facts["restore"]["sigma_y"] for m in (first, second)] == [0.1, 0.1]
    assert "image_sha256" in first.facts["restore"] and second.facts["restore"]["name"] == "small.png"
    found = pixels(second.pictures[0])
    assert found.shape == (32, 32, 3) and abs(found.mean() - 128) < 32
    with pytest.raises(UserError, match="no picture is given"):
        Restore().words(studio, {**values, "--image": None, "given": "image"})


def test_more_than_a_page_should_ask_for(studio: Studio) -> None:
    for values, said in (
        ({"--num-images": 65}, "--num-images: from 1 to 64"), ({"--num-images": 0}, "--num-images: from 1 to 64"),
        ({"--steps": 1001}, "--steps: from 1 to 1000"), ({"--size": "4096"}, "2 pictures of 4096x4096 pixels"),
        ({"--size": "33"}, "size 33 (height x width) is not divisible"), ({"--guidance-scale": float("nan")}, "finite"),
        ({"--sampler": "eulr"}, "did you mean 'euler'"), ({"--seed": "x"}, "invalid int value"),
    ):
        with pytest.raises(UserError) as problem:
            drawn(studio, {**FEW, **values})
        assert said in problem.value.what
    for strength in (float("nan"), 1.5, -0.5):
        with pytest.raises(UserError, match=r"--strength: must lie in \[0, 1\]"):
            drawn(studio, {**FEW, "--image": drawn(studio, FEW)[0], "--strength": strength})
    made = drawn(studio, FEW)[0].parent
    assert all((folder / "00000.png").is_file() for folder in made.parent.glob("0*"))  # nothing is left of refusals


def test_words_the_model_does_not_know_are_told(studio: Studio) -> None:
    with studio.turn() as turn:
        made = turn.draw(asked({**FEW, "--prompt": "a red zebra"}))
    assert made.told == ["replaced 1: words that the vocabulary has not, read as unknown (zebra)"]


def test_one_drawing_at_a_time_and_a_stop_ends_those_of_its_page(studio: Studio) -> None:
    began, go_on, ends = Event(), Event(), dict[str, object]()

    def progress(share: float, words: str) -> None:
        began.set()
        go_on.wait(20)

    def one(who: str) -> None:
        try:
            with studio.turn(who, progress) as turn:
                ends[f"{who} {len(ends)}"] = turn.draw(asked(FEW))
        except Stopped as stopped:
            ends[f"{who} {len(ends)}"] = stopped.what

    threads = [Thread(target=one, args=[who]) for who in ("a", "a", "b")]
    threads[0].start()
    assert began.wait(20)
    for thread in threads[1:]:
        thread.start()
    while len(studio._turns) < 3:
        sleep(0.01)
    assert ends == {} and studio.stop("a") and not studio.stop("nobody")
    go_on.set()
    for thread in threads:
        thread.join(30)
    said = sorted((name[0], value if isinstance(value, str) else "drawn") for name, value in ends.items())
    assert said == [("a", "stopped before it began"), ("a", "stopped; nothing of it was kept"), ("b", "drawn")]
    assert studio._turns == [] and not studio.stop("a")


def test_closing_ends_what_is_drawn(studio: Studio) -> None:
    began, ends = Event(), list[str]()

    def long() -> None:
        with pytest.raises(Stopped) as stopped, studio.turn("a", lambda share, words: began.set()) as turn:
            turn.draw(asked({**FEW, "--steps": 1000}))
        ends.append(stopped.value.what)

    thread = Thread(target=long)
    thread.start()
    assert began.wait(20)
    studio.close()
    thread.join(20)
    assert ends == ["stopped; nothing of it was kept"]


def test_copies_stay_where_that_is_asked(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "kept" / "0001").mkdir(parents=True)  # of an earlier studio
    keeping = Studio("demo", studio.pipeline, tmp_path / "drawn", tmp_path / "kept", "cpu")
    picture = drawn(keeping, FEW)[0]
    kept = tmp_path / "kept" / "0002" / "00000.png"
    assert picture.parent.name == "0002" and kept.read_bytes() == picture.read_bytes()
    with keeping.turn() as turn:
        made = turn.draw(asked({**FEW, "--image": picture}))
    assert f"--image {tmp_path}/kept/0003/given/00000.png" in made.command


def test_examples_are_captions_whose_words_it_knows(studio: Studio) -> None:
    examples = studio.examples()
    assert len(set(examples)) == 6 and all(not r.unknown for r in studio.pipeline.text.readings(examples))
    assert {"circle", "red", "background"} <= set(studio.words()) and "," not in studio.words()


def test_words_of_a_command() -> None:
    values = {"--prompt": "", "--size": "", "--mask": None, "--feather": 0, "--invert-mask": False, "--strength": 0.1,
              "--negative-prompt": "--x", "--image": Path("a b.png"), "--seed": -1}
    assert asked(values) == ["--prompt", "", "--feather", "0", "--strength", "0.1", "--negative-prompt=--x",
                             "--image", Path("a b.png"), "--seed=-1"]
