"""Every number of the inspection against what it must be for an autoencoder whose latents are known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from autoencoder.base import Autoencoder
from autoencoder.dc import DC
from autoencoder.fidelity import psnr
from autoencoder.images import to_uint8, to_unit
from autoencoder.kl import KL
from autoencoder.tiny import Tiny
from autoencoder.vq import FSQ, LFQ, VQ
from ldm.backbones import DiT
from ldm.objectives import LEVELS
from training.data.images import Images
from training.measuring.features import Features
from training.measuring.inspection import Study, interval
from training.measuring.probe import encode_all, held_out_loss, probe
from training.pictures import grids, html
from training.shards.reading import ShardSet

SMALL: dict[str, Any] = {"channels": (8, 8, 8), "blocks": 1, "groups": 4, "mid_attention": False}
KINDS = {
    "kl": KL(**SMALL),
    "vq": VQ(**SMALL, codes=16),
    "fsq": FSQ(**SMALL, levels=(3, 3)),
    "lfq": LFQ(**SMALL, latent_channels=3),
    "dc": DC(
        channels=(8, 8, 32), latent_channels=4, attention_at=(4,), encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1)
    ),
    "tiny": Tiny(width=8, encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1)),
}


class Pixels(Autoencoder):
    """Latents are the means of 4x4 pixels, beside a channel that is always 1 and, as a posterior, noise alone."""

    factor, image_channels, latent_channels = 4, 3, 4
    quantize, encoder_parts = None, ()

    def __init__(self, logvar: float | None) -> None:
        from autoencoder.norm import LatentNorm

        super().__init__()
        self.logvar, self.norm = logvar, LatentNorm(4, gaussian=logvar is not None)

    def forward(self, images: torch.Tensor, noise: Any, move: Any = None) -> Any:
        moments = self.encode(images)
        return self._decode(moments[:, :4]), moments

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        z = torch.cat([torch.nn.functional.avg_pool2d(images, 4), torch.ones_like(images[:, :1, ::4, ::4])], 1)
        return z if self.logvar is None else torch.cat([z, torch.full_like(z, self.logvar)], 1)

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(z[:, :3], scale_factor=4)

    def regularisation(self, moments: torch.Tensor, reduce: Any = None) -> torch.Tensor:
        raise NotImplementedError

    @property
    def last_layer(self) -> torch.Tensor:
        raise NotImplementedError


@pytest.fixture(scope="module")
def held_out(shapes: Path) -> Images:
    return Images(ShardSet(shapes, "val"))


def studied(model: Autoencoder, images: Images) -> tuple[Study, dict[str, Any]]:
    study = Study(model.eval(), None)
    study.see(images, 0, 7)
    return study, study.numbers()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_inspected(kind: str, held_out: Images) -> None:
    torch.manual_seed(0)
    model = KINDS[kind].build()
    study, numbers = studied(model, held_out)
    assert numbers["pictures"] == len(held_out) and len(numbers["channels"]) == model.latent_channels
    assert (numbers["kl"] is not None) == (kind == "kl") and (numbers["codes"] is not None) == bool(model.quantize)
    if numbers["codes"]:
        told = numbers["codes"]
        assert told["choices"] == 64 * len(held_out)
        assert 1 / told["codes"] <= told["usage"] <= 1 <= told["perplexity"] <= told["usage"] * told["codes"] + 1e-9
    assert numbers["psnr_of_noisy_latents"]["0"] == numbers["reconstruction"]["psnr"]
    assert all(value["mean"] > 0 for value in numbers["equivariance_error"].values())
    assert sum(numbers["spectrum"]["latents"]) == pytest.approx(1, abs=1e-4)
    assert study.worst(held_out).size[0] > 8 * 96


def test_statistics_are_those_of_the_latents(held_out: Images) -> None:
    """By hand, over all pictures at once; the channel that is always 1 is dead, and its kurtosis is not told."""
    _, numbers = studied(Pixels(None), held_out)
    images = torch.cat([encode_all(Pixels(None), held_out, len(held_out), torch.device("cpu"))]).double()
    for row, channel in zip(numbers["channels"], images.transpose(0, 1), strict=True):
        centred = channel - channel.mean()
        assert row["mean"] == pytest.approx(channel.mean().item(), abs=1e-6)
        assert row["std"] == pytest.approx(centred.square().mean().sqrt().item(), abs=1e-6)
        if row["channel"] < 3:
            wanted = (centred**4).mean() / centred.square().mean() ** 2
            assert row["kurtosis"] == pytest.approx(wanted.item(), rel=1e-4)
    assert numbers["dead_channels"] == [3] and numbers["channels"][3]["kurtosis"] is None
    # Means over whole cells turn with the picture, and the PSNR falls with every level of noise.
    assert numbers["equivariance_error"]["turned by a quarter"]["mean"] == pytest.approx(0, abs=1e-9)
    fall = [value["mean"] for value in numbers["psnr_of_noisy_latents"].values()]
    assert fall == sorted(fall, reverse=True) and fall[0] > fall[-1] + 5


def test_kl_is_that_of_the_normalised_posterior(held_out: Images) -> None:
    """N(m, 1/4) against N(0, 1) after z -> (z - 1) / 2: nats per picture, channel by channel."""
    model = Pixels(-2 * torch.tensor(2.0).log().item())
    model.norm.set_(torch.ones(4), torch.full((4,), 2.0))
    _, numbers = studied(model, held_out)
    z = encode_all(model, held_out, len(held_out), torch.device("cpu"))[:, :4].double()
    var = torch.tensor(1 / 16, dtype=torch.float64)
    wanted = 0.5 * (((z - 1) / 2) ** 2 + var - 1 - var.log()).sum((0, 2, 3)) / len(held_out)
    assert [row["kl"] for row in numbers["channels"]] == pytest.approx(wanted.tolist(), rel=1e-5)
    assert numbers["kl"] == pytest.approx(wanted.sum().item(), rel=1e-5)
    assert numbers["channels"][3]["std"] == pytest.approx(0.25, rel=0.1)  # all noise, and so dead all the same
    assert numbers["dead_channels"] == [3]


def test_the_worst_are_those_of_lowest_psnr(held_out: Images) -> None:
    """Worst first; the input, what was made of it, and the difference."""
    study, _ = studied(Pixels(None), held_out)
    pixels = next(held_out.chunks(range(len(held_out)), len(held_out))).data
    made = to_uint8(Pixels(None)(to_unit(pixels), None)[0])
    chosen = psnr(made, pixels).argsort()[:8]
    wanted = grids.comparison({"input": pixels[chosen], "reconstruction": made[chosen]})
    assert np.array_equal(np.asarray(study.worst(held_out)), np.asarray(wanted))


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = torch.randn(2000, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    held = [low["low"] <= 3 <= low["high"] for low in map(interval, draws)]
    assert 0.92 < sum(held) / len(held) < 0.97


def test_the_probe_learns_and_repeats_itself(held_out: Images, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers from the same budget; more steps, less held-out loss."""
    monkeypatch.setattr("training.measuring.probe.BATCH", 16)
    monkeypatch.setattr("training.measuring.probe.SAMPLING_STEPS", 3)
    monkeypatch.setattr("training.measuring.probe.DiT", lambda **shape: DiT(**{**shape, "depth": 1}))
    model, train = Pixels(None), Images(ShardSet(shapes, "train"))
    features = Features("means", 48, lambda pixels: torch.nn.functional.avg_pool2d(to_unit(pixels), 8).flatten(1))
    once, again = (probe(model, train, held_out, features, 2, 4) for _ in range(2))
    assert once == again and list(once["loss_by_time"]) == [str(t) for t in LEVELS]
    assert min(once["frechet"], once["frechet_reconstructed"]) > 0  # of four pictures, so in no sure order
    longer = probe(model, train, held_out, features, 25, 4)
    assert longer["loss"] < 0.9 * once["loss"]


def test_the_loss_of_a_network_that_answers_nothing(held_out: Images) -> None:
    """E (eps - x0)² = 1 + E x0² at every time."""
    moments = encode_all(Pixels(None), held_out, len(held_out), torch.device("cpu"))

    class Silent(torch.nn.Linear):
        def forward(self, x: torch.Tensor, level: Any, cond: Any) -> torch.Tensor:  # type: ignore[override]
            return torch.zeros_like(x)

    found = held_out_loss(Silent(1, 1), Pixels(None), moments)
    assert list(found.values()) == pytest.approx([1 + moments.square().mean().item()] * len(LEVELS), rel=0.1)


def test_the_door(autoencoder: Path, shapes: Path, tmp_path: Path) -> None:
    words = ("--data", shapes, "--output", tmp_path, "--device", "cpu", "--lpips", "random", "--lpips-net", "squeeze")
    asked = ("--probe-steps", 2, "--probe-samples", 4, "--count", 12)
    assert tiny.call("inspect_autoencoder", autoencoder, *words, *asked) == 0
    numbers, page = json.loads((tmp_path / "inspection.json").read_text()), (tmp_path / "inspection.html").read_text()
    assert numbers["pictures"] == 12 and numbers["probe"]["steps"] == 2 and numbers["codes"] is None
    for value in numbers["reconstruction"].values():
        assert value["low"] < value["mean"] < value["high"]
    assert numbers["hashes"] == json.loads((autoencoder / "run.json").read_text())["hashes"]
    sources = re.findall(r'(?:src|href)="(?!#)([^"]*)"', page)  # besides the links to the page's own parts
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources) and "http:" not in page
    again = ("inspect_autoencoder", autoencoder, *words[:6], "--probe-steps", 0, "--count", 3)
    problem = tiny.refused(*again)
    assert problem.code == 2 and "inspection.json already exists" in problem.what and "--overwrite" in problem.hint
    assert tiny.call(*again, "--overwrite") == 0
    assert "probe" not in json.loads((tmp_path / "inspection.json").read_text())
    assert "--count" in tiny.refused("inspect_autoencoder", autoencoder, *words, "--overwrite", "--count", -1).what


def test_a_page_escapes_what_it_is_told() -> None:
    nasty = "<script>alert('x')</script>"
    parts = [html.paragraph(nasty), html.table((nasty,), [[nasty]]), html.chart({nasty: [(0, 1)]}, nasty, nasty)]
    assert "<script" not in html.page(nasty, {nasty: parts})
    line = html.chart({"a": [(0.0, 1.0), (1.0, None), (2.0, float("nan")), (3.0, 4.0)]}, "", "")
    assert line.count("<polyline") == 1 and "nan" not in line and len(re.findall(r"\d,\d", line)) == 2
    assert html.chart({"a": []}, "", "") == ""
