"""Pipelines of diffusers' taken in: pictures from the same noise are theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import donors
import peers
import pytest
import torch
from donors import PROMPTS, STEPS, convert, diffusers, noise, ours, theirs
from torch import Tensor

from training.models.assembly import HashedPipeline, load_pipeline


def both(pipeline: Any, home: Path, *words: object) -> tuple[HashedPipeline, tuple[Tensor, Tensor]]:
    """The run that a saved pipeline becomes, and what the pipeline draws from its noise."""
    pipeline.save_pretrained(home / "theirs")
    run = load_pipeline(convert(home / "theirs", home / "ours", *words), "cpu")
    return run, theirs(pipeline, noise(run))


COMMON = donors.TABLE | {"clip_sample": False}
DDIM: dict[str, dict[str, Any]] = {
    "leading": {"steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "v": {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "x0 on cosine": {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
}


@pytest.mark.parametrize("case", DDIM)
def test_stable_diffusion_draws_what_it_drew(case: str, tmp_path: Path) -> None:
    """Latents and pictures to 1e-3, with guidance: captions are padded to 77 tokens that are all attended to."""
    run, (latents, pictures) = both(
        donors.stable_diffusion(diffusers.DDIMScheduler(**COMMON | DDIM[case])), tmp_path
    )
    got, drawn = ours(run)
    assert latents.std() > 0.1 and (latents[0] - latents[1]).std() > 0.1
    torch.testing.assert_close(got / latents.std(), latents / latents.std(), atol=1e-3, rtol=0)
    torch.testing.assert_close(drawn, pictures, atol=1e-3, rtol=0)
    assert run.size == (16, 16) and run.sampling.steps == 50 and run.sampling.guidance.scale == 7.5
    assert run.text.config.length == 77 and not run.text.config.masked


def test_padding_as_diffusers_takes_it(tmp_path: Path) -> None:
    """A text encoder that asks for its mask gets it, and the U-Net does not."""
    run, (latents, _) = both(donors.stable_diffusion(encoder=donors.clip(use_attention_mask=True)), tmp_path)
    assert run.text.config.mask_rule == 1
    torch.testing.assert_close(ours(run)[0], latents, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["PixArtSigmaPipeline", "PixArtAlphaPipeline"])
def test_pixart_draws_what_it_drew(kind: str, tmp_path: Path) -> None:
    """A learned variance is left out of DDIM, capitals and padding out of captions."""
    pipeline = donors.pixart(kind=kind)
    run, (latents, pictures) = both(pipeline, tmp_path)
    got, drawn = ours(run, prompts=[prompt.upper() for prompt in PROMPTS])
    assert latents.std() > 0.1 and (latents[0] - latents[1]).std() > 0.1
    torch.testing.assert_close(got / latents.std(), latents / latents.std(), atol=1e-3, rtol=0)
    torch.testing.assert_close(drawn, pictures, atol=1e-3, rtol=0)
    assert run.text.config.length == {"PixArtSigmaPipeline": 300, "PixArtAlphaPipeline": 120}[kind]
    assert run.sampling.steps == 20 and run.sampling.guidance.scale == 4.5


def test_a_dit_draws_its_classes(tmp_path: Path) -> None:
    """Its captions are the names of its classes; the null is diffusers' last row."""
    names = {0: "red circle", 1: "crane", 2: "blue", 3: "crane", 4: "green"}
    pipeline = diffusers.DiTPipeline(
        transformer=donors.network("DiTTransformer2DModel", donors.DIT), vae=peers.kl(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "theirs")
    index = tmp_path / "theirs" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": names}))  # as the hub's has
    run = load_pipeline(convert(tmp_path / "theirs", tmp_path / "ours"), "cpu")
    assert run.text.classes == ("red circle", "crane", "blue", "crane (3)", "green")
    start = noise(run)
    cond, null = run.text(["crane (3)", "green"]), run.text([""])
    times, network = torch.tensor([0.3, 0.3]), run.denoiser.backbone
    with torch.no_grad():
        for number, told in ((torch.tensor([3, 4]), cond), (torch.tensor([5, 5]), null.expand(2))):
            wanted = pipeline.transformer(start, timestep=1000 * times, class_labels=number).sample
            torch.testing.assert_close(network(start, 1000 * times, told), wanted, atol=1e-4, rtol=1e-4)
    assert run.sampling.guidance.scale == 4.0


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize("kind", ["unet", "pixart"])
def test_flow_is_equal_call_by_call(kind: str, tmp_path: Path) -> None:
    """diffusers cuts 1000 sigma to whole numbers and starts below 1, so that pictures differ: its network calls, made
    again with ours at its times, do not."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**FLOW)
    pipeline = donors.stable_diffusion(scheduler) if kind == "unet" else donors.pixart(scheduler)
    pipeline.save_pretrained(tmp_path / "theirs")
    run = load_pipeline(convert(tmp_path / "theirs", tmp_path / "ours"), "cpu")
    calls: list[tuple[Any, ...]] = []
    network = pipeline.unet if kind == "unet" else pipeline.transformer
    keep = lambda module, args, told, answer: calls.append((args[0], told.get("timestep", args[1:]), answer[0]))  # noqa: E731
    hook = network.register_forward_hook(keep, with_kwargs=True)
    theirs(pipeline, noise(run))
    hook.remove()
    cond = run.text(["", "", *PROMPTS])
    assert len(calls) == 2 * STEPS
    for x, level, answer in calls:
        told = level[0] if isinstance(level, tuple) else level
        with torch.no_grad():
            got = run.denoiser.backbone(x, torch.as_tensor(told).expand(4).float(), cond)
        torch.testing.assert_close(got, answer, atol=1e-4, rtol=1e-4)
    assert type(run.denoiser.diffusion.schedule).__name__ == "Flow" and run.sampling.grid.shift == 3.0
    assert type(run.denoiser.diffusion.prediction).__name__ == "Velocity"
