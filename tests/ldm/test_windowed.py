"""A backbone in windows: it agrees with windows of its ends, and each window is shown its own part of the picture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ldm.conditioning import Cond
from ldm.denoiser import Denoiser
from ldm.diffusion import Diffusion
from ldm.editing import Windows
from ldm.guidance import ClassifierFree
from ldm.noise import Noise
from ldm.predictions import Eps, Velocity
from ldm.schedules import VP, Flow
from ldm.windowed import InWindows


class Net(nn.Module):
    """What it says of a place depends on where the window lies; with the picture it is shown it has sum and difference.
    """

    def forward(self, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        shown = cond.image if cond.image is not None else torch.zeros_like(x)
        factor = shown.shape[-1] // x.shape[-1]
        small = torch.nn.functional.avg_pool2d(shown, factor)
        return x.mean((-2, -1), keepdim=True) + x + small * level.view(-1, 1, 1, 1) + cond.context.mean()


def cond(batch: int, image: Tensor | None = None, value: float = 0.3) -> Cond:
    extras = {} if image is None else {"image": image, "image_level": torch.zeros(batch, dtype=torch.float64)}
    told = Cond(torch.full((batch, 2, 3), value, dtype=torch.float64), torch.ones(batch, 2, dtype=torch.bool))
    return told._replace(extras=extras)


X = Noise.from_seeds([1, 2]).normal((3, 9, 7), "x", dtype=torch.float64)
T = torch.tensor(0.4, dtype=torch.float64)


@pytest.mark.parametrize("process", [Diffusion(schedule=VP(), prediction=Eps()),
                                     Diffusion(schedule=Flow(), prediction=Velocity())], ids=["vp", "flow"])
def test_it_agrees_with_windows_of_both_ends(process: Diffusion) -> None:
    """Under guidance too, which is linear: beneath it or around it is the same."""
    guide = ClassifierFree(scale=3.0)
    outer = Windows(guide(Denoiser(Net(), process), cond(2), cond(1, value=-1.0)), (4, 4), 3)(X, T)
    inner = guide(Denoiser(InWindows(Net(), (4, 4), 3), process), cond(2), cond(1, value=-1.0))(X, T)
    for got, wanted in zip(inner[:2], outer[:2], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    whole = guide(Denoiser(Net(), process), cond(2), cond(1, value=-1.0))(X, T)
    assert not torch.allclose(inner.x0, whole.x0)


@pytest.mark.parametrize("factor", [1, 4])
def test_each_window_is_shown_its_own_part(factor: int) -> None:
    """Of a network that answers the picture it is shown, the whole is put together of its parts."""
    image = Noise.from_seeds([3, 4]).normal((3, 9 * factor, 7 * factor), "image", dtype=torch.float64)

    class Shown(nn.Module):
        def forward(self, x: Tensor, level: Tensor, told: Cond) -> Tensor:
            assert told.image is not None and told.image.shape[-1] == x.shape[-1] * factor
            return torch.nn.functional.avg_pool2d(told.image, factor)

    got = InWindows(Shown(), (4, 5), 2)(X, torch.ones(2, dtype=torch.float64), cond(2, image))
    torch.testing.assert_close(got, torch.nn.functional.avg_pool2d(image, factor))


def test_answers_of_bfloat16_are_summed_in_the_latents_precision() -> None:
    """As under autocast: where all windows say the same, so does their mean, to the bit."""
    x = X.float()

    class Rounded(nn.Module):
        def forward(self, x: Tensor, level: Tensor, told: Cond) -> Tensor:
            return x.bfloat16()

    got = InWindows(Rounded(), (4, 4), 1)(x, torch.ones(2), cond(2))
    torch.testing.assert_close(got, x.bfloat16().float(), rtol=1e-6, atol=0)


def test_one_window_is_none_bit_for_bit() -> None:
    level, told = torch.ones(2, dtype=torch.float64), cond(2, X)
    assert torch.equal(InWindows(Net(), (9, 8), 3)(X, level, told), Net()(X, level, told))


@pytest.mark.parametrize("shape", [(3, 9, 8), (3, 18, 7), (3, 10, 7), (3, 4, 3)])
def test_a_picture_that_cannot_be_cut_is_refused(shape: tuple[int, int, int]) -> None:
    image = torch.zeros(2, *shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"the extra 'image' of {shape[1]}x{shape[2]} cannot be cut"):
        InWindows(Net(), (4, 4), 2)(X, torch.ones(2), cond(2, image))


def test_a_stride_lies_within_a_window() -> None:
    for stride in (0, 5):
        with pytest.raises(ValueError, match="need a stride from 1 to 4"):
            InWindows(Net(), (4, 9), stride)
