"""Operators: what every member keeps."""

from __future__ import annotations

import pytest
import torch
from algebra import F64, close, dot, normal
from torch import Tensor

from ldm.inverse.operators import (
    JPEG,
    OPERATORS,
    Bicubic,
    Box,
    Decoded,
    GaussianBlur,
    GivenMask,
    Grey,
    LinearOperator,
    Mask,
    MotionBlur,
    Operator,
    Phase,
)

SHAPE = (3, 16, 24)
CHECKERS = (torch.arange(16)[:, None] + torch.arange(24)) % 2
MORE = [
    Mask(share=0.8, box=0.5, seed=3), GivenMask(CHECKERS), Box(factor=2), Bicubic(factor=2), Grey(weights=(1, -1, 2)),
    GaussianBlur(std=0.8, taps=4), MotionBlur(taps=4), MotionBlur(taps=5, direction="vertical"), Phase(oversample=1),
]  # fmt: skip
EVERY: list[Operator] = [*(member() for member in OPERATORS), *MORE]
LINEAR = [operator for operator in EVERY if isinstance(operator, LinearOperator)]
every = pytest.mark.parametrize("operator", EVERY, ids=repr)
linear = pytest.mark.parametrize("operator", LINEAR, ids=repr)


def pictures(batch: int = 3) -> Tensor:
    return normal(batch, *SHAPE).clamp(-2, 2) / 2


def measured(operator: Operator, batch: int = 3) -> Tensor:
    """A y that is no picture's."""
    return normal(batch, *operator(pictures(1)).shape[1:], seed=1)


@linear
def test_the_adjoint_is_one(operator: LinearOperator) -> None:
    x, u = pictures().requires_grad_(), measured(operator)
    y = operator(x)
    close(dot(y, u), dot(x, operator.adjoint(u)))
    (gradient,) = torch.autograd.grad(y, x, u)
    close(operator.adjoint(u), gradient)


@linear
def test_the_pseudo_inverse_is_that_of_moore_and_penrose(operator: LinearOperator) -> None:
    x, x2, u, u2 = pictures(), pictures().flip(-1), measured(operator), measured(operator).flip(-1)
    y = operator(x)
    close(operator(operator.pinv(y)), y)
    close(operator.pinv(operator(operator.pinv(y))), operator.pinv(y))
    close(dot(operator.pinv(y), x2), dot(x, operator.pinv(operator(x2))), 1e-11)
    close(dot(operator(operator.pinv(u)), u2), dot(u, operator(operator.pinv(u2))), 1e-11)


@linear
@pytest.mark.parametrize("of_each", [False, True])
def test_solve_inverts(operator: LinearOperator, of_each: bool) -> None:
    u = measured(operator)
    scale, noise = (torch.tensor(values, dtype=F64) for values in ([0.5, 2.0, 0.0], [0.1, 0.04, 3.0]))
    if not of_each:
        scale, noise = scale[1], noise[1]
    solved = operator.solve(u, scale, noise)
    wide = [value.view(-1, 1, 1, 1) for value in (scale, noise)]
    close(wide[0] * operator(operator.adjoint(solved)) + wide[1] * solved, u)
    close(operator.solve(u, *wide), solved)
    close(operator.solve(u, 2.0, 0.04)[1], solved[1])


@linear
def test_without_noise_solve_is_the_pseudo_inverse(operator: LinearOperator) -> None:
    y = operator(pictures())
    both = torch.zeros(3, dtype=F64)
    close(operator(operator.adjoint(operator.solve(y, 2.0, 0.0))), y / 2)
    close(operator.adjoint(operator.solve(y, 2.0, both)), operator.pinv(y) / 2, 1e-9)
    mixed = operator.solve(y, 1.0, torch.tensor([0.0, 0.3, 0.0], dtype=F64))
    close(mixed[0], operator.solve(y, 1.0, 0.0)[0])
    close(mixed[1], operator.solve(y, 1.0, 0.3)[1])


@linear
def test_the_spectrum_is_the_operators(operator: LinearOperator) -> None:
    x, u = pictures(), measured(operator)
    singular, analyse, synthesise, observe = operator.spectrum(SHAPE, x)
    assert analyse(x).shape == observe(u).shape == x.shape
    assert singular.expand(SHAPE).min() >= 0
    close(synthesise(analyse(x)), x)
    close(dot(analyse(x).abs(), analyse(x).abs()), dot(x, x), 1e-10)
    close(observe(operator(x)), singular * analyse(x))
    close(synthesise(singular * observe(u)), operator.adjoint(u))
    assert not observe(u)[:, singular.expand(SHAPE) == 0].any()


@every
def test_a_sample_does_not_depend_on_its_batch(operator: Operator) -> None:
    x = pictures()
    y = operator(x)
    assert operator.domain(y) == SHAPE
    close(operator(x[1:2]), y[1:2])
    if isinstance(operator, LinearOperator):
        noise = torch.tensor([0.1, 0.2, 0.3], dtype=F64)
        close(operator.solve(y, 1.0, noise)[1:2], operator.solve(y[1:2], 1.0, noise[1:2]))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_precision_is_that_of_x(operator: Operator, dtype: torch.dtype) -> None:
    x = pictures().to(dtype)
    y = operator(x)
    assert y.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(operator(x), y)
    if isinstance(operator, LinearOperator):
        noise = torch.tensor(0.1, dtype=F64)
        assert {operator.adjoint(y).dtype, operator.pinv(y).dtype, operator.solve(y, 1.0, noise).dtype} == {dtype}
    if dtype == torch.float32 and not isinstance(operator, JPEG):
        close(y.double(), operator(x.double()), 1e-5)


@every
def test_an_operator_works_where_x_is(operator: Operator) -> None:
    x = torch.zeros(2, *SHAPE, device="meta")
    results = [y := operator(x)]
    if isinstance(operator, LinearOperator):
        results += [operator.adjoint(y), operator.pinv(y), operator.solve(y, 1.0, torch.ones(2))]
    assert {result.device for result in results} == {x.device}


@every
def test_a_first_call_without_gradients_spoils_no_later_one(operator: Operator) -> None:
    x = pictures(1).half()  # of a precision that no other test takes
    with torch.inference_mode():
        y = operator(x)
    leaf = x.clone().requires_grad_()
    assert torch.equal(operator(leaf), y)
    torch.autograd.grad(operator(leaf).sum(), leaf)


@every
def test_a_picture_without_batch_is_refused(operator: Operator) -> None:
    for call in (operator, operator.domain):
        with pytest.raises(ValueError, match=r"takes a batch \(B, C, H, W\), got shape \(3, 16, 24\)"):
            call(torch.zeros(SHAPE))


@pytest.mark.parametrize(("operator", "size", "told"), [
    (Box(factor=4), (3, 30, 32), "box: side 30 is not divisible by factor 4: take pictures of sides such as 32"),
    (Bicubic(factor=3), (3, 6, 32), "side 32 is not divisible by factor 3: take pictures of sides such as 33"),
    (Grey(), (4, 8, 8), "grey takes pictures of 3 channels, got 4"),
    (JPEG(), (3, 8, 20), "sides divisible by 8, got 3 of 20 x 8"),
    (JPEG(), (2, 8, 8), "1 or 3 channels"),
    (GivenMask(CHECKERS), (3, 16, 16), "the mask is 24 x 16 and the picture 16 x 16 pixels"),
    (Decoded(Box(), torch.nn.Identity(), (4, 8, 8)), (3, 8, 8), r"latents of \(4, 8, 8\), got \(3, 8, 8\)"),
])  # fmt: skip
def test_a_picture_that_does_not_fit_is_refused(operator: Operator, size: tuple[int, int, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        operator(torch.zeros(1, *size))


def test_a_measurement_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="grey gives pictures of 1 channel, got 3"):
        Grey().adjoint(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="multiples of oversample 2, got y of 8 x 7"):
        Phase().domain(torch.zeros(1, 3, 7, 8))
    with pytest.raises(ValueError, match="the mask is 24 x 16 and the picture 24 x 8 pixels"):
        GivenMask(CHECKERS).domain(torch.zeros(1, 3, 8, 24))


@pytest.mark.parametrize(("member", "settings", "told"), [
    (Box, {"factor": 0}, "factor must be"), (Grey, {"weights": (0.0, 0.0, 0.0)}, "grey weights must not all be 0"),
    (JPEG, {"quality": 101}, "quality must be"), (GaussianBlur, {"taps": 0}, "taps must be"),
    (MotionBlur, {"direction": "up"}, "direction must be one of"), (Mask, {"share": 1.5}, "share must be"),
    (GivenMask, {"given": torch.full((8, 8), 0.5)}, "0 .unseen. and 1 .seen."),
    (GivenMask, {"given": torch.ones(1, 8, 8)}, r"got shape \(1, 8, 8\)"),
])  # fmt: skip
def test_settings_that_make_no_operator_are_refused(member: type, settings: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        member(**settings)
