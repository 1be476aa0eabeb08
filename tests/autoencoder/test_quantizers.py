"""Codebooks beyond the plain one: moving averages and revival, finite scalar and lookup-free quantisation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from autoencoder import AUTOENCODERS
from autoencoder.quantizer import Quantizer
from autoencoder.scalar_quantizers import FiniteScalar, LookupFree
from autoencoder.vq import FSQ, LFQ, VQ, Quantised

F64 = torch.float64
NETWORK: dict[str, Any] = {"channels": (8, 16), "blocks": 1, "encoder_channels": 3, "groups": 4}
KINDS = {
    "vq": VQ(**NETWORK, latent_channels=2, codes=16),
    "vq-modern": VQ(**NETWORK, latent_channels=2, codes=16, normalize=True, codebook_decay=0.9, revive_every=3),
    "fsq": FSQ(**NETWORK, levels=(4, 3, 5)),
    "lfq": LFQ(**NETWORK, latent_channels=4),
}


@pytest.fixture(params=KINDS)
def config(request: pytest.FixtureRequest) -> Quantised:
    return KINDS[request.param]


def test_every_quantising_kind_is_tested() -> None:
    assert {member for member in AUTOENCODERS if issubclass(member, Quantised)} == {type(c) for c in KINDS.values()}


def test_codes_straight_through_and_round_trip(config: Quantised) -> None:
    torch.manual_seed(0)
    model = config.build()
    codebook, images = model.quantize, torch.rand(2, 3, 8, 12)
    z = model.encode(images).detach().requires_grad_()
    quantised, indices = codebook(z), codebook.indices(z)
    assert indices.shape == (2, 4, 6) and indices.min() >= 0 and indices.max() < codebook.codes
    torch.testing.assert_close(quantised, codebook.lookup(indices))
    torch.testing.assert_close(codebook(quantised.detach()), quantised)  # codes are their own codes
    upstream = torch.randn_like(quantised)
    (at_z,) = torch.autograd.grad(quantised, z, upstream)
    assert (config.kind == "vq" and config.normalize) or torch.equal(at_z, upstream)  # type: ignore[attr-defined]
    everything = torch.arange(codebook.codes).view(1, 1, -1)
    assert torch.equal(codebook.indices(codebook.lookup(everything)), everything)


def test_stage_two_sees_what_is_not_yet_quantised(config: Quantised) -> None:
    torch.manual_seed(0)
    model = config.build()
    images = torch.rand(2, 3, 8, 8)
    reconstruction, z = model(images)
    assert not torch.allclose(z, model.quantize(z), atol=1e-4)
    model.norm.set_(torch.zeros(1), torch.full((1,), 0.37))
    torch.testing.assert_close(model.decode(model.norm.latents(z, None)), reconstruction)
    assert model.norm.latents(z, None).shape[1] == model.latent_channels


def test_one_backward_trains_all_that_learns(config: Quantised) -> None:
    torch.manual_seed(0)
    model = config.build()
    images = torch.rand(2, 3, 8, 8)
    reconstruction, z = model(images)
    terms = model.regularisation(z)
    assert terms.shape == (2,)
    ((reconstruction - images).square().mean() + terms.mean()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name
        assert parameter.grad is None or parameter.grad.isfinite().all()
    assert model.encoder.conv_in.weight.grad.norm() > 0  # type: ignore[union-attr]


def modern(codes: int = 7, decay: float = 0.9, revive: int = 0) -> Quantizer:
    torch.manual_seed(0)
    q = Quantizer(codes, 3, beta=0.25, normalize=False, decay=decay, revive=revive)
    torch.nn.init.normal_(q.embedding.weight)
    if decay:
        q.sums.copy_(q.embedding.weight)
    return q


def test_moving_averages_by_hand() -> None:
    """N ← γN + (1−γ)n and m ← γm + (1−γ)Σz for two steps, one code at a time."""
    q, counts, sums = modern(), [1.0] * 7, []
    sums = [row.double() for row in q.embedding.weight.detach()]
    for step in range(2):
        z, codes = torch.randn(2, 3, 4, 5), q.embedding.weight.detach().double()
        vectors = z.movedim(1, -1).reshape(-1, 3).double()
        nearest = [int((codes - vector).square().sum(1).argmin()) for vector in vectors]
        q.adapt_(step, z, torch.arange(2), torch.zeros(7))
        for k in range(7):
            mine = [vector for vector, code in zip(vectors, nearest, strict=True) if code == k]
            counts[k] = 0.9 * counts[k] + 0.1 * len(mine)
            sums[k] = 0.9 * sums[k] + 0.1 * sum(mine, torch.zeros(3, dtype=F64))
            torch.testing.assert_close(q.embedding.weight[k].double(), sums[k] / counts[k], rtol=1e-5, atol=1e-6)


def test_moving_averages_find_the_centres() -> None:
    q, centres = modern(2), torch.tensor([[5.0, 0, 0], [0, -5.0, 0]])
    with torch.no_grad():
        q.embedding.weight.copy_(centres / 5)
    z = (centres[torch.arange(40) % 2] + 0.1 * torch.randn(40, 3)).T.reshape(1, 3, 5, 8)
    for step in range(150):
        q.adapt_(step, z, torch.zeros(1), torch.zeros(2))
    vectors = z.movedim(1, -1).reshape(-1, 3)
    means = torch.stack([vectors[:: 2].mean(0), vectors[1 :: 2].mean(0)])
    torch.testing.assert_close(q.embedding.weight.detach(), means, atol=1e-4, rtol=1e-4)


def test_an_average_that_nothing_feeds_stays_where_it_is() -> None:
    q = modern(2)
    with torch.no_grad():
        q.embedding.weight.copy_(torch.tensor([[0.0, 0, 0], [100.0, 100, 100]]))
        q.sums.copy_(q.embedding.weight)
    for step in range(2000):
        q.adapt_(step, torch.zeros(1, 3, 2, 2), torch.zeros(1), torch.zeros(2))
    torch.testing.assert_close(q.embedding.weight[1], torch.full((3,), 100.0))
    assert q.embedding.weight.isfinite().all()


def test_a_gradient_codebook_has_both_terms_and_an_averaged_one_the_commitment_alone() -> None:
    z = torch.randn(2, 3, 4, 5)
    averaged, learned = modern(), modern(decay=0.0)
    learned.embedding.weight.data.copy_(averaged.embedding.weight)
    distance = (z - averaged.lookup(averaged.indices(z))).square().flatten(1).mean(1)
    torch.testing.assert_close(averaged.terms(z), 0.25 * distance)
    torch.testing.assert_close(learned.terms(z), 1.25 * distance)
    assert not averaged.embedding.weight.requires_grad and learned.embedding.weight.requires_grad


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_two_processes_learn_what_one_does(decay: float) -> None:
    """Halves of a batch, in any order, with sums and vectors joined, move the codebook as the whole does."""
    whole, halves = modern(64, decay, 2), [modern(64, decay, 2), modern(64, decay, 2)]
    for step in range(4):
        z, uniform = torch.randn(4, 3, 2, 2), torch.rand(64, dtype=F64)
        whole.adapt_(step, z, torch.arange(4), uniform)
        shares = [torch.tensor([3, 1]), torch.tensor([0, 2])]
        joined = run_together(halves, [(step, z[slots], slots, uniform) for slots in shares])
        assert joined > 0
        for half in halves:
            for name, value in whole.state_dict().items():
                torch.testing.assert_close(half.state_dict()[name], value, msg=name)
    assert not torch.equal(whole.embedding.weight, modern(64).embedding.weight)


def run_together(codebooks: list[Quantizer], arguments: list[tuple[int, Tensor, Tensor, Tensor]]) -> int:
    """`adapt_` of several processes in one: each runs once to tell its contributions, and once with those of all."""
    said: list[list[Tensor]] = []
    for codebook, words in zip(codebooks, arguments, strict=True):
        mine: list[Tensor] = []
        kept = {name: value.clone() for name, value in codebook.state_dict().items()}

        def tell(value: Tensor, mine: list[Tensor] = mine) -> Tensor:
            mine.append(value)
            return value

        codebook.adapt_(*words, total=tell, gather=tell)
        codebook.load_state_dict(kept)
        said.append(mine)
    for codebook, words in zip(codebooks, arguments, strict=True):
        heard = iter([torch.stack(parts) for parts in zip(*said, strict=True)])
        codebook.adapt_(*words, total=lambda _, heard=heard: next(heard).sum(0),  # type: ignore[misc]
                        gather=lambda _, heard=heard: next(heard).flatten(0, 1))  # type: ignore[misc]
    return len(said[0])


def test_revival_waits_for_its_window_and_survives_a_resume() -> None:
    """Codes unused over `revive` steps become vectors of the batch; what was seen so far is in the state dict."""
    torch.manual_seed(1)
    batches = [0.1 * torch.randn(2, 3, 3, 3) for _ in range(6)]
    draws = torch.rand(6, 50, dtype=F64)

    def train(q: Quantizer, steps: range) -> Quantizer:
        for step in steps:
            q.adapt_(step, batches[step], torch.arange(2), draws[step])
        return q

    before = modern(50, 0.0, 3).embedding.weight.detach().clone()
    early = train(modern(50, 0.0, 3), range(2))
    assert torch.equal(early.embedding.weight, before)
    revived = train(early, range(2, 3)).embedding.weight
    moved = (revived != before).any(1)
    pool = batches[2].movedim(1, -1).reshape(-1, 3)
    assert moved.any() and not moved.all() and early.window.sum() == 0
    assert all((pool == row).all(1).any() for row in revived[moved])
    whole, part = train(modern(50, 0.0, 3), range(6)), train(modern(50, 0.0, 3), range(4))
    resumed = modern(50, 0.0, 3)
    resumed.load_state_dict(part.state_dict())
    assert torch.equal(train(resumed, range(4, 6)).embedding.weight, whole.embedding.weight)


def test_revival_brings_a_collapsed_codebook_back_into_use() -> None:
    q, z = modern(16, 0.9, 5), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        q.embedding.weight.add_(100)  # far from every vector: one code takes all
        q.sums.copy_(q.embedding.weight)
    assert len(q.indices(z).unique()) < 4
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        q.adapt_(step, z, torch.arange(4), torch.rand(16, generator=generator))
    assert len(q.indices(z).unique()) == 16


# Finite scalar quantisation


@pytest.mark.parametrize("levels", [(8, 6, 5), (8, 5, 5, 5), (7, 5, 5, 5, 5), (3, 4)])
def test_finite_scalar_levels(levels: tuple[int, ...]) -> None:
    """Every level of every channel is reached, nothing else, and 0 is 0."""
    q = FiniteScalar(levels)
    assert q.codes == int(torch.tensor(levels).prod())
    sweep = torch.linspace(-20, 20, 20_001).view(1, 1, -1, 1).expand(1, len(levels), -1, 1)
    z = q.prepare(sweep)
    assert z.abs().max() <= 1 + 0.5 / min(n // 2 for n in levels)
    for c, count in enumerate(levels):
        reached = (q(z)[0, c] * (count // 2)).round().unique()
        assert reached.tolist() == list(range(-(count // 2), (count + 1) // 2))
    torch.testing.assert_close(q.prepare(torch.zeros(1, len(levels), 1, 1)), torch.zeros(1, len(levels), 1, 1))
    wild = torch.full((1, len(levels), 1, 1), 50.0)  # stage two's samples are not bounded
    assert torch.equal(q.indices(wild), q.indices(q.prepare(wild)))


def test_finite_scalar_indices_by_hand() -> None:
    """Levels (3, 4): index = (first + 1) + 3·(second + 2), with halves 1 and 2."""
    q = FiniteScalar((3, 4))
    z = torch.tensor([[-1.0, -1.0], [0.2, 0.4], [1.0, 0.5], [0.6, -0.2]]).T.reshape(1, 2, 2, 2)
    assert q.indices(z).flatten().tolist() == [0, 1 + 3 * 3, 2 + 3 * 3, 2 + 3 * 2]
    assert q.terms(z).tolist() == [0]


# Lookup-free quantisation


def soft_codes(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """q(c | z) ∝ exp(−‖z − c‖²/τ) over all codes, by enumeration: (positions, 2^C), and the codes."""
    bits = z.shape[1]
    codes = torch.tensor([[1.0 if k >> c & 1 else -1.0 for c in range(bits)] for k in range(1 << bits)], dtype=z.dtype)
    vectors = z.movedim(1, -1).reshape(-1, bits)
    return torch.softmax(-torch.cdist(vectors, codes).square() / temperature, 1), codes


@pytest.mark.parametrize("bits", [1, 4, 5])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_lookup_free_entropies_by_enumeration(bits: int, temperature: float) -> None:
    torch.manual_seed(0)
    q = LookupFree(bits, beta=0.25, entropy=0.7, temperature=temperature)
    z = torch.randn(2, bits, 3, 4, dtype=F64, requires_grad=True)
    soft, codes = soft_codes(z, temperature)
    assert torch.equal(q.lookup(torch.arange(1 << bits).view(1, 1, -1))[0, :, 0].T.double(), codes)
    each = torch.special.entr(soft).sum(1).view(2, -1).mean(1)
    commitment = 0.25 * (z - z.detach().sign()).square().flatten(1).mean(1)
    expected = commitment + 0.7 * (each - torch.special.entr(soft.mean(0)).sum())
    torch.testing.assert_close(q.terms(z), expected)
    ours, theirs = (torch.autograd.grad(value.sum(), z)[0] for value in (q.terms(z), expected))
    torch.testing.assert_close(ours, theirs)


def test_lookup_free_extremes() -> None:
    """Sure and evenly used: −entropy·C·log 2. Sure and collapsed: 0. Finite gradients where probabilities vanish."""
    q = LookupFree(3, beta=0.0, entropy=1.0, temperature=0.01)
    even = q.lookup(torch.arange(8).view(1, 2, 4)).requires_grad_()
    assert q.terms(even).item() == pytest.approx(-3 * torch.tensor(2.0).log().item(), rel=1e-5)
    collapsed = torch.ones(1, 3, 2, 4, requires_grad=True)
    assert q.terms(collapsed).item() == pytest.approx(0, abs=1e-6)
    for z in (even, collapsed):
        (gradient,) = torch.autograd.grad(q.terms(z).sum(), z)
        assert gradient.isfinite().all()


def test_batch_entropy_over_two_processes_is_that_of_the_whole() -> None:
    """Value and gradient: each process sees the mean of all, and the average of their gradients is the whole's."""
    torch.manual_seed(0)
    q = LookupFree(4, beta=0.25, entropy=0.5, temperature=1.0)
    z = torch.randn(4, 4, 3, 3, dtype=F64, requires_grad=True)
    (expected,) = torch.autograd.grad(q.terms(z).mean(), z)
    told: list[Tensor] = []

    def tell(mean: Tensor) -> Tensor:
        told.append(mean)
        return mean

    for half in z.detach().chunk(2):
        q.terms(half, tell)
    everyone = torch.stack(told).mean(0)
    halves = torch.stack([q.terms(half, lambda _: everyone).mean() for half in z.chunk(2)])
    torch.testing.assert_close(halves.mean(), q.terms(z).mean())
    (actual,) = torch.autograd.grad(halves.mean(), z)
    torch.testing.assert_close(actual, expected)


def test_lookup_free_can_hold_many_codes() -> None:
    """2^18 codes at 4,096 positions: 8 GiB by enumeration."""
    q = LookupFree(18, beta=0.25, entropy=0.1, temperature=1.0)
    assert q.codes == 262_144 and q.terms(torch.randn(1, 18, 64, 64)).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (VQ, {"codebook_decay": 1.0}, "codebook_decay"),
        (VQ, {"revive_every": -1}, "revive_every"),
        (FSQ, {"levels": (8, 2)}, "levels of at least 3"),
        (FSQ, {"levels": ()}, "at least 1"),
        (LFQ, {"latent_channels": 21}, "20 at most"),
        (LFQ, {"temperature": 0.0}, "temperature"),
        (LFQ, {"encoder_channels": 0}, "at least 1"),
        (FSQ, {"channels": (48,)}, "divisible by groups"),
    ],
)
def test_bad_shapes_are_refused(kind: type[Quantised], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**change)


def test_the_nearest_codes_are_searched_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the picture, the terms and the averages; anew where z or the codes were written to, or z is another."""
    quantizer = Quantizer(16, 2, beta=0.25, normalize=True, decay=0.9)
    search, searched = Quantizer._search, []
    monkeypatch.setattr(Quantizer, "_search", lambda self, z: searched.append(z.shape) or search(self, z))
    z = torch.randn(2, 2, 4, 4)
    quantizer(z.view_as(z)), quantizer.terms(z)
    quantizer.adapt_(0, z, torch.arange(2), torch.rand(16))
    assert len(searched) == 1
    assert torch.equal(quantizer.indices(z), search(quantizer, z)) and len(searched) == 2  # the codes have moved
    z.mul_(-1)
    assert torch.equal(quantizer.indices(z), search(quantizer, z)) and len(searched) == 3
    other = z.transpose(2, 3)
    assert torch.equal(quantizer.indices(other), search(quantizer, other)) and len(searched) == 4
    weight = quantizer.embedding.weight
    weight.data = -weight.data  # as averaged weights take the place of live ones
    assert torch.equal(quantizer.indices(other), search(quantizer, other)) and len(searched) == 5
    assert copy.deepcopy(quantizer).found is None
