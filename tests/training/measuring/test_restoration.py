"""evaluate --restore: coverage against its closed forms, residuals, baselines, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from algebra import F64, normal
from PIL import Image
from torch import Tensor

from autoencoder.identity import Identity
from autoencoder.images import to_uint8, to_unit
from ldm.conditioning import Cond
from ldm.denoiser import Denoiser
from ldm.diffusion import Diffusion
from ldm.grids import Karras
from ldm.guidance import ClassifierFree
from ldm.inverse.measurement import DPSBayes
from ldm.inverse.operators import Box, Mask, Operator, measure, residual
from ldm.inverse.posterior import SplitGibbs
from ldm.noise import Noise
from ldm.pipeline import Pipeline, Sampling
from ldm.predictions import X0
from ldm.samplers import Heun
from ldm.schedules import Flow
from training.measuring.calibration import EXACT, LEVELS, Calibration, coverage, floor
from training.measuring.restoration import Bench, Score, sheet, table
from training.models.reconstructions import Fidelity
from training.pictures import charts
from training.progress import Progress

STD = 0.25  # of the pictures below


@pytest.mark.parametrize("count", [2, 3, 8, 19, 20])
def test_each_of_equal_draws_is_the_truth_in_turn(count: int) -> None:
    """Whichever of N + 1 numbers is the truth: the mean is the level, exactly, with ties and without."""
    for drawn in (normal(count + 1), (2 * normal(count + 1)).round(), torch.ones(count + 1, dtype=F64)):
        others = torch.stack([torch.cat([drawn[:k], drawn[k + 1 :]]) for k in range(count + 1)])
        held = coverage(drawn, others, LEVELS)
        torch.testing.assert_close(held.mean(1), torch.tensor(LEVELS, dtype=F64), rtol=0, atol=1e-12)


def test_of_nineteen_draws_it_is_whether_the_truth_lies_between_two_of_them() -> None:
    draws = torch.arange(1.0, EXACT + 1)
    truth = torch.tensor([0.5, 1.5, 5.5, 4.5, 10.0, 15.5, 19.5])
    held = coverage(truth, draws.expand(len(truth), -1), (0.5, 0.9)).tolist()
    assert held[0] == pytest.approx([0, 0, 1, 0, 1, 0, 0]) and held[1] == pytest.approx([0, 1, 1, 1, 1, 1, 0])
    for count in (2, 9, 19, 40):
        beyond = coverage(torch.tensor([-1.0]), torch.arange(count)[None], (0.9,)).item()
        assert beyond == pytest.approx(floor(count, 0.9), abs=1e-12) and (beyond < 1e-9) == (count >= EXACT)


@pytest.mark.parametrize(("mean", "var", "wanted"), [
    (0.8, 0.2, 0.9), (0.8, 0.05, 0.589), (0.981684, 0.124958, 0.763), (1.279976, 0.0183156, 0.250),
])  # fmt: skip
def test_coverage_of_gaussians_is_the_closed_form(mean: float, var: float, wanted: float) -> None:
    """x ~ N(0, 1), y = x + n / 2, draws N(mean y, var): the posterior, half its spread, and DPS by Bayes as an SDE and
    as an ODE. The truth less the draws' mean is N(0, (1 - mean)^2 + mean^2 / 4)."""
    off = ((1 - mean) ** 2 + mean**2 / 4) ** 0.5
    exact = 2 * NormalDist().cdf(NormalDist().inv_cdf(0.95) * var**0.5 / off) - 1
    assert exact == pytest.approx(wanted, abs=5e-4)
    x, count = normal(4000), 199
    y = x + normal(4000, seed=1) / 2
    draws = mean * y[:, None] + var**0.5 * normal(4000, count, seed=2)
    held = coverage(x, draws, (0.9,)).mean().item()
    assert held == pytest.approx(exact, abs=3 * (exact * (1 - exact) / 4000) ** 0.5 + 0.004)


def test_settled_values_are_left_out_and_told() -> None:
    """Half of each picture is black in the truth and in all draws; the rest is calibrated, save for one picture."""
    grey = (127 + 40 * normal(20, 1, 1, 8, 4)).repeat(1, EXACT + 1, 1, 1, 1)
    grey = (grey + 20 * normal(20, EXACT + 1, 1, 8, 4, seed=1)).clamp(0, 255).round().to(torch.uint8)
    whole = torch.cat([torch.zeros_like(grey), grey], dim=-1)
    counted = Calibration()
    for part in (slice(0, 13), slice(13, 20)):
        counted.add(whole[part, 0], whole[part, 1:])
    found = counted.numbers()
    assert found["unsettled"] == 0.5 and found["coverage_90"] == pytest.approx(0.9, abs=0.04)
    assert found["coverage_90_all"] == pytest.approx((found["coverage_90"] + 0.9) / 2)
    assert [level for level, _ in found["reliability"]] == list(LEVELS)
    assert found["reliability"][4][1] == found["coverage_50"] == pytest.approx(0.5, abs=0.07)
    assert found["coverage_50_error"] < 0.05
    wrong = Calibration()
    wrong.add(torch.full_like(whole[:, 0], 9), torch.zeros_like(whole[:, 1:]))
    assert wrong.numbers()["unsettled"] == 1 and wrong.numbers()["coverage_90"] == 0


@pytest.mark.parametrize("operator", [Box(factor=2), Mask(share=0.3)], ids=lambda one: one.kind)
def test_the_residual_of_the_truth_is_the_noise(operator: Operator) -> None:
    """Over what was measured: a mask's unseen pixels are no agreement."""
    x = normal(3, 3, 32, 32)
    y = measure(operator, x, 0.05, Noise.from_seeds([1, 2, 3]))
    torch.testing.assert_close(residual(operator, x, y) / 0.05, torch.ones(3, dtype=F64), rtol=0, atol=0.06)
    torch.testing.assert_close(residual(operator, x + 1, y)[0], residual(operator, x[:1] + 1, y[:1])[0])


class Backbone(torch.nn.Module):
    """x0 of data N(0, STD^2) on `flow`."""

    multiple = 1

    def forward(self, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        t = (level / 1000).to(x.dtype).view(-1, 1, 1, 1)
        return x * (1 - t) * STD**2 / (((1 - t) * STD) ** 2 + t**2)


def told(captions: Sequence[str]) -> Cond:
    return Cond(torch.zeros(len(captions), 1, 1), torch.ones(len(captions), 1, dtype=torch.bool))


@pytest.fixture
def bench() -> Bench:
    sampling = Sampling(sampler=Heun(), grid=Karras(), guidance=ClassifierFree(scale=1.0), steps=24)
    denoiser = Denoiser(Backbone(), Diffusion(schedule=Flow(), prediction=X0()))
    pipeline = Pipeline(Identity(image_channels=1).build(), denoiser, told, sampling, (8, 8))  # type: ignore[arg-type]
    return Bench(pipeline=pipeline, sampling=sampling, operator=Mask(share=1.0), sigma_y=STD / 2, samples=EXACT,
                 batch_size=100, told=Progress("restoring", thing="draw"))


def scored(bench: Bench, method: Any, pictures: int = 12) -> Score:
    pixels = to_uint8(STD * normal(pictures, 1, 8, 8).float())
    noise, score = Noise.from_seeds(range(pictures)), Score(Fidelity(None), Fidelity(None))
    y = measure(bench.operator, to_unit(pixels), bench.sigma_y, noise)
    score.add(bench, method, pixels, y, [""] * pictures, [""] * pictures, noise)
    return score


def test_split_gibbs_is_calibrated_and_bayes_with_an_ode_is_not(bench: Bench) -> None:
    """Each pixel by itself, s 1 and sigma_y 1/2 in units of s."""
    good, bad = scored(bench, SplitGibbs()), scored(bench, DPSBayes())
    numbers = {"split-gibbs": good.numbers(), "dps-bayes": bad.numbers()}
    assert numbers["split-gibbs"]["coverage_90"] == pytest.approx(0.9, abs=0.04)
    assert numbers["split-gibbs"]["coverage_50"] == pytest.approx(0.5, abs=0.06)
    assert numbers["dps-bayes"]["coverage_90"] < 0.4  # 0.25 in the limit of many steps and draws
    assert numbers["split-gibbs"]["calls"] == 24 * 8 and numbers["dps-bayes"]["calls"] == 2 * 24 - 1
    # A draw of the posterior cannot be told from the truth, so neither can its residual.
    assert numbers["split-gibbs"]["residual"] == pytest.approx(1, abs=0.05)
    assert numbers["split-gibbs"]["psnr_mean"] > numbers["split-gibbs"]["psnr"]
    assert sheet({"truth": good.shown[0]}, {"split-gibbs": good}, numbers).mode == "RGB"


def test_draws_do_not_depend_on_their_batch(bench: Bench) -> None:
    one, many = (scored(replace(bench, batch_size=size), DPSBayes(), 2).numbers() for size in (7, 100))
    assert one["psnr"] == pytest.approx(many["psnr"]) and one["coverage_90"] == pytest.approx(many["coverage_90"])


def test_a_chart_has_its_points_where_they_belong() -> None:
    chart = np.asarray(charts.unit_square({"a": [[0.0, 0.0], [0.5, 0.25], [1.0, 1.0]]}, "across", "up"))
    x, y = charts.MARGIN + charts.SIDE // 2, charts.MARGIN + charts.SIDE * 3 // 4
    assert tuple(chart[y, x]) == tuple(bytes.fromhex(charts.COLOURS[0][1:]))
    assert tuple(chart[charts.MARGIN + charts.SIDE // 2, x]) == (128, 128, 128)


Report = Callable[..., dict[str, Any]]


@pytest.fixture
def report(tmp_path: Path) -> Report:
    def called(run: Path, data: Path, *words: object) -> dict[str, Any]:
        given = ("--model", run, "--data", data, "--samples", 3, "--count", 2, "--steps", 2, "--device", "cpu")
        output = ("--overwrite", "--output", tmp_path / "out.json")
        assert tiny.call("evaluate", *given, *output, *words) == 0
        return dict(json.loads((tmp_path / "out.json").read_text()))

    return called


def test_one_table_for_several_methods(
    report: Report, grey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--restore", "box", "--operator.factor", 2, "--guidance-scale", 1, "--grid", tmp_path / "grid.png")
    words += ("--sampler", "euler")
    found = report(grey / "run", grey / "data", *words, "--method", "ddnm, split-gibbs", "--captions", "empty")
    assert list(found["restored"]) == ["ddnm", "split-gibbs"] == list(found["methods"])
    assert [found["restored"][name]["calls"] for name in found["methods"]] == [2, 16]
    assert found["operator"]["factor"] == 2 and found["captions"] == "empty" and found["pictures"] == 2
    assert list(found["beside"]) == ["truth", "autoencoder", "pseudo-inverse", "bicubic"]
    assert found["beside"]["truth"] == found["beside"]["autoencoder"] and found["beside"]["truth"]["psnr_is"] == "inf"
    assert found["beside"]["pseudo-inverse"]["residual"] == pytest.approx(0, abs=1e-4)
    assert found["beside"]["truth"]["residual"] == pytest.approx(1, abs=0.2)
    assert Image.open(tmp_path / "grid.png").height > 8 * 100 + charts.SIDE
    said = capsys.readouterr()
    assert "coverage_90" in said.out and "split-gibbs" in said.out
    assert "of 3 samples a value beyond all of them counts as 0.80" in said.err and "of scale" not in said.err


def test_in_latents_the_autoencoder_is_a_row_of_its_own(
    report: Report, denoiser: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(denoiser, shapes, "--restore", "gaussian-blur", "--guidance-scale", 3)
    assert list(found["beside"]) == ["truth", "autoencoder", "pseudo-inverse"]
    assert found["beside"]["autoencoder"]["psnr"] < 60 and list(found["restored"]) == ["pigdm"]
    assert "guidance of scale 3" in capsys.readouterr().err


MISTAKES = {  # (flags, exit code, what is said)
    "no operator": ("--restore boxx", 2, "unknown kind"),
    "no method": ("--restore box --method ddnm,ddnn", 2, "did you mean 'ddnm'"),
    "no noise": ("--restore box --sigma-y 0", 2, "--sigma-y: must be a number above 0"),
    "one sample": ("--restore box --samples 1", 2, "--samples: must be at least 2"),
    "a factor of no size": ("--restore box --operator.factor 5", 2, "not divisible by factor 5"),
    "a method of linear operators": ("--restore box --method ddrm", 2, "ddrm needs the singular values"),
    "two questions": ("--restore box --likelihood 3", 2, "not allowed with argument"),
    "an autoencoder": ("--restore box --model {autoencoder}", 4, "autoencoder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_a_next_step(
    name: str, denoiser: Path, autoencoder: Path, shapes: Path, tmp_path: Path
) -> None:
    flags, code, expected = MISTAKES[name]
    words = ["--model", denoiser, "--data", shapes, "--device", "cpu", "--count", 2, "--output", tmp_path / "out"]
    problem = tiny.refused("evaluate", *words, *flags.format(autoencoder=autoencoder).split())
    assert problem.code == code and expected in problem.what and problem.hint, problem
    assert not (tmp_path / "out").exists()


def test_the_table_by_hand() -> None:
    lines = table({"ddnm": {"psnr": 20.123456, "calls": 25}}, {"bicubic": {"psnr": 18.0}})
    assert [line.split() for line in lines] == [["psnr", "calls"], ["ddnm", "20.12", "25"], ["bicubic", "18"]]
