"""Operators: the exact numbers of each member."""

from __future__ import annotations

import io
import math

import pytest
import torch
from algebra import F64, close, dot, normal
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from ldm.inverse.operators import (
    HDR,
    JPEG,
    Bicubic,
    Box,
    Decoded,
    GaussianBlur,
    GivenMask,
    Grey,
    LinearOperator,
    Mask,
    MotionBlur,
    Phase,
)

X = normal(3, 3, 16, 24).clamp(-2, 2) / 2


def variances(operator: LinearOperator, shape: tuple[int, int, int], noise: float, prior: float = 1.0) -> Tensor:
    """Of each number of x, drawn from N(0, prior^2 I), once y is known: the diagonal of s^2 - s^4 A^T (...)^-1 A."""
    unit = torch.eye(math.prod(shape), dtype=F64).view(-1, *shape)
    seen = operator(unit)
    return (prior**2 - prior**4 * dot(seen, operator.solve(seen, prior**2, noise**2))).view(shape)


def mean_variance(operator: LinearOperator, shape: tuple[int, int, int], noise: float) -> float:
    """The mean of `variances`, of the singular values."""
    singular = operator.spectrum(shape, torch.zeros((), dtype=F64)).singular
    return (noise**2 / (singular**2 + noise**2)).expand(shape).mean().item()


# --- Masks


@pytest.mark.parametrize("prior", [1.0, 0.5])
def test_a_mask_tells_of_what_is_seen_alone(prior: float) -> None:
    mask, noise = Mask(share=0.5, seed=1), 0.3
    seen, got = mask.seen(6, 8), variances(mask, (1, 6, 8), noise, prior)[0]
    assert 0 < seen.sum() < seen.numel()
    known = torch.full_like(got, prior**2 * noise**2 / (prior**2 + noise**2))
    close(got, torch.where(seen, known, prior**2))


def test_a_masks_pattern_is_keyed() -> None:
    assert torch.equal(Mask().seen(32, 32), Mask().seen(32, 32))
    assert not torch.equal(Mask().seen(32, 32), Mask(seed=1).seen(32, 32))
    assert Mask(share=0.2).seen(64, 64).to(F64).mean().item() == pytest.approx(0.2, abs=0.02)
    hidden = ~Mask(share=1.0, box=0.5).seen(8, 12)
    assert hidden[2:6, 3:9].all() and hidden.sum() == 4 * 6
    close(GivenMask(Mask().seen(16, 24))(X), Mask()(X))


# --- Downsampling and grey


@pytest.mark.parametrize(("factor", "noise", "gain", "variance"), [
    (2, 0.05, 0.990099, 0.752475), (4, 0.05, 0.961538, 0.939904), (4, 0.5, 0.2, 0.9875),
])  # fmt: skip
def test_box(factor: int, noise: float, gain: float, variance: float) -> None:
    box = Box(factor=factor)
    y = normal(2, 3, 2, 3)
    repeated = interpolate(y, scale_factor=factor, mode="nearest")
    close(box(repeated), y)
    close(box(X), avg_pool2d(X, factor))
    close(box(box.adjoint(y)), y / factor**2)
    close(box.adjoint(y), repeated / factor**2)
    close(box.pinv(y), repeated)
    close(box.adjoint(box.solve(y, 1.0, noise**2)), gain * repeated, 2e-6)
    close(variances(box, (1, 8, 8), noise), torch.full((1, 8, 8), variance, dtype=F64), 5e-7)
    assert mean_variance(box, (1, 8, 8), noise) == pytest.approx(variance, abs=5e-7)


@pytest.mark.parametrize(("factor", "largest", "least", "variance"), [
    (2, 0.709589, 0.490877, 0.503243), (4, 0.503195, 0.358800, 0.753145),
])  # fmt: skip
def test_bicubic(factor: int, largest: float, least: float, variance: float) -> None:
    bicubic = Bicubic(factor=factor)
    x = normal(2, 3, 32, 48)
    close(bicubic(x), interpolate(x, scale_factor=1 / factor, mode="bicubic", antialias=True))
    singular = torch.linalg.svdvals(bicubic.matrix(32))
    assert (singular[0].item(), singular[-1].item()) == (pytest.approx(largest, abs=1e-6),
                                                         pytest.approx(least, abs=1e-6))
    unseen = 32 - len(singular)
    along = (unseen + (0.05**2 / (singular**2 + 0.05**2)).sum().item()) / 32
    assert along == pytest.approx(variance, abs=5e-7)
    got = bicubic.spectrum((1, 32, 32), x).singular.flatten().sort().values
    close(got[-len(singular) ** 2 :], torch.outer(singular, singular).flatten().sort().values)


def test_a_row_of_bicubic_by_two() -> None:
    half = [-0.01171875, -0.03515625, 0.11328125, 0.43359375]
    assert Bicubic(factor=2).matrix(32)[5, 7:15].tolist() == half + half[::-1]


def test_grey() -> None:
    even, luma, y = Grey(weights=(1 / 3, 1 / 3, 1 / 3)), Grey(), normal(2, 1, 2, 3)
    close(even.pinv(y), y.expand(2, 3, 2, 3))
    assert mean_variance(even, (3, 1, 1), 0.05) == pytest.approx(0.669148, abs=5e-7)
    close(luma(luma.adjoint(y)), 0.446966 * y, 2e-6)
    expected = torch.tensor([0.801095, 0.233381, 0.971086], dtype=F64)
    close(variances(luma, (3, 1, 1), 0.05).flatten(), expected, 5e-7)


# --- Blurs


@pytest.mark.parametrize(("blur", "side", "transfer"), [
    (GaussianBlur(std=3.0, taps=61), 64, [1, 0.957555, 0.840726, 0.676820, 0.499595]),
    (GaussianBlur(std=1.0, taps=8), 8, [1, 0.734840, 0.291134, 0.062886, 0.014255]),
    (MotionBlur(taps=5), 16, [1, 0.852394, 0.482843, 0.070231, -0.2]),
])  # fmt: skip
def test_what_a_blur_makes_of_waves(blur: LinearOperator, side: int, transfer: list[float]) -> None:
    turns = torch.arange(5, dtype=F64)[:, None] * torch.arange(side, dtype=F64) / side
    waves = torch.cos(2 * math.pi * turns).view(5, 1, 1, side)
    close(blur(waves), torch.tensor(transfer, dtype=F64).view(5, 1, 1, 1) * waves, 1e-6)


@pytest.mark.parametrize(("blur", "shape", "variance"), [
    (GaussianBlur(std=3.0, taps=61), (1, 1, 64), 0.743756), (GaussianBlur(std=3.0, taps=61), (1, 64, 64), 0.947002),
    (MotionBlur(taps=5), (1, 1, 16), 0.114114),
])  # fmt: skip
def test_what_a_blur_leaves_open(blur: LinearOperator, shape: tuple[int, int, int], variance: float) -> None:
    assert mean_variance(blur, shape, 0.05) == pytest.approx(variance, abs=1e-6)
    if shape[1] == 1:
        assert variances(blur, shape, 0.05).mean().item() == pytest.approx(variance, abs=1e-6)


def test_a_blur_is_a_circular_convolution() -> None:
    x, weights = X, [math.exp(-(j**2) / 2 / 0.64) for j in range(-2, 2)]
    expected = x
    for dim in (-2, -1):
        parts = [w * expected.roll(j, dim) for j, w in zip(range(-2, 2), weights, strict=True)]
        expected = torch.stack(parts).sum(0) / sum(weights)
    close(GaussianBlur(std=0.8, taps=4)(x), expected)
    close(MotionBlur(taps=3, direction="vertical")(x), (x.roll(-1, -2) + x + x.roll(1, -2)) / 3)
    close(MotionBlur(taps=3)(x), (x.roll(-1, -1) + x + x.roll(1, -1)) / 3)
    long, side = MotionBlur(taps=25), 24
    close(long(x), (side * x.mean(-1, keepdim=True) + x.roll(12, -1)) / 25)


# --- Those that are not linear


def test_jpegs_tables_are_libjpegs() -> None:
    for quality, dc, total in ((10, 80, 12560), (25, 32, 7376), (50, 16, 3688), (75, 8, 1858), (90, 3, 736)):
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
        tables = JPEG(quality=quality).tables()
        assert (tables[0, 0, 0].item(), tables[0].sum().item()) == (dc, total)
        stored = Image.open(file).quantization  # type: ignore[attr-defined]
        assert [tables[0].flatten().tolist(), tables[1].flatten().tolist()] == [list(stored[0]), list(stored[1])]
        assert torch.equal(tables[1], tables[2])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_of_jpeg_is_jpeg_bit_for_bit(channels: int, dtype: torch.dtype) -> None:
    x = X[:, :channels].to(dtype)
    for quality in (1, 10, 50, 75, 90, 100):
        once = JPEG(quality=quality)(x)
        assert torch.equal(JPEG(quality=quality)(once), once)
        assert not torch.equal(once, x)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("quality", [30, 80])
def test_jpeg_is_what_a_file_stores(mode: str, quality: int) -> None:
    """To a level or so: a program rounds colours and pixels to whole levels. No value is cut."""
    channels = len(mode)
    smooth = interpolate(normal(1, channels, 4, 6), scale_factor=4, mode="bilinear")
    levels = (127.5 + 25 * smooth).clamp(40, 215).round().to(torch.uint8)
    plain = levels[0].permute(1, 2, 0).squeeze(-1).numpy()
    file = io.BytesIO()
    Image.fromarray(plain, mode).save(file, "JPEG", quality=quality, subsampling=0)
    stored = torch.tensor(list(Image.open(file).tobytes())).view(16, 24, channels).movedim(-1, 0)
    got = 127.5 * (JPEG(quality=quality)(levels / 127.5 - 1.0)[0] + 1)
    error, moved = ((a.double() - stored).square().mean().sqrt().item() for a in (got, levels[0]))
    assert error < min(1.5, moved / 2)


def test_jpegs_gradient_takes_rounding_for_the_identity() -> None:
    x, u = X.requires_grad_(), normal(*X.shape, seed=2)
    (gradient,) = torch.autograd.grad(JPEG(quality=10)(x), x, u)
    close(gradient, u)


def test_phase_does_not_see_sign_place_or_half_a_turn() -> None:
    x = torch.zeros(1, 1, 8, 12, dtype=F64)
    x[..., 2:6, 3:9] = normal(4, 6)
    phase = Phase()
    y = phase(x)
    assert y.shape == (1, 1, 16, 24)
    for same in (-x, x.roll((1, -2), (-2, -1)), x.flip((-2, -1)), x.roll((-2, 3), (-2, -1))):
        close(phase(same), y)
    assert not torch.allclose(phase(x.flip(-1)), y, atol=1e-3)
    close(y.square().sum(), x.square().sum())  # unitary: what is added is 0
    assert torch.autograd.gradcheck(phase, normal(1, 1, 2, 3).requires_grad_())


def test_hdr_cuts_both_ends() -> None:
    x = torch.tensor([-1.0, -0.6, -0.25, 0.0, 0.4, 0.6], dtype=F64).view(1, 1, 1, 6).requires_grad_()
    y = HDR()(x)
    assert y.flatten().tolist() == [-1.0, -1.0, -0.5, 0.0, 0.8, 1.0]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.flatten().tolist() == [0.0, 0.0, 2.0, 2.0, 2.0, 0.0]


def test_an_operator_behind_a_decoder_is_one_of_latents() -> None:
    weights = normal(3, 4)

    def decode(z: Tensor) -> Tensor:
        return torch.einsum("dc,bchw->bdhw", weights, z)

    decoded, z = Decoded(Box(factor=2), decode, (4, 8, 6)), normal(2, 4, 8, 6).requires_grad_()
    y = decoded(z)
    close(y, Box(factor=2)(decode(z)))
    assert decoded.domain(y) == (4, 8, 6) and not decoded.linear
    (gradient,) = torch.autograd.grad(y.sum(), z)
    close(gradient, (weights.sum(0) / 4).view(1, 4, 1, 1).expand_as(z))
    with pytest.raises(ValueError, match="grey gives pictures of 1 channel"):
        Decoded(Grey(), torch.nn.Identity(), (4, 8, 6)).domain(torch.zeros(1, 3, 8, 6))
