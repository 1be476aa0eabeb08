"""What the page shows: comparisons, facts of any file, messages in its own names; all text escaped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from training.errors import UserError
from training.pictures import grids
from training.studio import shown
from training.studio.compare import compare, numbers
from training.studio.facts import read
from training.studio.inpaint import canvas
from training.studio.model import Studio, asked

FEW = {"--prompt": "a red <b>circle</b>", "--num-images": 2, "--seed": 3, "--steps": 2}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio.opened("demo", tmp_path_factory.mktemp("drawn"), None, "cpu", None)


def test_every_sampler_meets_every_scale(studio: Studio) -> None:
    values = {**FEW, "scales": "1, 3,3", "samplers": ["euler", "heun", "eulr"]}
    with studio.turn() as turn:
        table, files = compare(turn, values)
    assert re.findall(r'<th scope="(\w+)">([^<]+)', table) == [
        ("col", "guidance 1"), ("col", "guidance 3"), ("row", "euler"), ("row", "heun"), ("row", "eulr")]
    assert re.findall(r"<br>(\d+) calls, [\d.]+ s</td>", table) == ["2", "2", "3", "3"]
    assert table.startswith("<p>4 drawings, 10 network calls, ") and table.count("did you mean") == 2
    names = [f"{name}-{scale}-0000{k}.png" for name in ("euler", "heun") for scale in (1, 3) for k in (0, 1)]
    assert [Path(file).name for file in files] == ["comparison.png", *names]
    facts = [grids.facts(Path(file)) for file in files[1:]]
    assert [(f["seed"], f["settings"]["guidance"]["scale"]) for f in facts] == 2 * [(3, 1), (4, 1), (3, 3), (4, 3)]
    assert [f["settings"]["sampler"]["kind"] for f in facts] == 4 * ["euler"] + 4 * ["heun"]
    assert "replaced" in table and "&lt;" in table and "<b>circle" not in table


def test_what_cannot_be_compared(studio: Studio) -> None:
    assert numbers(" 1,3.0, -2,") == ["1", "3.0", "-2"]
    for scales, samplers, said in (
        ("1, x", ["euler"], "x is no finite number"), ("nan", ["euler"], "nan is no finite number"),
        ("", ["euler"], "nothing to compare"), ("1", [], "nothing to compare"), ("1", ["eulr"], "did you mean 'euler'"),
        (",".join(map(str, range(37))), ["euler"], "37 drawings are more than 36"),
    ):
        with pytest.raises(UserError) as problem, studio.turn() as turn:
            compare(turn, {**FEW, "scales": scales, "samplers": samplers})
        assert said in problem.value.what


def test_a_picture_tells_its_facts(studio: Studio, tmp_path: Path) -> None:
    with studio.turn() as turn:
        made = turn.draw(asked(FEW))
    text, command = read(studio, str(made.pictures[0]))
    assert "<p>It is as it was made, facts and pixels.</p><p>The open model made it.</p>" in text
    assert "<td>a red &lt;b&gt;circle&lt;/b&gt;</td>" in text and "<b>circle" not in text
    assert command.endswith("scripts/generate.py --model demo --like 00000.png --output again")
    assert shown.caption_of(str(made.pictures[0])) == FEW["--prompt"]
    facts = made.facts
    grids.save(Image.open(made.pictures[0]), tmp_path / "a.png", facts | {"hashes": {"denoiser": "0" * 64}})
    assert f"Another model made it: its denoiser is {'0' * 12}" in read(studio, str(tmp_path / "a.png"))[0]
    changed = PngInfo()
    changed.add_itxt(grids.KEY, grids.json.dumps(facts))
    Image.new("RGB", (32, 32)).save(tmp_path / "b.png", pnginfo=changed)
    assert "It or its facts were changed" in read(studio, str(tmp_path / "b.png"))[0]


def test_other_files_say_nothing(studio: Studio, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "bare.png")
    damaged = PngInfo()
    damaged.add_itxt(grids.KEY, '{"prompt": "<script>", "seed"')
    Image.new("RGB", (4, 4)).save(tmp_path / "damaged.png", pnginfo=damaged)
    (tmp_path / "<i>.txt").write_text("text")
    for name, said in (("bare.png", "bare.png does not say how it was made."),
                       ("damaged.png", "damaged.png: not a PNG that can be read."),
                       ("<i>.txt", "&lt;i&gt;.txt: not a PNG that can be read.")):
        text, command = read(studio, str(tmp_path / name))
        assert said in text and str(tmp_path) not in text and "<script>" not in text and command == ""
    assert read(studio, None) == ("", "") and shown.caption_of(str(tmp_path / "bare.png")) == ""


def test_small_pictures_are_enlarged_evenly(tmp_path: Path) -> None:
    for size, wanted in (((32, 32), (512, 512)), ((30, 20), (510, 340)), ((1024, 512), (512, 256))):
        image = Image.new("RGB", size, "red")
        assert shown.enlarged(image).size == wanted
        image.save(tmp_path / "a.png")
        painted = canvas(str(tmp_path / "a.png"))
        assert painted["background"].size == wanted and painted["layers"] == []
        assert shown.size_of(tmp_path / "a.png") == size[::-1]
    assert canvas(None) is None and canvas(__file__) is None
    with pytest.raises(UserError, match="not an image"):
        shown.preview(Path(__file__))
