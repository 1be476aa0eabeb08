"""LPIPS: equal to the lpips package, zero at the image, a gradient at the decoder, none where there should be none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoencoder.kl import KL
from autoencoder.perceptual import Perceptual


class Trunk(nn.Module):
    """Two rectified maps of a seeded random network; dropout shows whether it is left in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, stride=2)
        self.drop, self.calls = nn.Dropout(0.5), 0

    def forward(self, images: Tensor) -> list[Tensor]:
        self.calls += 1
        assert images.dtype == torch.float32
        first = self.drop(torch.relu(self.first(images)))
        return [first, torch.relu(self.second(first))]


@pytest.fixture
def perceptual() -> Perceptual:
    return Perceptual(Trunk(), [torch.rand(6), torch.rand(8)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("net", ["alex", "squeeze", "vgg"])
def test_equals_the_lpips_package(net: str) -> None:
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net=net, pretrained=True, pnet_rand=True, verbose=False)
    ours = Perceptual.from_lpips(theirs)
    x_hat, images = (torch.rand(2, 3, 48, 48) * 2 - 1 for _ in range(2))
    with torch.no_grad():
        expected = theirs(x_hat, images).flatten()
        torch.testing.assert_close(ours(x_hat, images), expected, rtol=1e-5, atol=1e-7)
    assert (expected > 1e-4).all()
    assert ours(images, images).tolist() == [0, 0]


def test_without_weights_every_channel_counts_one() -> None:
    images, x_hat = torch.rand(2, 3, 12, 12), torch.rand(2, 3, 12, 12)
    ones = Perceptual(Trunk(), [torch.ones(6), torch.ones(8)])
    torch.testing.assert_close(Perceptual(Trunk())(x_hat, images), ones(x_hat, images))


def test_gradient_reaches_every_weight_of_the_decoder_and_none_of_the_network(perceptual: Perceptual) -> None:
    model = KL(channels=(8, 8), blocks=1, latent_channels=2, groups=4).build()
    images = torch.rand(2, 3, 12, 12)
    reconstruction, _ = model(images, torch.randn(2, 2, 6, 6))
    perceptual(reconstruction, images).mean().backward()
    assert model.last_layer.grad is not None and model.last_layer.grad.norm() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.decoder.parameters())
    assert all(p.grad is None and not p.requires_grad for p in perceptual.parameters())


def test_target_is_computed_once_and_without_graph(perceptual: Perceptual) -> None:
    images, x_hat = torch.rand(2, 3, 12, 12, requires_grad=True), torch.rand(2, 3, 12, 12)
    target = perceptual.target(images)
    assert not any(features.requires_grad for features in target)
    torch.testing.assert_close(perceptual.distance(x_hat, target), perceptual(x_hat, images))
    trunk = perceptual.features
    assert isinstance(trunk, Trunk)
    calls = trunk.calls
    perceptual.distance(x_hat, target)
    assert trunk.calls == calls + 1


def test_stays_in_eval_mode_and_float32(perceptual: Perceptual) -> None:
    images, x_hat = torch.rand(2, 3, 12, 12), torch.rand(2, 3, 12, 12)
    expected = perceptual(x_hat, images)
    with torch.autocast("cpu", torch.bfloat16):
        actual = nn.Sequential(perceptual).train()[0](x_hat.bfloat16().float(), images)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.01)
    assert not perceptual.features.training


class Dead(nn.Module):
    """Features that vanish in the upper half of the image, whatever is in it, without a rectifier to hide their
    gradient.
    """

    def forward(self, images: Tensor) -> list[Tensor]:
        mask = (torch.arange(images.shape[2]) >= images.shape[2] // 2).float().view(1, 1, -1, 1)
        return [images * mask]


def test_all_zero_features_have_a_finite_gradient() -> None:
    images = torch.rand(1, 3, 4, 4)
    for start in (torch.rand(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)):
        x_hat = start.requires_grad_()
        Perceptual(Dead())(x_hat, images).sum().backward()
        assert x_hat.grad is not None and x_hat.grad.isfinite().all()
        assert x_hat.grad.abs().max() < 1e3


def test_wrong_number_of_weights_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="gives 2 maps, but there are weights for 1"):
        Perceptual(Trunk(), [torch.ones(6)])(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
