"""What is done with pictures and a trained model: where the walk begins, what stays bit for bit, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from autoencoder.identity import Identity
from autoencoder.images import to_uint8, to_unit
from autoencoder.kl import KL
from ldm import image_tasks
from ldm.conditioning import Cond
from ldm.coupling import PromptToPrompt
from ldm.denoiser import Denoiser
from ldm.diffusion import Diffusion
from ldm.editing import filled, hole_in_latents
from ldm.grids import Trailing, Uniform
from ldm.guidance import ClassifierFree
from ldm.image_tasks import (
    edit_friendly_inversion,
    extended,
    image_to_image,
    inpainting,
    inverted,
    referring,
    restoration,
    styled,
    windowed,
)
from ldm.inverse.measurement import DDNM
from ldm.inverse.operators import Box, measure
from ldm.inverse.posterior import RePaint, SplitGibbs
from ldm.noise import Noise
from ldm.pipeline import Pipeline, Sampling
from ldm.predictions import X0
from ldm.samplers import DDIM, DDPM, Euler, Heun, Snapshot
from ldm.schedules import SCHEDULES, Flow, NoiseSchedule
from ldm.tasks import Task, walked

CALLS: list[float] = []


class Backbone(torch.nn.Module):
    """x0 of data N(m, 1/4) on `flow`, m the length of the caption."""

    multiple = 1

    def forward(self, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        CALLS.append(level[0].item())
        t, mean = (level / 1000).clamp(0, 1).to(x.dtype).view(-1, 1, 1, 1), cond.context[:, :1, :1, None]
        return mean + (x - (1 - t) * mean) * (1 - t) / 4 / ((1 - t) ** 2 / 4 + t**2)


def text(captions: Sequence[str]) -> Cond:
    lengths = torch.tensor([float(len(caption)) for caption in captions])
    return Cond(lengths[:, None, None] / 40, torch.ones(len(captions), 1, dtype=torch.bool))


def pipeline(schedule: NoiseSchedule | None = None, pixels: bool = False, **plan: Any) -> Pipeline:
    torch.manual_seed(0)
    shape: Any = Identity() if pixels else KL(channels=(8, 8, 8), blocks=1, latent_channels=3, groups=4)
    autoencoder = shape.build()
    denoiser = Denoiser(Backbone(), Diffusion(schedule=schedule or Flow(), prediction=X0()))
    settings: dict[str, Any] = {"sampler": Euler(), "grid": Uniform(), "guidance": ClassifierFree(scale=2.0)}
    drawn = Pipeline(autoencoder.eval(), denoiser, text, Sampling(**{"steps": 5} | settings | plan), (16, 24))  # type: ignore[arg-type]
    CALLS.clear()
    return drawn


def picture(height: int = 16, width: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def drawn(pipe: Pipeline, *captions: str, **how: Any) -> Tensor:
    return torch.cat(list(pipe.pixels(list(captions), 7, **how)))


@pytest.mark.parametrize("kind", SCHEDULES, ids=lambda kind: kind.kind)
def test_strength_one_is_a_drawing_from_noise_alone(kind: type[NoiseSchedule]) -> None:
    """Not the source with noise added, which leaves alpha(1) of it."""
    pipe = pipeline(kind(), grid=Uniform(), sampler=DDPM())
    for how in ({"strength": 1.0}, {"start_time": 1.0}):
        edited = drawn(pipe, "a", "bb", task=image_to_image(pipe, picture(), **how))
        assert torch.equal(edited, drawn(pipe, "a", "bb"))


def test_strength_zero_is_the_reconstruction_without_a_network_call() -> None:
    pipe, source = pipeline(), picture()
    for how in ({"strength": 0.0}, {"start_time": 0.0}, {"strength": 0.09}):
        made = drawn(pipe, "a", task=image_to_image(pipe, source, **how))
        with torch.no_grad():
            moments = pipe.autoencoder.encode(to_unit(source))
            wanted = to_uint8(pipe.autoencoder.decode(pipe.autoencoder.norm.mean_latents(moments)))
        assert CALLS == [] and torch.equal(made, wanted), how


@pytest.mark.parametrize(("strength", "steps"), [(0.5, 3), (0.6, 3), (0.7, 4), (0.1, 1), (1.0, 5)])
def test_the_calls_are_the_share_of_the_steps(strength: float, steps: int) -> None:
    """Halves go up; a share is of steps whatever the sampler's calls in each."""
    assert walked(strength, 5) == steps
    for sampler, calls in ((Euler(), steps), (Heun(), 2 * steps - 1)):
        pipe = pipeline(sampler=sampler)
        drawn(pipe, "a", task=image_to_image(pipe, picture(), strength=strength))
        assert len(CALLS) == calls


def test_a_start_time_is_a_noise_level_whatever_the_steps() -> None:
    for steps in (5, 9):
        pipe = pipeline(steps=steps)
        drawn(pipe, "a", task=image_to_image(pipe, picture(), start_time=0.53))
        assert CALLS[0] == pytest.approx(530)
    with pytest.raises(ValueError, match=r"start time must lie in \[0, 1\], got 1.5"):
        image_to_image(pipe, picture(), start_time=1.5)
    with pytest.raises(ValueError, match="t_min = 1e-05"):
        drawn(pipe, "a", task=image_to_image(pipe, picture(), start_time=1e-6))


def test_a_start_time_within_the_first_step_begins_from_the_picture() -> None:
    """Which leaves as many times as the whole grid has."""
    pipe = pipeline(steps=2)
    task = image_to_image(pipe, picture(), start_time=0.9)(slice(0, 1))
    grid, noise = pipe.sampling.grid(2, Flow()), Noise.from_seeds([3])
    times = task.visits(grid, Flow())
    assert task.source is not None and times.tolist() == [0.9, 0.5, 0] and len(times) == len(grid)
    x = task.begin(Flow(), grid, times, task.source.shape[1:], noise)
    eps = noise.normal(task.source.shape[1:], "prior")
    torch.testing.assert_close(x, 0.1 * task.source + 0.9 * eps)


def test_a_weak_edit_is_nearer_to_its_source() -> None:
    pipe, source = pipeline(grid=Trailing(), steps=10), picture()
    off = [(drawn(pipe, "aaa", task=image_to_image(pipe, source, strength=s)).int() - source.int()).abs().float().mean()
           for s in (0.0, 0.4, 0.9)]
    assert off[0] < off[1] < off[2]


@pytest.mark.parametrize("size", [(16, 24), (13, 22), (40, 17)])
def test_outside_the_hole_the_source_is_kept_bit_for_bit(size: tuple[int, int]) -> None:
    """At its own size, whatever the factor, under any sampler and guidance; in the hole other captions differ."""
    pipe, source = pipeline(), picture(*size)
    mask = torch.zeros(1, 1, *size, dtype=torch.bool)
    mask[..., 5:9, 6:13] = True
    for how in ({}, {"feather": 2}, {"fill": "grey"}, {"strength": 0.5}, {"windows": 3}):
        made = drawn(pipe, "a", "bbbbbbbbbbbbbbb", task=inpainting(pipe, source, mask, **how))
        assert made.shape == (2, 3, *size)
        near = torch.nn.functional.max_pool2d(mask.float(), 5, stride=1, padding=2) > 0 if "feather" in how else mask
        assert torch.equal(made.masked_fill(near, 0), source.expand_as(made).masked_fill(near, 0)), how
        assert not torch.equal(made[0], made[1]) and not torch.equal(made[:1], source)


def test_nothing_of_what_was_in_the_hole_is_seen() -> None:
    """Another content of the hole changes nothing at full strength, and the picture at half of it."""
    pipe, source = pipeline(), picture()
    mask = torch.zeros(1, 1, 16, 24, dtype=torch.bool)
    mask[..., 4:12, 8:16] = True
    other = torch.where(mask, 255 - source, source)
    for how, same in (({}, True), ({"fill": "grey"}, True), ({"strength": 0.4}, False)):
        pair = [drawn(pipe, "a", task=inpainting(pipe, one, mask, **how)) for one in (source, other)]
        assert torch.equal(*pair) is same, how


def test_each_picture_has_its_own_source_and_mask_whatever_the_batch() -> None:
    pipe = pipeline(sampler=DDPM())
    sources = torch.cat([picture(seed=seed) for seed in range(3)])
    masks = torch.zeros(3, 1, 16, 24, dtype=torch.bool)
    for index in range(3):
        masks[index, :, 4 * index : 4 * index + 4] = True
    for make in (lambda s, m: image_to_image(pipe, s, strength=0.6), lambda s, m: inpainting(pipe, s, m)):
        whole = torch.cat(list(pipe.pixels(["a", "bb", "ccc"], [4, 5, 6], batch_size=2, task=make(sources, masks))))
        alone = next(pipe.pixels("ccc", [6], task=make(sources[2:], masks[2:])))
        assert (whole[2:].int() - alone.int()).abs().max() <= 1


def test_a_posterior_fills_the_hole_of_one_mask() -> None:
    """In latents, of which those that are seen are the encoder's; nothing of what was in the hole."""
    pipe, source, repaint = pipeline(sampler=DDIM()), picture(), RePaint(jump=2, resamples=3)
    mask = torch.zeros(1, 1, 16, 24, dtype=torch.bool)
    mask[..., 4:12, 8:16] = True
    task = inpainting(pipe, source, mask, posterior=repaint)
    made, calls = drawn(pipe, "a", "bbbbbbbbbbbbbbb", task=task), len(CALLS)
    grid = pipe.sampling.grid(5, pipe.denoiser.schedule)
    assert calls == repaint.calls(grid) > 5
    assert torch.equal(made.masked_fill(mask, 0), source.expand_as(made).masked_fill(mask, 0))
    assert not torch.equal(made[0], made[1])
    held, hole = task(slice(0, 2)), hole_in_latents(mask, pipe.autoencoder.factor, 1)
    assert held.draw and not hole.all()
    found = held.draw(pipe.guided(["a", "bb"]), grid, Noise.from_seeds([7, 8]), None)
    known = image_tasks.encoded(pipe, filled(to_unit(source), mask)).expand_as(found)
    assert torch.equal(found.masked_fill(hole, 0), known.masked_fill(hole, 0))
    other = inpainting(pipe, torch.where(mask, 255 - source, source), mask, posterior=repaint)
    assert torch.equal(drawn(pipe, "a", task=other), made[:1])
    for how in ({"strength": 0.5}, {"start_time": 0.5}, {"mask": mask.expand(2, 1, 16, 24)}):
        with pytest.raises(ValueError, match="repaint draws the holes of one mask, and walks from noise alone"):
            inpainting(pipe, source, **{"mask": mask, "posterior": repaint} | how)


def test_a_canvas_grows_around_the_picture() -> None:
    pipe, source = pipeline(), picture()
    canvas, new = extended(pipe, source, (3, 0, 8, 5))
    assert canvas.shape == (1, 3, 21, 35) and int((~new).sum()) == 16 * 24
    made = drawn(pipe, "a", task=inpainting(pipe, canvas, new, windows=3))
    assert torch.equal(made[..., :16, 3:27], source)
    for margins in ((0, 0, 0, 0), (-1, 0, 0, 4)):
        with pytest.raises(ValueError, match="at least one above 0"):
            extended(pipe, source, margins)


def test_one_window_is_the_whole_picture() -> None:
    pipe = pipeline()
    held = Task(hold=windowed(pipe, 2))
    assert torch.equal(drawn(pipe, "a", task=lambda part: held), drawn(pipe, "a"))
    CALLS.clear()
    drawn(pipe, "a", task=lambda part: held, size=(16, 40))
    assert len(CALLS) == 5 * 3  # of 6 latents each, at 0, 2 and 4 of 10


def test_inversion_leads_back_and_more_so_with_iterations() -> None:
    pipe, source = pipeline(sampler=DDIM(), guidance=ClassifierFree(scale=1.0), steps=20), to_unit(picture())
    x0, off = image_tasks.encoded(pipe, source), []
    for iterations in (1, 3):
        start = inverted(pipe, source, "a", iterations=iterations)
        back = pipe.latents(pipe.guided(["a"]), Noise.from_seeds([0]), tuple(x0.shape[1:]), pipe.sampling,
                            Task(start=start))
        off.append((back - x0).abs().max().item())
    assert off[1] < 0.5 * off[0]


def test_an_edit_friendly_walk_draws_the_picture_again_at_any_scale() -> None:
    """Its own caption gives the reconstruction back, also guided; another edits it, less so at less strength."""
    source = picture()
    for scale in (1.0, 7.0):
        pipe = pipeline(sampler=DDPM(), guidance=ClassifierFree(scale=scale), steps=10)
        same, other, weak = (drawn(pipe, caption, task=edit_friendly_inversion(pipe, source, "aaa", strength=strength))
                             for caption, strength in (("aaa", 1.0), ("bbbbbbbbbbbb", 1.0), ("bbbbbbbbbbbb", 0.3)))
        plain = drawn(pipe, "x", task=image_to_image(pipe, source, strength=0))
        assert (same.int() - plain.int()).abs().max() <= 1
        assert (other.int() - plain.int()).abs().float().mean() > (weak.int() - plain.int()).abs().float().mean()
        assert not torch.equal(weak, plain)


def test_pairs_begin_from_one_noise_and_a_style_from_its_own() -> None:
    seen: list[Tensor] = []

    class Watched(Pipeline):
        def latents(self, denoise: Any, noise: Noise, shape: Any, plan: Any, task: Task, *_: Any) -> Tensor:
            seen.append(task.begin(denoise.schedule, *[plan.grid(5, denoise.schedule)] * 2, shape, noise))
            return seen[-1]

    pipe = pipeline()
    pipe.denoiser.backbone.shares = frozenset({"own", "cross"})  # type: ignore[attr-defined]
    watched = Watched(**{name: getattr(pipe, name) for name in pipe.__dataclass_fields__})
    drawn(watched, "a", "b", task=referring(None, PromptToPrompt(), ["source"]))
    assert torch.equal(seen[-1][0::2], seen[-1][1::2]) and not torch.equal(seen[-1][0], seen[-1][2])
    shots: list[Snapshot] = []
    made = drawn(pipe, "a", "b", task=referring(None, PromptToPrompt(), ["source"]), watch=shots.append)
    with torch.no_grad():
        assert torch.equal(to_uint8(pipe.decode(shots[-1].x)), made)  # the pictures alone are watched
    style = torch.randn(1, 3, 4, 6) * 2 + 1
    drawn(watched, "a", "b", task=styled(pipe, style))
    assert torch.equal(seen[-1][0::2], style.expand(2, -1, -1, -1))
    torch.testing.assert_close(seen[-1][1::2].mean((2, 3)), style.mean((2, 3)).expand(2, -1))
    held = inpainting(pipe, *extended(pipe, picture(), (0, 0, 0, 4)))
    with pytest.raises(ValueError, match="leave either out"):
        referring(held, PromptToPrompt(), ["a"])(slice(0, 1))


def test_a_restoration_measures_what_it_was_given() -> None:
    """In pixels; in latents it takes a decoder that is trained: tests/training/models/test_demo.py."""
    pipe = pipeline(pixels=True, sampler=DDPM(), steps=8)
    box, x = Box(factor=2), torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) / 2
    y = measure(box, x, 0.05, Noise.from_seeds([3]))
    plain = (box(to_unit(drawn(pipe, "a", "bb"))) - y).square().mean().sqrt()
    for method in (DDNM(), SplitGibbs()):
        made = drawn(pipe, "a", "bb", task=restoration(pipe, box, y, 0.05, method))
        assert (box(to_unit(made)) - y).square().mean().sqrt() < 0.5 * plain and not torch.equal(made[0], made[1])
    with pytest.raises(ValueError, match="pictures of 1 channels, the model draws 3"):
        restoration(pipe, box, y[:, :1], 0.05, DDNM())


def test_pictures_may_be_pil_and_what_does_not_fit_is_refused_at_the_call() -> None:
    pipe, source = pipeline(), picture()
    pil = Image.fromarray(source[0].permute(1, 2, 0).numpy())
    task, other = (image_to_image(pipe, given, strength=0.4) for given in ([pil], source))
    assert torch.equal(drawn(pipe, "a", task=task), drawn(pipe, "a", task=other))
    for wrong, said in (([pil, pil.resize((8, 8))], "of one size"), ([], "none"), (source.float(), "must be uint8"),
                        (source[:, :1], "must be uint8")):
        with pytest.raises(ValueError, match=said):
            image_to_image(pipe, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the mask is 16x20 pixels and the picture 16x24"):
        inpainting(pipe, source, torch.ones(1, 1, 16, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\], got -0.1"):
        image_to_image(pipe, source, strength=-0.1)
    assert replace(Task(), strength=0.5).strength == 0.5
