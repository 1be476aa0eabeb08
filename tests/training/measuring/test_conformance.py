"""The conformance command: what it prints, and how it refuses."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from autoencoder.norm import LatentNorm
from ldm.conditioning import Cond
from ldm.denoiser import Denoise, Denoiser
from ldm.diffusion import Diffusion
from ldm.exact import Isotropic
from ldm.grids import Uniform
from ldm.guidance import ClassifierFree
from ldm.noise import Noise
from ldm.pipeline import Pipeline, Sampling
from ldm.predictions import Velocity
from ldm.samplers import DDPM, SAMPLERS, Heun, Sampler, UniPC
from ldm.schedules import Flow
from training.measuring import sampler_agreement

SCRIPT = tiny.SCRIPTS / "check_samplers.py"


def cells(text: str, start: str) -> list[list[str]]:
    """The cells of the Markdown rows that start so."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(start)]


def test_the_tables_and_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--samplers", "heun,ddpm", "--processes", "flow,ddpm-cosine-zero-snr", "--grids", "karras,uniform,given"]
    assert tiny.call("check_samplers", *flags, "--steps", "16", "--output", tmp_path / "table.md") == 0
    printed = capsys.readouterr().out
    written = (tmp_path / "table.md").read_text()
    took = next(line for line in written.splitlines() if line.startswith("Took "))
    assert took.endswith("s of processor time.") and printed.endswith(f"\n{took}\n")
    assert written.replace(f"{took}\n\n", "") == printed.removesuffix(f"\n{took}\n")
    heun, ddpm = cells(written, "| heun"), cells(written, "| ddpm |")
    assert [len(row) for row in heun] == [9] * 6 + [4] and {row[1] for row in heun[:6]} == {
        "flow", "ddpm-cosine-zero-snr"}
    calls, gaussian, modes = heun[0][3], float(heun[0][6]), float(heun[0][7])
    assert calls == "31" and 0.001 < gaussian < 0.05 and 0.001 < modes < 0.05 and ddpm[0][6:8] == ["-", "-"]
    assert all(1.75 < float(order) < 2.25 for order in heun[-1][2:]) and heun[-1][1] == "2"
    # A list of equal steps of t is `uniform`.
    assert heun[1][3:] == heun[2][3:] and (heun[1][2], heun[2][2]) == ("uniform", "given")
    for pair in ("flow x eps", "ddpm-cosine-zero-snr x eps", "ddpm-cosine-zero-snr x score"):
        assert f"- {pair}: prediction '{pair.split()[-1]}' cannot tell x0 from pure noise" in printed
    assert "given" not in printed.split("## Refused")[1]


def test_it_needs_the_packages_alone(tmp_path: Path) -> None:
    """As after `pip install .`: no tests beside it, none on the path."""
    for name in ("autoencoder", "ldm", "training", "configs"):
        shutil.copytree(tiny.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    door = Path(shutil.copy(SCRIPT, tmp_path))
    command = [sys.executable, str(door), "--samplers", "heun", "--processes", "flow", "--steps", "4"]
    environment = {**tiny.ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(cells(done.stdout, "| heun")) == 2


def test_an_unknown_name_is_one_clear_sentence() -> None:
    problem = tiny.refused("check_samplers", "--samplers", "hewn")
    assert problem.code == 2 and problem.what.startswith("--samplers: unknown name 'hewn'")
    assert "dpmpp-2m" in str(problem)


def test_samplers_agree_on_a_run_or_the_command_fails(
    denoiser: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["heun", "dpmpp-2m", "unipc", "ddpm", "euler-maruyama", "restart"]
    flags = ("--model", denoiser, "--samplers", ",".join(names), "--prompt", "a red circle", "--seeds", 16)
    assert tiny.call("check_samplers", *flags, "--steps", 20) == 0
    assert [(row[0], row[1], row[4]) for row in cells(capsys.readouterr().out, "| ")[1:]] == [
        (name, "latents" if index < 3 else "moments", "yes") for index, name in enumerate(names)]
    right = UniPC.step
    monkeypatch.setattr(UniPC, "step", lambda self, denoise, x, *rest: right(self, denoise, 1.02 * x, *rest))
    stray = tiny.refused("check_samplers", *flags, "--steps", 20)
    assert stray.code == 5 and str(stray).startswith("error: unipc: further away than allowed after 20 steps")
    assert "at least 16" in str(tiny.refused("check_samplers", *flags[:-1], 15))


def exact_pipeline() -> Pipeline:
    """A pipeline whose network is the exact one for latents N(0.3, 0.5^2): its ODE and its SDE have one law."""

    class Sized:
        factor, latent_channels, norm = 1, 3, LatentNorm(3)

    def network(x: torch.Tensor, level: torch.Tensor, cond: object) -> torch.Tensor:
        ends = Isotropic(Flow(), 0.5, 0.3)(x, level.flatten()[0].double() / 1000)
        return (ends.eps - ends.x0).to(x.dtype)

    diffusion = Diffusion(schedule=Flow(), prediction=Velocity())
    plan = Sampling(sampler=Heun(), grid=Uniform(), guidance=ClassifierFree(scale=1.0), steps=4)
    told = Cond(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))
    return Pipeline(Sized(), Denoiser(network, diffusion), lambda captions: told, plan, (6, 6))  # type: ignore[arg-type]


def judged(sampler: Sampler) -> sampler_agreement.Row:
    return sampler_agreement.Bench(exact_pipeline(), "", 100, 32).judge(sampler)


def test_every_stochastic_sampler_has_the_law_of_the_exact_network() -> None:
    bench = sampler_agreement.Bench(exact_pipeline(), "", 100, 32)
    assert bench.gap < 0.15
    for sampler in (cls() for cls in SAMPLERS if not cls.rises and not cls.jumps):
        row = bench.judge(sampler)
        assert row.stochastic and (row.agrees or row.sampler == "langevin"), row


@pytest.mark.parametrize("fault", ["too much noise", "too little noise", "a shifted mean", "no noise at all"])
def test_a_broken_ddpm_is_found_out(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert judged(DDPM()).agrees
    right, factor = Noise.normal, {"too much noise": 1.15, "too little noise": 0.85, "no noise at all": 0.0}.get(fault)

    def wrong(self: DDPM, denoise: Denoise, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor, memory: object,
              noise: Noise) -> tuple[torch.Tensor, object]:
        with monkeypatch.context() as patch:
            if factor is not None:
                patch.setattr(Noise, "normal", lambda *args, **kwargs: factor * right(*args, **kwargs))
            moved, after = step(self, denoise, x, t, s, memory, noise)
        return moved + (0.004 if factor is None else 0.0), after

    step = DDPM.step
    monkeypatch.setattr(DDPM, "step", wrong)
    row = judged(DDPM())
    assert not row.agrees and row.apart > 0.06, row
