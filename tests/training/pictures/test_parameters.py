"""The text chunk `parameters` as another program reads it: by the public rules, with a reader of our own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image

from ldm.samplers import SAMPLERS
from training.pictures import grids
from training.pictures.parameters import SAMPLERS as NAMES
from training.pictures.parameters import parameters, quoted

PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def read(text: str) -> dict[str, Any]:
    """Prompt, negative prompt and pairs: the last line is pairs, a line before it that says so begins the negative
    prompt, and values within quotes are JSON."""
    *lines, last = text.strip().split("\n")
    found: dict[str, Any] = {name: json.loads(v) if v[:1] == '"' else v for name, v in PAIR.findall(last)}
    starts = [number for number, line in enumerate(lines) if line.startswith("Negative prompt:")]
    split = starts[0] if starts else len(lines)
    found["prompt"] = "\n".join(lines[:split])
    found["negative"] = "\n".join(lines[split:]).removeprefix("Negative prompt:").strip()
    return found


def facts(**changes: Any) -> dict[str, Any]:
    """Of a drawing by dpmpp-2m."""
    settings = {
        "sampler": {"kind": "dpmpp-2m"}, "grid": {"kind": "karras"}, "sample": {"steps": 20, "size": [32, 48]},
        "guidance": {"kind": "classifier-free", "scale": 3.5},
    }  # fmt: skip
    own = {"prompt": "a red circle", "negative_prompt": "", "seed": 7, "size": [32, 48], "settings": settings}
    return {**own, "hashes": {"denoiser": "0123456789abcdef"}, "model": "shapes", **changes}


def test_every_pair_in_its_order() -> None:
    first, last = parameters(facts()).split("\n")
    assert first == "a red circle"
    assert last.startswith(
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 3.5, Seed: 7, Size: 48x32, "
        "Model hash: 0123456789, Model: shapes, Version: latent-diffusion-from-scratch"
    )


PROMPTS = ["one, two: three", "first line\nsecond: line, Steps: 3", "", "ein Häuschen", "赤い円"]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("negative", ["", "grey, blurred", "one\ntwo"])
def test_prompts_are_read_back(prompt: str, negative: str, tmp_path: Path) -> None:
    """Of a file, whatever letters; Latin ones as tEXt, which every program reads, all others as iTXt."""
    said = facts(prompt=prompt, negative_prompt=negative, model='my "best", so far: 2\\3')
    grids.save(Image.new("RGB", (4, 4)), tmp_path / "a.png", said)
    text = Image.open(tmp_path / "a.png").text["parameters"]  # type: ignore[attr-defined]
    found = read(text)
    assert (found["prompt"], found["negative"]) == (prompt, negative)
    assert found["Model"] == said["model"] and found["Steps"] == "20" and found["Seed"] == "7"
    chunk = b"iTXtparameters" if "赤" in prompt else b"tEXtparameters"
    assert chunk in (tmp_path / "a.png").read_bytes()
    assert grids.facts(tmp_path / "a.png").items() >= said.items() and grids.changed(tmp_path / "a.png") is False


def test_values_are_quoted_only_where_they_must_be() -> None:
    assert [quoted(v) for v in ("a b", 3.5, "a,b", "a:b", 'a"b', "a\nb")] == [
        "a b", "3.5", '"a,b"', '"a:b"', '"a\\"b"', '"a\\nb"',
    ]  # fmt: skip


def test_what_does_not_apply_is_left_out() -> None:
    guided = {**facts()["settings"], "guidance": {"kind": "autoguidance", "scale": 2.0}}
    found = read(parameters(facts(settings=guided, model=None, prompt="a\0b\x1b[0m")))
    assert found.keys() == {"Steps", "Sampler", "Schedule type", "Seed", "Size", "Model hash", "Version",
                            "prompt", "negative"}  # fmt: skip
    assert found["prompt"] == "a b [0m"
    noised = read(parameters(facts(image={"strength": 0.6}, also=[["a blue, small square", -0.5]])))
    assert noised["Denoising strength"] == "0.6" and noised["Also"] == "-0.5 a blue, small square"


def test_pictures_of_generate_carry_them(
    denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The name of the model without its path; the strength of an edit; `--like` takes the same weights by any name."""
    draw = ("generate", "--model", denoiser / "final", "--device", "cpu", "--steps", 2, "--output")
    prompt = ("--prompt", "a red: circle", "--negative-prompt", "blue", "--guidance-scale", 2, "--seed", 3)
    assert tiny.call(*draw, tmp_path / "one", *prompt) == 0
    first = tmp_path / "one" / "00000.png"
    text = Image.open(first).text["parameters"]  # type: ignore[attr-defined]
    found = read(text)
    assert (found["prompt"], found["negative"], found["Seed"]) == ("a red: circle", "blue", "3")
    assert (found["Model"], found["CFG scale"], found["Size"]) == (denoiser.name, "2.0", "32x32")
    assert found["Model hash"] == grids.facts(first)["hashes"]["denoiser"][:10]
    assert str(denoiser.parent) not in text and "Denoising strength" not in found
    words = ("--image", first, "--strength", 0.5, "--prompt", "")
    assert tiny.call(*draw, tmp_path / "two", *words) == 0
    edited = read(Image.open(tmp_path / "two" / "00000.png").text["parameters"])  # type: ignore[attr-defined]
    assert edited["Denoising strength"] == "0.5" and edited["prompt"] == ""
    shutil.copytree(denoiser / "final", tmp_path / "renamed")
    again = ("generate", "--model", tmp_path / "renamed", "--device", "cpu", "--like", first)
    assert tiny.call(*again, "--output", tmp_path / "three") == 0
    assert f"the same pixels as {first}" in capsys.readouterr().err
    third = read(Image.open(tmp_path / "three" / "00000.png").text["parameters"])  # type: ignore[attr-defined]
    assert third == {**found, "Model": "renamed"}


def test_a_few_step_model_is_told_by_the_name_of_its_sampler() -> None:
    told = facts()
    told["settings"] |= {"sampler": {"kind": "consistency"}, "sample": {"steps": 4},
                         "guidance": {"kind": "embedded", "scale": 3.0}}  # fmt: skip
    assert "Steps: 4, Sampler: LCM, Schedule type: Karras, CFG scale: 3.0" in parameters(told)
    known = {cls().kind for cls in SAMPLERS}
    assert set(NAMES) <= known
