"""Tiles: equal to the whole where the view is bounded, no seam where it is not, one tile's memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.kl import KL, KLAutoencoder
from autoencoder.tiles import decode_tiled, encode_tiled

F64 = torch.float64


class Bounded(KLAutoencoder):
    """A factor-4 model of plain convolutions, each way seeing 2 latents (8 pixels) around."""

    def __init__(self) -> None:
        super().__init__(KL(channels=(4, 4, 4), blocks=1, latent_channels=2, groups=4, mid_attention=False))
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.SiLU(), nn.Conv2d(4, 4, 5, padding=2))
        self.quant_conv = nn.Conv2d(4, 4, 1)
        self.post_quant_conv = nn.Conv2d(2, 4, 3, padding=1)
        self.decoder = Plain()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        y: Tensor = self.conv_out(F.interpolate(F.silu(self.conv_in(z)), scale_factor=4.0))
        return y


@pytest.fixture
def bounded() -> Bounded:
    torch.manual_seed(0)
    return Bounded().double().requires_grad_(False)


@pytest.mark.parametrize(("height", "width"), [(5, 7), (12, 12), (13, 40), (31, 12), (29, 33)])
@pytest.mark.parametrize(("tile", "overlap"), [(12, 8), (13, 9), (20, 10)])
def test_tiles_are_the_whole_where_the_view_is_bounded(
    bounded: Bounded, height: int, width: int, tile: int, overlap: int
) -> None:
    """An overlap of four times the view: at the seams, away from them, and for every size that the factor divides."""
    latents, images = torch.randn(2, 2, height, width, dtype=F64), torch.rand(2, 3, 4 * height, 4 * width, dtype=F64)
    torch.testing.assert_close(
        decode_tiled(bounded, latents, tile=tile, overlap=overlap), bounded.decode(latents), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        encode_tiled(bounded, images, tile=tile, overlap=overlap), bounded.encode(images), rtol=1e-12, atol=1e-12
    )


def test_too_small_an_overlap_is_wrong_near_the_seams_only(bounded: Bounded) -> None:
    latents = torch.randn(1, 2, 4, 24, dtype=F64)
    error = (decode_tiled(bounded, latents, tile=16, overlap=4) - bounded.decode(latents)).abs().amax((0, 1, 2))
    near = torch.arange(96) // 4  # columns of latents; tiles are 0..15 and 8..23
    assert error.max() > 1e-3
    assert error[(near < 8) | (near > 15)].max() < 1e-12


def test_no_seam_where_the_view_is_not_bounded() -> None:
    """Group statistics and attention differ from tile to tile. Side by side, what a tile gets wrong jumps at its edge
    by many times what the picture changes from pixel to pixel; the blend spreads it over its 12 pixels.
    """
    torch.manual_seed(0)
    model = KL(channels=(16, 16), blocks=1, latent_channels=2, groups=4).build().requires_grad_(False)
    slope = torch.linspace(-2, 2, 64)  # so that tiles have means of their own
    latents = torch.stack([slope, slope.cos()])[:, None].expand(2, 24, 64)[None]
    whole = model.decode(latents)

    def steps(images: Tensor) -> Tensor:
        """Mean |change| from column to column, away from the picture's borders."""
        return (images[..., 1:] - images[..., :-1]).abs().mean((0, 1, 2))[20:106]

    hard, soft = (steps(decode_tiled(model, latents, tile=24, overlap=n) - whole).max() for n in (0, 12))
    assert hard > 20 * steps(whole).mean() and soft < hard / 12


def test_the_network_never_sees_more_than_a_tile(bounded: Bounded, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    decode, encode = bounded.decode, bounded.encode
    monkeypatch.setattr(bounded, "decode", lambda x: (sizes.append(tuple(x.shape[2:])), decode(x))[1])
    monkeypatch.setattr(bounded, "encode", lambda x: (sizes.append(tuple(s // 4 for s in x.shape[2:])), encode(x))[1])
    decode_tiled(bounded, torch.randn(1, 2, 40, 9, dtype=F64), tile=12, overlap=8)
    encode_tiled(bounded, torch.randn(1, 3, 160, 36, dtype=F64), tile=12, overlap=8)
    assert set(sizes) == {(12, 9)} and len(sizes) == 16


def test_blended_weights_sum_to_one() -> None:
    """A constant picture stays constant, whatever the sizes."""
    model = Bounded()
    model.decode = lambda z: torch.ones(len(z), 3, *(4 * s for s in z.shape[2:]))  # type: ignore[method-assign]
    for height, width, tile, overlap in [(9, 50, 8, 4), (17, 64, 16, 5), (23, 23, 8, 7), (20, 21, 8, 0)]:
        ones = decode_tiled(model, torch.zeros(1, 2, height, width), tile=tile, overlap=overlap)
        torch.testing.assert_close(ones, torch.ones(1, 3, 4 * height, 4 * width))


def test_the_blend_by_hand() -> None:
    """Tiles 0..15 and 8..23 share 8 latents: the outer 2 on either side are thrown away, the middle 4 blended.

    Each tile answers with its number; what is seen is the second tile's weight, for 4 pixels to a latent.
    """
    model, tiles = Bounded(), iter([0.0, 1.0])
    model.decode = lambda z: torch.full((1, 3, 4, 4 * z.shape[3]), next(tiles))  # type: ignore[method-assign]
    row = decode_tiled(model, torch.zeros(1, 2, 1, 24), tile=16, overlap=8)[0, 0, 0].double()
    ramp = [(n + 0.5) / 16 for n in range(16)]
    wanted = [0.0] * (8 + 2) * 4 + ramp + [1.0] * (2 + 8) * 4
    assert row.tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("tile", "overlap"), [(8, 8), (8, 2), (0, 0), (8, -4)])
def test_tiles_that_cannot_be_laid_are_refused(bounded: Bounded, tile: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="tile > overlap"):
        decode_tiled(bounded, torch.zeros(1, 2, 20, 20, dtype=F64), tile=tile, overlap=overlap)


def test_sizes_and_channels_are_checked_before_any_work(bounded: Bounded) -> None:
    with pytest.raises(ValueError, match="divisible by the autoencoder's factor 4"):
        encode_tiled(bounded, torch.zeros(1, 3, 50, 64, dtype=F64))
    with pytest.raises(ValueError, match="2, height, width"):
        decode_tiled(bounded, torch.zeros(1, 4, 8, 8, dtype=F64))
