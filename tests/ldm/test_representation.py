"""Features that are compared: what they cost, exactly; where a backbone gives them; and what a loss makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_backbones import SMALL, build, config, inputs
from torch import Tensor, nn

from ldm.backbones import Backbone, DiT, UNet
from ldm.backbones.routing import ROUTE
from ldm.conditioning import Cond
from ldm.diffusion import Diffusion
from ldm.noise import Noise
from ldm.objectives import DenoisingConfig
from ldm.pairing import Independent
from ldm.predictions import Velocity
from ldm.representation import REPRESENTATIONS, VISION, Aligned, Dispersive, Repa, Represented, dispersion
from ldm.schedules import Flow
from ldm.times import UniformTimes
from ldm.uncertainty import Weighed
from ldm.weighting import UniformWeight

__all__ = ["config"]


def test_the_dispersion_of_three_points() -> None:
    """The handbook's numbers: the diagonal counts, and distances are a mean over dimensions."""
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    got = dispersion(z, 0.5)
    got.backward()
    torch.testing.assert_close(got.detach(), torch.tensor(-0.8659499), rtol=0, atol=1e-6)
    slope = torch.tensor([[0.388687, 0.038703], [-0.395806, 0.014238], [0.007119, -0.052941]])
    torch.testing.assert_close(z.grad, slope, rtol=0, atol=1e-6)
    torch.testing.assert_close(dispersion(z.detach(), 1.0), torch.tensor(-0.6608087), rtol=0, atol=1e-6)
    two = torch.tensor([[7.0], [8.0]])
    torch.testing.assert_close(dispersion(two, 0.5), torch.tensor(-0.5662192), rtol=0, atol=1e-6)


def test_equal_features_stay_equal() -> None:
    z = torch.full((8, 5), 1.7, requires_grad=True)
    got = dispersion(z, 0.5)
    got.backward()
    assert got.item() == 0 and z.grad is not None and z.grad.abs().max() < 1e-12
    far = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)) + 1000
    exact = torch.cdist(far.double(), far.double()).square() / (5 * 0.5)
    torch.testing.assert_close(dispersion(far, 0.5), (-exact).exp().mean().log().float(), rtol=0, atol=1e-3)


def test_samples_are_held_against_their_group() -> None:
    """All tokens of a sample are one vector; a batch costs the same however it is split between groups."""
    tokens = torch.randn(8, 3, 2, generator=torch.Generator().manual_seed(1))
    rule = Dispersive(group=4)
    whole = rule(tokens, (1, 3), {})
    for rows in (slice(4), slice(4, 8)):
        torch.testing.assert_close(whole[rows], dispersion(tokens[rows].flatten(1), 0.5).expand(4))
        assert torch.equal(rule(tokens[rows], (1, 3), {}), whole[rows])
    assert not torch.equal(whole[0], whole[4])
    with pytest.raises(ValueError, match="group: must be a power of two"):
        Dispersive(group=6)


def aligned(tokens: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
    made = Aligned(tokens.shape[2], 4, features.shape[1])
    made.head = nn.Sequential()
    return made(tokens, size, {VISION: features})


def test_alignment_is_the_cosine_place_by_place() -> None:
    """-1 of equal features, whatever their length, 0 of orthogonal ones and 1 of opposite ones."""
    features = torch.randn(2, 6, 2, 4, generator=torch.Generator().manual_seed(1))
    same = 3 * features.flatten(2).transpose(1, 2)
    across = torch.stack([-same[..., 1], same[..., 0], -same[..., 3], same[..., 2], -same[..., 5], same[..., 4]], 2)
    for tokens, cost in ((same, -1.0), (across, 0.0), (-same, 1.0)):
        for size in ((2, 4), (8, 16)):  # of latents, in patches of one and of four
            torch.testing.assert_close(aligned(tokens, features, size), torch.full((2,), cost), rtol=0, atol=1e-6)
    assert aligned(same, features.half(), (2, 4)).dtype == torch.float32
    turned = features.transpose(2, 3).contiguous()  # 4 x 2: resized to 2 x 4, its places are not those of the tokens
    assert (aligned(same, turned, (2, 4)) > -0.9).all()


def test_features_of_another_grid_are_resized() -> None:
    fine = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    tokens = fine.flatten(2).transpose(1, 2)
    blocks = fine.repeat_interleave(2, 2).repeat_interleave(2, 3)
    wide = nn.functional.interpolate(blocks, (2, 2), mode="bilinear", antialias=True)
    wanted = -nn.functional.cosine_similarity(tokens, wide.flatten(2).transpose(1, 2), dim=2).mean(1)
    torch.testing.assert_close(aligned(tokens, blocks, (4, 4)), wanted)


def test_the_head() -> None:
    """Three layers with SiLU between: D hidden + hidden^2 + hidden F weights, and their biases."""
    made = Repa(hidden=16).of(8, 6)
    assert isinstance(made, Aligned)
    assert sum(p.numel() for p in made.parameters()) == 8 * 16 + 16 * 16 + 16 * 6 + 16 + 16 + 6
    assert [type(layer) for layer in made.head] == [nn.Linear, nn.SiLU, nn.Linear, nn.SiLU, nn.Linear]


def by_hand(backbone: Any, blocks: int, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
    """The picture's tokens after so many blocks of a DiT."""
    tokens, given = backbone.begin(x, level, cond)
    for i, block in enumerate(backbone.blocks[:blocks]):
        tokens = backbone.step(block, i, tokens, given)
    return tokens[:, -x[0, 0].numel() // backbone.multiple**2 :]


def test_a_tap_takes_nothing_from_the_answer(config: DiT | UNet) -> None:
    backbone, given = build(config), inputs((4, 8))
    y, feature = backbone(*given, tap=0.5)
    assert torch.equal(y, backbone(*given)) and feature.shape[2] == backbone.tap_width(0.5)
    if isinstance(config, UNet):
        kept: list[Tensor] = []
        backbone.mid_block.register_forward_hook(lambda module, args, out: kept.append(out))  # type: ignore[union-attr, operator]
        feature = backbone(*given, tap=0.5)[1]
        assert torch.equal(feature.transpose(1, 2).unflatten(2, kept[0].shape[2:]), kept[0])
        return
    assert torch.equal(feature, by_hand(backbone, 1, *given))
    assert torch.equal(backbone(*given, tap=1.0)[1], by_hand(backbone, 2, *given))
    assert torch.equal(backbone(*given, tap=0.01)[1], feature)  # after one block at least


def test_a_tap_of_weights_in_half_precision() -> None:
    x, level, cond = inputs()
    y, feature = build(SMALL["dit"]).bfloat16()(x.float(), level, cond.to("cpu", torch.float32), tap=0.5)
    assert y.dtype == feature.dtype == torch.float32


def test_routed_tokens_are_not_compared() -> None:
    routed = DiT(width=32, depth=8, heads=2, route=0.5, route_from=2, route_until=3, text="in-context")
    backbone = build(routed)
    for blocks in (3, 4, 5):
        with pytest.raises(ValueError, match=f"depth {blocks / 8:g} is after block {blocks}, .* take 0.25 or less"):
            Dispersive(depth=blocks / 8).build(backbone, 0)
    x, level, cond = inputs()
    told = cond._replace(extras={ROUTE: torch.rand(3, 16, generator=torch.Generator().manual_seed(1))})
    for blocks in (1, 2, 6, 8):
        assert Dispersive(depth=blocks / 8).build(backbone, 0) is not None
        assert backbone(x, level, told, tap=blocks / 8)[1].shape == (3, 16, 32)
    assert torch.equal(backbone(x, level, told, tap=0.25)[1], by_hand(backbone, 2, x, level, cond))
    plain = build(DiT(width=32, depth=8, heads=2))
    assert Dispersive(depth=0.5).build(plain, 0) is not None


@pytest.mark.parametrize("kind", REPRESENTATIONS)
def test_every_kind_upon_every_backbone(kind: Any, config: DiT | UNet) -> None:
    """A cost of each sample, which the backbone learns of; none where its weight is 0."""
    backbone, (x, level, cond) = build(config).float(), inputs(batch=3)
    rule = kind(**{"group": 4} if kind is Dispersive else {})
    if not rule.weight:
        assert rule.build(backbone, 5) is None
        return
    assert kind(weight=0.0).build(backbone, 5) is None and rule.weight == 0.5
    index = torch.tensor([0, 1, 2, 0])
    x, level, cond = x[index].float(), level[index], cond.select(index).to("cpu", torch.float32)
    cost = rule.build(backbone, 5)
    feature = backbone(x, level, cond, tap=rule.depth)[1]
    got = cost(feature, x.shape[2:], {VISION: torch.ones(4, 5, 3, 3)})
    assert got.shape == (4,) and got.dtype == torch.float32 and got.isfinite().all()
    got.mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in backbone.parameters())


def test_a_backbone_without_features() -> None:
    class Plain(Backbone):
        def predict(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
            return x

    with pytest.raises(ValueError, match="Plain gives no feature to compare: set representation.kind to none"):
        Repa().build(Plain(channels=4, out_channels=4, multiple=1), 5)


def test_the_cost_is_added_to_the_loss_alone() -> None:
    """Not to what loss-aware times go by, nor to a validation; and an answer is the same beside it."""
    diffusion = Diffusion(schedule=Flow(), prediction=Velocity())
    rule = DenoisingConfig().build(diffusion=diffusion, times=UniformTimes(), weighting=UniformWeight(),
                                   pairing=Independent())
    x0, none = torch.randn(4, 2, 3, 3), Cond(torch.zeros(4, 1, 1), torch.ones(4, 1, dtype=torch.bool))
    draw, cost = rule.draw(x0, Noise(torch.arange(4))), torch.tensor([1.0, 2.0, 3.0, 4.0])
    for plain in (lambda x, *_: x / 2, lambda x, *_: Weighed(x / 2, torch.ones(4))):
        def beside(*given: Any, plain: Any = plain) -> Represented:
            return Represented(plain(*given), cost)

        ours, theirs = (rule.losses(network, x0, none, draw) for network in (beside, plain))
        assert torch.equal(ours.total, theirs.total + cost) and torch.equal(ours.seen, theirs.seen)
        assert torch.equal(ours.features, cost) and theirs.features is None  # type: ignore[arg-type]
        at = (x0, none, draw.t, draw.eps)
        assert torch.equal(rule.at(beside, *at), rule.at(plain, *at))
        assert torch.equal(rule.answered(beside, x0, none, draw)[0], rule.answered(plain, x0, none, draw)[0])
