"""The models that come with the package: what they are made of, how they are named, and that they do as they are told.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from autoencoder.base import size_in_words
from autoencoder.fidelity import psnr
from autoencoder.images import to_uint8, to_unit
from ldm.diffusion_classifier import DiffusionClassifier
from ldm.guidance import ClassifierFree
from ldm.image_tasks import encoded, image_to_image, inpainting, inverted, restoration
from ldm.inverse.measurement import DDNM
from ldm.inverse.operators import Box, measure
from ldm.noise import Noise
from ldm.samplers import DDIM
from ldm.tasks import Task, Tasks
from training import load_autoencoder, load_pipeline
from training.commands import EMBEDDED
from training.models.assembly import HashedPipeline
from training.models.cards import TEACHER
from training.models.folders import find
from training.models.lineage import stored_ingredients
from training.pictures import grids
from training.settings.embedded import located
from training.shapes.checker import check
from training.shapes.rendering import render
from training.shapes.scenes import Scene, scene
from training.shapes.wording import captions, held_out_prompts
from training.tensors import content_hash, load_tensors

LARGEST = 12_000_000  # bytes that a package may be the larger for each of them
BEFORE = {"denoiser": "ed7123f2482d0b4792ccb13e61e4dbb945017215b7e9a6e9e972205621049f88",
          "text_encoder": "924edfa53d6abea7c74b2f0eb23c005e52ee8341cfcd8d6deb647810f1a00614"}  # fmt: skip
RELATION = "a red circle above a blue square"


@pytest.fixture(scope="module")
def demo() -> HashedPipeline:
    return load_pipeline("demo", "cpu")


def drawn(pipe: HashedPipeline, texts: Sequence[str], task: Tasks | None = None, **plan: object) -> Tensor:
    sampling = replace(pipe.sampling, **{"steps": 12} | plan)  # type: ignore[arg-type]
    return torch.cat(list(pipe.pixels(list(texts), 0, sampling=sampling, task=task)))


def obeyed(pixels: Tensor, texts: Sequence[str]) -> int:
    """How many of the pictures show what their captions say."""
    return sum(check(np.asarray(x.permute(1, 2, 0)), text)["obeyed"] for x, text in zip(pixels, texts, strict=True))


def scenes(count: int) -> list[Scene]:
    """Of one object each, which are drawn with other keys than those that are packed for training."""
    return [scene(1_000_000 + number, objects=1) for number in range(count)]


def pictures(of: Sequence[Scene]) -> Tensor:
    """uint8 (B, 3, 32, 32)."""
    return torch.stack([torch.from_numpy(render(one)).permute(2, 0, 1) for one in of])


def said(of: Sequence[Scene]) -> list[str]:
    return [captions(one)[0] for one in of]


def renamed(one: Scene) -> Scene:
    """Another shape in another colour at the same place, and as large."""
    shape, colour = ("square", "blue") if one.objects[0].shape != "square" else ("circle", "orange")
    return replace(one, objects=(replace(one.objects[0], shape=shape, colour=colour),))


def reconstructed(pipe: HashedPipeline, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return to_uint8(pipe.decode(encoded(pipe, to_unit(pixels))))


@pytest.mark.parametrize("name", EMBEDDED)
def test_it_is_small_rounded_and_complete(name: str) -> None:
    """Stored as bfloat16, loaded as the same numbers in float32, of which the hashes are."""
    home, demo = located(name), load_pipeline(name, "cpu")
    assert sum(path.stat().st_size for path in home.rglob("*") if path.is_file()) <= LARGEST
    parts = {"denoiser": (demo.denoiser.backbone, "."), "autoencoder": (demo.autoencoder, "autoencoder"),
             "text_encoder": (demo.text, "text_encoder")}  # fmt: skip
    for name, (network, folder) in parts.items():
        stored, state = load_tensors(home / folder / "model.safetensors"), network.state_dict()  # type: ignore[attr-defined]
        assert {x.dtype for x in stored.values()} == {torch.bfloat16}
        assert {x.dtype for x in state.values()} == {torch.float32}
        assert stored.keys() == state.keys() and all(torch.equal(state[key], x.float()) for key, x in stored.items())
        assert stored_ingredients(home)[name] == demo.hashes[name] == content_hash(state)
    assert stored_ingredients(home) == demo.hashes and demo.hashes.keys() == parts.keys() | {"vocabulary"}
    for card in (home / "README.md", home / "autoencoder" / "README.md"):
        assert "| weights | bfloat16 |" in card.read_text()


def test_its_name_is_no_folder(
    demo: HashedPipeline,
    denoiser: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A folder of that name is ./demo, or a Path; where an autoencoder is asked for, the name is that of its own."""
    (tmp_path / "demo").symlink_to(denoiser)
    monkeypatch.chdir(tmp_path)
    assert find("demo").home == located("demo") and find("./demo").home == find(Path("demo")).home == Path("demo/final")
    assert content_hash(load_autoencoder("demo").state_dict()) == demo.hashes["autoencoder"]
    draw = ("--prompt", "a", "--steps", 1, "--device", "cpu", "--output")
    for model, output in (("demo", "named"), ("./demo", "folder")):
        assert tiny.call("generate", "--model", model, *draw, tmp_path / output) == 0
        note = "demo is the model that comes with the package; what is in this folder is ./demo"
        assert (note in capsys.readouterr().err) == (model == "demo")
    hashes = [grids.facts(tmp_path / output / "00000.png")["hashes"] for output in ("named", "folder")]
    assert hashes[0] == demo.hashes and hashes[1] == stored_ingredients(denoiser / "final")
    monkeypatch.chdir(tmp_path / "named")
    assert "./demo: no such run" in tiny.refused("generate", "--model", "./demo", *draw, tmp_path / "no").what


def test_the_student_draws_in_one_call_of_the_network(demo: HashedPipeline) -> None:
    """It was taught by the `demo` before this one, and stands on the same autoencoder and words."""
    student, prompts = load_pipeline("demo-student", "cpu"), held_out_prompts(20, 1)
    record = json.loads((located("demo-student") / TEACHER).read_text())
    assert record["name"] == "demo" and record["hashes"] == BEFORE
    assert student.hashes["text_encoder"] == BEFORE["text_encoder"]
    assert all(student.hashes[name] == demo.hashes[name] for name in ("autoencoder", "vocabulary"))
    calls = list[int]()
    student.denoiser.backbone.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    pixels = torch.cat(list(student.pixels(prompts, 0)))
    assert len(calls) == 1 and obeyed(pixels, prompts) >= 17


def test_one_command_draws_what_it_is_told_and_the_same_again(tmp_path: Path) -> None:
    words = ("generate", "--model", "demo", "--prompt", RELATION, "--device", "cpu", "--output")
    assert tiny.call(*words, tmp_path / "one") == 0 and tiny.call(*words, tmp_path / "two") == 0
    assert (tmp_path / "one/00000.png").read_bytes() == (tmp_path / "two/00000.png").read_bytes()
    assert check(np.asarray(Image.open(tmp_path / "one/00000.png")), RELATION)["obeyed"]


def test_python_draws_what_the_command_draws_in_the_same_words(demo: HashedPipeline, tmp_path: Path) -> None:
    """The k-th picture of each prompt has the seed and k, from Python as by `generate`."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    flags = ("--prompts", tmp_path / "prompts.txt", "--num-images", 2, "--seed", 7, "--negative-prompt", "a green star")
    how = ("--steps", 3, "--guidance-scale", 5, "--size", "32x48", "--device", "cpu", "--output", tmp_path / "out")
    assert tiny.call("generate", "--model", "demo", *flags, *how) == 0
    drawn = demo(["a red circle", "a blue square"], seed=7, num_images_per_prompt=2, negative_prompt="a green star",
                 num_inference_steps=3, guidance_scale=5, height=32, width=48)  # fmt: skip
    files = [Image.open(tmp_path / "out" / f"{number:05d}.png") for number in range(4)]
    assert [picture.size for picture in drawn] == [(48, 32)] * 4
    assert [picture.tobytes() for picture in drawn] == [picture.tobytes() for picture in files]


def test_it_tells_itself_in_a_few_lines(demo: HashedPipeline) -> None:
    told = repr(demo).splitlines()
    assert told == [
        "HashedPipeline(",
        "  denoiser CrossAttentionUNet: 4.6 M parameters, predicts velocity on the schedule flow,",
        "  autoencoder KLAutoencoder: 681.9 k parameters, 3 channels to 4 channels at 1/4 of the size,",
        "  text encoder ScratchTextEncoder: 424.2 k parameters,",
        "  pictures of 32 pixels (height x width) from latents of 4x8x8,",
        "  20 steps of dpmpp-2m on the grid uniform, guidance classifier-free, scale 3",
        ")",
    ]
    assert repr(demo.denoiser) == told[1].strip(" ,") and "\n" not in repr(demo.autoencoder)
    count = sum(p.numel() for p in demo.autoencoder.parameters())
    assert size_in_words(demo.autoencoder) == f"{count / 1000:.1f} k parameters" and 680_000 < count < 684_000
    assert size_in_words(torch.nn.Linear(9, 11)) == "110 parameters" and size_in_words(None) == "0 parameters"


def test_it_draws_pairs_of_shape_and_colour_that_it_never_saw(demo: HashedPipeline) -> None:
    prompts = held_out_prompts(20, 1)
    assert obeyed(drawn(demo, prompts), prompts) >= 18


def test_a_hole_is_filled_with_what_the_caption_names(demo: HashedPipeline) -> None:
    before = scenes(6)
    after, source = [renamed(one) for one in before], pictures(before)
    shown = (source != source[:, :, :1, :1]).any(1, keepdim=True)
    hole = shown.any(2, keepdim=True) & shown.any(3, keepdim=True)  # its bounding box, and two pixels around it
    hole = torch.nn.functional.max_pool2d(hole.float(), 5, stride=1, padding=2) > 0
    made = drawn(demo, said(after), inpainting(demo, source, hole))
    assert torch.equal(made.where(~hole, 0), source.where(~hole, 0))
    assert obeyed(made, said(after)) >= 5


def test_a_picture_is_restored_from_its_quarter(demo: HashedPipeline) -> None:
    """Nearer to the truth than what interpolates the measurement, which it agrees with as far as noise lets it."""
    truth, sigma, box = scenes(3), 0.05, Box(factor=4)
    source = to_unit(pictures(truth))
    y = measure(box, source, sigma, Noise.from_seeds(range(3)))
    made = drawn(demo, said(truth), restoration(demo, box, y, sigma, DDNM()))
    residual = (box(to_unit(made)) - y).square().mean().sqrt().item()
    wide = torch.nn.functional.interpolate(y, scale_factor=4, mode="bicubic", align_corners=False).clamp(-1, 1)
    ours, plain = (psnr(x, source).mean().item() for x in (to_unit(made), wide))
    assert residual < 2 * sigma and ours > plain + 2 and ours > 25
    assert obeyed(made, said(truth)) == 3


def test_the_stronger_the_edit_the_less_stays(demo: HashedPipeline) -> None:
    """From the reconstruction to a drawing of the caption alone."""
    before = scenes(4)
    texts, source = said([renamed(one) for one in before]), pictures(before)
    made = [drawn(demo, texts, image_to_image(demo, source, strength=strength)) for strength in (0, 0.4, 0.7, 1)]
    assert torch.equal(made[0], reconstructed(demo, source)) and torch.equal(made[-1], drawn(demo, texts))
    far = [(x.float() - source.float()).abs().mean().item() for x in made]
    assert far == sorted(far) and len(set(far)) == 4
    assert obeyed(made[0], texts) == 0 and obeyed(made[-1], texts) >= 3


def test_it_names_what_a_picture_shows(demo: HashedPipeline) -> None:
    """The caption at which it errs least, of scenes that differ in shape and colour alone."""
    first = scenes(1)[0]
    pairs = [("square", "blue"), ("circle", "red"), ("triangle", "orange"), ("cross", "cyan"), ("circle", "pink")]
    shown = [replace(first, objects=(replace(first.objects[0], shape=s, colour=c),)) for s, c in pairs]
    with torch.no_grad():
        latents, cond = encoded(demo, to_unit(pictures(shown))), demo.text(said(shown))
    classify = DiffusionClassifier(denoiser=demo.denoiser, diffusion=demo.denoiser.diffusion, draws=8)
    errors = classify(lambda noise: latents, Noise.from_seeds(range(5)), cond)
    assert (errors.argmin(2) == torch.arange(5)).all()


def test_inverted_noise_draws_the_picture_again(demo: HashedPipeline) -> None:
    """Under its caption and without guidance; nearer with fixed-point iterations. With guidance it leads elsewhere."""
    shown = scenes(3)
    source, texts = pictures(shown), said(shown)
    once = reconstructed(demo, source)

    def back(iterations: int, scale: float) -> float:
        plan = {"sampler": DDIM(), "guidance": ClassifierFree(scale=scale), "steps": 16}
        sampling = replace(demo.sampling, **plan)  # type: ignore[arg-type]
        start = inverted(demo, to_unit(source), texts, sampling, iterations)
        made = drawn(demo, texts, lambda part: Task(start=start), **plan)
        return psnr(to_unit(made), to_unit(once)).mean().item()

    one, three, guided = back(1, 1.0), back(3, 1.0), back(1, 4.0)
    assert three > one > guided and three > 30
