"""Few-step models given out: as graphs with what they are told and their own steps; what diffusers cannot hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import portable
import pytest
import tiny
import torch
from portable import CLIP, EPS

from ldm.diffusion import Denoised, Diffusion
from ldm.guidance import ClassifierFree, Embedded
from ldm.jumps import Aim, Jumping, plainly
from ldm.noise import Noise
from ldm.samplers import ConsistencySampler, JumpSampler
from ldm.students import Student
from training.errors import UserError
from training.exchange import graphs
from training.exchange.export_limits import Facts, obstacles
from training.models.assembly import HashedPipeline, load_pipeline
from training.settings import decoding

NUMBERS = ("span", "guidance_scale")


def student(taught: Path, aim: Aim, sampler: Any, numbers: tuple[str, ...] = NUMBERS) -> HashedPipeline:
    """A pipeline whose network reads numbers, with weights that hear them."""
    pipeline = load_pipeline(taught / "baked", "cpu")
    torch.manual_seed(0)
    theirs: Any = pipeline.denoiser.backbone
    widths = {"context_dim": pipeline.text.context_dim, "pooled_dim": pipeline.text.pooled_dim}
    backbone = theirs.config.build(channels=theirs.channels, **widths, numbers=numbers)
    for parameter in backbone.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    denoiser = Jumping(backbone.eval(), pipeline.denoiser.diffusion, plainly, "span" in numbers, aim)
    told = "guidance_scale" in numbers
    guidance: Any = Embedded(scale=2) if told else ClassifierFree(scale=1.0)
    plan = dataclasses.replace(pipeline.sampling, sampler=sampler, steps=3, guidance=guidance)
    scales = (1.0, 8.0) if told else 2.0
    return dataclasses.replace(pipeline, denoiser=denoiser, sampling=plan, student=Student(guidance_scale=scales))


CASES: dict[str, tuple[Aim, Any, tuple[str, ...]]] = {
    "told both": ("any", JumpSampler(), NUMBERS), "told how far": ("any", JumpSampler(), ("span",)),
    "told how far to the end": ("any", ConsistencySampler(), ("span",)),
    "told a scale": ("next", JumpSampler(), ("guidance_scale",)), "to the end": ("clean", ConsistencySampler(), ()),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_graph_draws_as_the_student_by_what_stands_beside_it(
    case: str, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aim, sampler, numbers = CASES[case]
    pipeline, out = student(taught, aim, sampler, numbers), tmp_path / "out"
    graphs.write_graphs(out, pipeline, ["pt2"])
    card, told = (out / "README.md").read_text(), json.loads((out / "steps.json").read_text())
    network, decoder = (torch.export.load(out / f"{name}.pt2").module() for name in ("denoiser", "decoder"))
    assert all(f"{name} (B) float32" in card for name in numbers) and "Classifier-free guidance of scale s" not in card
    assert f"It is a few-step model, {pipeline.student.words}: these are its steps; give no other" in card
    captions, noise = ["a red circle", ""], Noise.from_seeds([3, 4])
    shape, cond = pipeline.latent_shape(pipeline.size), pipeline.text(captions)
    text = {"context": cond.context, "mask": cond.mask, "pooled": cond.pooled}
    steps = iter(range(3))
    monkeypatch.setattr(torch, "randn", lambda count, *sides: noise.normal(sides, "prior"))
    monkeypatch.setattr(torch, "randn_like",
                        lambda x: noise.fold("step", next(steps)).normal(x.shape[1:], "consistency"))  # fmt: skip
    scope = {"denoiser": network, "decoder": decoder, "numbers": told, "text": text, "B": 2, "torch": torch}
    with torch.no_grad():
        exec(card.split("```python\n")[1].split("```")[0], scope)
        monkeypatch.undo()
        wanted = pipeline.latents(pipeline.guided(captions), noise, shape, pipeline.sampling)
    assert len(told["steps"]) == 3 and ("span" in told["steps"][0]) == ("span" in numbers)
    torch.testing.assert_close(scope["x"], wanted, rtol=0, atol=1e-4 * float(wanted.std()))


def test_a_run_is_written(taught: Path, tmp_path: Path) -> None:
    words = ("export", taught / "told", "--output", tmp_path / "out", "--pt2")
    assert tiny.call("convert_denoiser", *words) == 0
    assert "guidance_scale=torch.full((len(x),), 2.0))" in (tmp_path / "out" / "README.md").read_text()


def test_answers_that_are_read_otherwise_are_no_graph(taught: Path, tmp_path: Path) -> None:
    def halved(diffusion: Diffusion, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor) -> Denoised:
        return plainly(diffusion, x, y / 2, t)

    pipeline = student(taught, "clean", ConsistencySampler(), numbers=())
    other = dataclasses.replace(pipeline, denoiser=dataclasses.replace(pipeline.denoiser, reading=halved))
    with pytest.raises(UserError, match="answers no prediction of its process"):
        graphs.write_graphs(tmp_path / "out", other, ["pt2"])
    assert not (tmp_path / "out").exists()


def test_noise_of_the_sampler_is_told_to_be_missing(taught: Path) -> None:
    pipeline = student(taught, "any", JumpSampler(noise=0.5), numbers=("span",))
    inputs = graphs.graphs(pipeline)["denoiser"].inputs
    assert "these are its steps, but for the noise of its sampler" in graphs._of_student(pipeline, inputs)[2]


def test_what_diffusers_cannot_hold_of_a_student(tmp_path: Path) -> None:
    taught = {"objective": {"kind": "progressive", "from_steps": 4, "steps": 4}, "sampler": {"kind": "jump"},
              "sample": {"steps": 4}, "grid": {"kind": "uniform"}}  # fmt: skip
    values: dict[str, Any] = {"backbone": portable.UNET, "text": CLIP, **EPS, "format": {"version": 3}}
    model: Any = decoding.decode_stored("autoencoder", {"model": portable.KL}).model  # type: ignore[union-attr]

    def found(**sections: Any) -> list[str]:
        config: Any = decoding.decode_stored("denoiser", values | sections)
        return [obstacle.key for obstacle in obstacles(config, Facts(model))]

    assert found() == []
    assert found(**taught, student={"steps": [4], "guidance_scale": [3.0]}) == ["objective.kind"]
    told = {"student": {"steps": [4], "guidance_scale": [1.0, 8.0]}, "guidance": {"kind": "embedded"}}
    assert found(**taught, **told) == ["objective.kind", "student.guidance_scale"]
