"""Likelihood by name: the trace that is asked for, and the bound of a model that learned its variance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from autoencoder.images import to_unit
from ldm.likelihood import log_likelihood
from ldm.noise import Noise
from ldm.variational import bound
from training.data.images import Images
from training.data.order import Slot
from training.models.assembly import load_pipeline
from training.models.judge import caption
from training.shards.reading import ShardSet

LEARNED = (
    "--schedule.kind ddpm-linear --schedule.steps 12 --schedule.beta_max 0.6 --prediction.kind eps --max-steps 2 "
    "--backbone.learned_variance true --sampler.kind ddpm --sampler.variance learned"
)


@pytest.fixture(scope="module")
def learned(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose variance is learned, over a table of 12 steps, and which listens to captions."""
    run = tmp_path_factory.mktemp("likelihood") / "run"
    assert tiny.call("train_denoiser", "--latents", latents, "--output", run, *tiny.DENOISER, *LEARNED.split()) == 0
    tiny.shake(run / "final")
    return run


def test_the_trace_asked_for_and_the_bound(learned: Path, shapes: Path, tmp_path: Path) -> None:
    pipeline, images, numbers = load_pipeline(learned, "cpu"), Images(ShardSet(shapes, "val")), {}
    words = ("--model", learned, "--data", shapes, "--likelihood", 1, "--seed", 5, "--device", "cpu", "--steps", 1)
    for trace, probes in (("exact", 1), ("hutchinson", 3)):
        file = tmp_path / f"{trace}.json"
        flags = ("--likelihood-trace", trace, "--likelihood-probes", probes, "--output", file)
        assert tiny.call("evaluate", *words, *flags) == 0
        numbers[trace] = json.loads(file.read_text())
    pixels = images.__getitems__([Slot(0, 0, 0)]).data
    latents = pipeline.autoencoder.norm.mean_latents(pipeline.autoencoder.encode(to_unit(pixels))).detach()
    denoise, seeds = pipeline.denoiser.bind(pipeline.text([caption(images, 0)])), Noise.from_seeds([5])
    grid = pipeline.sampling.grid(1, denoise.schedule)
    for trace, probe in (("exact", None), ("hutchinson", seeds)):
        (nats,) = log_likelihood(denoise, latents, grid, probe, 3).tolist()
        assert numbers[trace]["log_likelihood"] == pytest.approx(nats, rel=1e-4)
        assert numbers[trace]["bound_bits_per_dim"] == pytest.approx(bound(denoise, latents, seeds).item(), rel=1e-4)
    assert numbers["exact"]["likelihood_trace"] == "exact"
    assert numbers["hutchinson"]["likelihood_trace"] == "hutchinson, 3 probe(s) a picture"
    (deaf,) = log_likelihood(pipeline.denoiser.bind(pipeline.text([""])), latents, grid, None).tolist()
    assert numbers["exact"]["log_likelihood"] != pytest.approx(deaf, rel=1e-3)
    assert numbers["exact"]["log_likelihood"] != numbers["hutchinson"]["log_likelihood"]


def test_a_fixed_variance_has_no_bound_and_no_probe_is_refused(denoiser: Path, shapes: Path, tmp_path: Path) -> None:
    words = ("--model", denoiser, "--data", shapes, "--likelihood", 1, "--steps", 1, "--device", "cpu")
    assert tiny.call("evaluate", *words, "--output", tmp_path / "out.json") == 0
    assert json.loads((tmp_path / "out.json").read_text())["bound_bits_per_dim"] is None
    refused = tiny.refused("evaluate", *words, "--likelihood-probes", 0)
    assert refused.code == 2 and "--likelihood-probes: must be at least 1" in refused.what
