"""Tasks of models that are shown pictures: each is shown its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_image_tasks import Backbone, picture, pipeline, text
from torch import Tensor

from autoencoder.images import to_unit
from ldm.conditioning import Cond
from ldm.editing import Known, filled, hole_in_latents
from ldm.image_conditions.masked import Masked
from ldm.image_conditions.source import Source
from ldm.image_tasks import encoded, inpainting
from ldm.noise import Noise
from ldm.samplers import DDPM
from ldm.shown_tasks import instructed


class Shown(Backbone):
    """x0 is what it is shown behind the mask, if there is one, and of the hole the caption's length."""

    def forward(self, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        assert cond.image is not None
        hole, known = cond.image.tensor_split([cond.image.shape[1] - x.shape[1]], dim=1)
        return known + hole.sum(1, keepdim=True) * cond.context[:, :1, :1, None] + 0.1 * x


@pytest.mark.parametrize("count", [1, 3], ids=["one-mask", "masks"])
def test_a_model_that_is_shown_pictures_is_shown_its_own_whatever_the_batch(count: int) -> None:
    """Hole and known latents to one that was trained with masks, which then nothing holds; else the picture whole."""
    plain = pipeline(sampler=DDPM())
    pipe = replace(plain, denoiser=replace(plain.denoiser, backbone=Shown()), image=Masked())
    sources, masks = torch.cat([picture(seed=seed) for seed in range(3)]), torch.zeros(3, 1, 16, 24, dtype=torch.bool)
    for index in range(3):
        masks[index, :, 4 * index : 4 * index + 4] = True
    masks = masks[:count]
    seen = inpainting(pipe, sources, masks)(slice(1, 3))
    assert seen.extras is not None and not isinstance(seen.hold(plain.denoiser.bind(text(["a"]))), Known)
    image, gap = seen.extras(Noise.from_seeds([5, 6]))["image"], hole_in_latents(masks, 4, 1)
    gap = gap.expand(3, 1, 4, 6)[1:]
    known = encoded(pipe, filled(to_unit(sources), masks.expand(3, 1, 16, 24)))[1:]
    assert torch.equal(image[:, :1], gap.float()) and torch.equal(image[:, 1:], known.masked_fill(gap, 0))
    told = replace(pipe, image=Source())
    whole = {"image": encoded(pipe, to_unit(sources[1:]))}
    found = instructed(told, sources)(slice(1, 3)).extras
    assert found is not None and torch.equal(found(Noise.from_seeds([5, 6]))["image"], whole["image"])
    for which, make in ((pipe, lambda s, m: inpainting(pipe, s, m)), (told, lambda s, m: instructed(told, s))):
        drawn = torch.cat(list(which.pixels(["a", "bb", "ccc"], [4, 5, 6], batch_size=2, task=make(sources, masks))))
        alone = next(which.pixels("ccc", [6], task=make(sources[2:], masks[-1:])))
        assert (drawn[2:].int() - alone.int()).abs().max() <= 1
