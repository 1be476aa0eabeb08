"""Every backbone: exact start, masks, sizes, checkpointing, gradients; and the published parameter counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.backbones import BACKBONES, Backbone, DiT, UNet
from ldm.backbones.embed import rope_table, rotate, sinusoid
from ldm.conditioning import Cond

CONTEXT, POOLED, CHANNELS = 24, 20, 4
SMALL: dict[str, Any] = {
    **{kind.kind: kind(**kind.small) for kind in BACKBONES},
    "dit-single": DiT(width=32, depth=2, heads=2, conditioning="adaln-single", cross_norm=False, pooled=False),
    "dit-modern": DiT(width=32, depth=2, heads=2, patch=1, mlp="swiglu", norm="rms", position="rope", qk_norm=True),
    "dit-in-context": DiT(width=32, depth=2, heads=2, text="in-context", position="rope"),
    "dit-variance": DiT(width=32, depth=2, heads=2, mlp="gelu-tanh", learned_variance=True),
    "unet-linear": UNet(channels=(16, 32), attention=(1,), head_dim=8, linear_projection=True, pooled=True, groups=8),
    "unet-placed": UNet(**UNet.small, position=True, query_position=True),
}


def build(config: DiT | UNet, *, shaken: bool = True) -> Backbone:
    """A small backbone in float64; shaken: its zero weights made non-zero, so that every branch counts."""
    torch.manual_seed(0)
    backbone = config.build(channels=CHANNELS, context_dim=CONTEXT, pooled_dim=POOLED).double()
    if shaken:
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return backbone


def inputs(size: tuple[int, int] = (8, 8), batch: int = 3, length: int = 5) -> tuple[Tensor, Tensor, Cond]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mask = torch.arange(length)[None] < torch.tensor([length, 2, 3])[:batch, None]
    cond = Cond(draw(batch, length, CONTEXT), mask, draw(batch, POOLED))
    return draw(batch, CHANNELS, *size), torch.tensor([3.0, 500.5, 999.0])[:batch], cond


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(params=SMALL, ids=str)
def config(request: pytest.FixtureRequest) -> DiT | UNet:
    return SMALL[request.param]


def test_starts_at_exactly_zero(config: DiT | UNet) -> None:
    y = build(config, shaken=False)(*inputs())
    assert y.shape == (3, CHANNELS * (2 if config.learned_variance else 1), 8, 8)
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("conditioning", ["adaln-zero", "adaln-single"])
def test_dit_blocks_start_as_the_identity(conditioning: str) -> None:
    backbone = build(replace(SMALL["dit"], conditioning=conditioning), shaken=False)
    x, given = torch.randn(2, 4, 32).double(), torch.randn(2, 32).double()
    if conditioning == "adaln-single":
        given = backbone.shared(given)
    for block in backbone.blocks:
        assert torch.equal(block(x, given, torch.randn(2, 5, 32).double(), None, None), x)


def test_masked_tokens_never_matter(config: DiT | UNet) -> None:
    backbone, (x, level, cond) = build(config), inputs()
    y = backbone(x, level, cond)
    for junk in (1e3, float("nan")):
        spoiled = cond.context.masked_fill(~cond.mask[..., None], junk)
        assert torch.equal(backbone(x, level, cond._replace(context=spoiled)), y)
    longer = Cond(nn.functional.pad(cond.context, (0, 0, 0, 3)), nn.functional.pad(cond.mask, (0, 3)), cond.pooled)
    torch.testing.assert_close(backbone(x, level, longer), y, rtol=0, atol=1e-10)


def test_the_caption_matters(config: DiT | UNet) -> None:
    backbone, (x, level, cond) = build(config), inputs()
    changed = cond.context.clone()
    changed[:, 0] += 1
    assert (backbone(x, level, cond._replace(context=changed)) - backbone(x, level, cond)).abs().amin(0).max() > 1e-6


def test_a_row_without_tokens_is_finite_and_blind(config: DiT | UNet) -> None:
    backbone, (x, level, cond) = build(config), inputs()
    mask = cond.mask.clone()
    mask[1] = False
    y = backbone(x, level, cond._replace(mask=mask))
    other = cond.context.clone()
    other[1] = 7.0
    assert torch.equal(backbone(x, level, cond._replace(mask=mask, context=other)), y)
    y.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in backbone.parameters())


def test_samples_do_not_see_each_other(config: DiT | UNet) -> None:
    backbone, (x, level, cond) = build(config), inputs()
    alone = [backbone(x[i : i + 1], level[i : i + 1], cond.select(slice(i, i + 1))) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), backbone(x, level, cond), rtol=0, atol=1e-10)


def test_other_sizes_and_the_refusal(config: DiT | UNet) -> None:
    backbone = build(config)
    assert backbone(*inputs((4, 12))).shape[2:] == (4, 12)
    if backbone.multiple > 1:
        with pytest.raises(ValueError, match=f"7x8 .* divisible by {backbone.multiple}"):
            backbone(*inputs((7, 8)))
    x, level, cond = inputs()
    with pytest.raises(ValueError, match="2 channels"):
        backbone(x[:, :2], level, cond)


def test_checkpointing_changes_nothing_but_what_is_kept(config: DiT | UNet) -> None:
    outcomes, kept = [], {False: 0, True: 0}
    for saving in (False, True):
        backbone = build(replace(config, gradient_checkpointing=saving))

        def keep(tensor: torch.Tensor, saving: bool = saving) -> torch.Tensor:
            kept[saving] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = backbone(*inputs())
        y.square().sum().backward()
        outcomes.append((y, {name: p.grad for name, p in backbone.named_parameters()}))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    for name, grad in outcomes[0][1].items():
        assert grad is not None, f"{name} takes no part"
        assert torch.equal(grad, outcomes[1][1][name]), name
    assert kept[True] < 0.6 * kept[False]


def test_bfloat16_autocast_sees_every_noise_level(config: DiT | UNet) -> None:
    backbone = build(config).float()
    x, _, cond = inputs()
    x, cond = torch.ones_like(x[:2]).float(), cond.select(slice(1)).expand(2).to("cpu", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = backbone(x, torch.tensor([500.0, 501.0]), cond)  # bfloat16 would round both to 500
    assert not torch.equal(y[0], y[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_draw_without_autocast(config: DiT | UNet, dtype: torch.dtype) -> None:
    """Latents, text and answer in float32; near the float32 network; and every noise level is told from the next."""
    whole, half = build(config).float(), build(config).to(dtype)
    x, level, cond = inputs()
    x, cond = x.float(), cond.to("cpu", torch.float32)
    y = half(x, level, cond)
    assert y.dtype == torch.float32
    off = (y - whole(x, level, cond)).abs().mean() / y.abs().mean()
    assert 0 < off < 0.05
    alone, told = torch.ones_like(x[:2]), cond.select(slice(1)).expand(2)
    one, next_ = half(alone, torch.tensor([500.0, 501.0], dtype=torch.float64), told)
    assert not torch.equal(one, next_)
    assert half(x.to(dtype), level, cond).dtype == dtype


def test_pooled_text_is_asked_for() -> None:
    for config in (SMALL["dit"], SMALL["unet-linear"]):
        with pytest.raises(ValueError, match="pooled = false"):
            config.build(channels=4, context_dim=8)
    with pytest.raises(ValueError, match="must be the backbone's"):
        DiT(width=32, heads=2, pooled_projection=False).build(channels=4, context_dim=8, pooled_dim=16)


@pytest.mark.parametrize(
    ("family", "wrong", "message"),
    [
        (DiT, {"width": 30, "heads": 4}, "divisible by heads"),
        (DiT, {"width": 36, "heads": 6, "position": "rope"}, "divisible by 4"),
        (DiT, {"mlp": "relu"}, "gelu, gelu-tanh, swiglu"),
        *((DiT, {name: 0}, f"{name} must be positive") for name in ("width", "depth", "heads", "patch", "mlp_ratio",
                                                                   "base_size")),
        *((UNet, {name: 0}, f"{name} must be positive") for name in ("blocks", "heads", "depth", "groups")),
        (UNet, {"head_dim": -1}, "head_dim must be in"),
        (UNet, {"channels": (320, 0)}, "channels must be positive"),
        (UNet, {"channels": (30, 64), "attention": ()}, "divisible by groups"),
        (UNet, {"attention": (4,)}, "levels 0 to 3"),
        (UNet, {"channels": (32, 96), "attention": (), "head_dim": 64}, "into heads"),
        (UNet, {"channels": ()}, "at least one level"),
        (UNet, {"channels": (30, 60), "attention": (), "groups": 2, "heads": 2, "position": True},
         "divisible by 4 at level 0, not 30"),
        (UNet, {"channels": (32, 62), "attention": (), "groups": 2, "heads": 2, "query_position": True},
         "divisible by 4 at level 1, not 62"),
    ],
)
def test_configs_refuse(family: type[DiT | UNet], wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family(**wrong)


def test_published_dit_cost() -> None:
    """6.06 G multiply-adds per sample of DiT-S/2, two operations each."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        config = DiT(mlp="gelu-tanh", text="none", pooled_projection=False, learned_variance=True)
        backbone = config.build(channels=4, context_dim=384, pooled_dim=384)
        cond = Cond(torch.empty(1, 1, 384), torch.ones(1, 1, dtype=torch.bool), torch.empty(1, 384))
        backbone(torch.empty(1, 4, 32, 32), torch.empty(1), cond)
    assert counter.get_total_flops() / 2e9 == pytest.approx(6.06, abs=0.01)


def test_stable_diffusion_count() -> None:
    with torch.device("meta"):
        assert parameters(UNet().build(channels=4, context_dim=768)) == 859_520_964


def test_sinusoid_starts_with_cosines() -> None:
    table = sinusoid(torch.tensor([0.0, 2.0]), 8)
    torch.testing.assert_close(table[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    torch.testing.assert_close(table[1], torch.cat([torch.tensor([2.0, 0.2, 0.02, 0.002]).cos(), torch.tensor([2.0, 0.2, 0.02, 0.002]).sin()]))  # fmt: skip  # noqa: E501


def test_rope_sees_only_differences_of_place() -> None:
    """q·k after turning depends on the two offsets alone (RoFormer, eq. 16, per axis)."""
    q, k = torch.randn(2, 16).double()
    cos, sin = (part.double() for part in rope_table(16, 5, 6, 5.0, torch.device("cpu")))
    turn = lambda v, place: rotate(v[None, None, None], (cos[place][None], sin[place][None])).flatten()  # noqa: E731
    at = lambda row, column: row * 6 + column  # noqa: E731
    first = turn(q, at(0, 1)) @ turn(k, at(2, 4))
    torch.testing.assert_close(first, turn(q, at(2, 2)) @ turn(k, at(4, 5)), rtol=0, atol=1e-6)
    assert abs(first - turn(q, at(0, 1)) @ turn(k, at(2, 3))) > 1e-6


def test_an_exported_transformer_takes_any_batch() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = build(SMALL["dit"])

        def forward(self, x: Tensor, level: Tensor, *cond: Tensor) -> Any:
            return self.backbone(x, level, Cond(*cond))

    network, (x, level, cond) = Plain(), inputs()
    free = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(network, (x, level, *cond[:3]), dynamic_shapes=(free, free, (free, free, free)))
    fewer = x[:2], level[:2], *cond.select(slice(2))[:3]
    assert torch.equal(program.module()(*fewer), network(*fewer))
