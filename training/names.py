"""The kinds of every family of the diffusion core, as --help lists them without importing torch."""

from __future__ import annotations

KINDS = {
    "schedule": "flow, gvp, vp, sub-vp, ve, edm, ddpm-linear, ddpm-scaled-linear, ddpm-cosine, ddpm-sigmoid",
    "prediction": "velocity, eps, x0, v, score, edm",
    "times": "logit-normal, uniform, log-normal, loss-aware",
    "weighting": "uniform, snr, min-snr, soft-min-snr, elbo, p2, sigmoid, edm, learned",
    "pairing": "independent, minibatch-ot",
    "grid": "uniform, quadratic, karras, exponential, uniform-logsnr, leading, linspace, trailing, given",
    "sampler": "dpmpp-2m, ddpm, ddim, euler, midpoint, heun, rk4, dpmpp-3m, dpmpp-2s, dpmpp-3s, dpmpp-sde-2m, "
    "dpmpp-sde-3m, dpm-solver-2, dpm-solver-3, unipc, deis, ipndm, pndm, lms, euler-maruyama, reverse-diffusion, "
    "predictor-corrector, langevin, heun-churn, restart, dopri5, bosh3",
    "guidance": "classifier-free, apg, cfg-zero-star, autoguidance, classifier",
}
TRAINING = ("schedule", "prediction", "times", "weighting", "pairing")
SAMPLING = ("sampler", "grid", "guidance")


def listing(sections: tuple[str, ...]) -> str:
    """One paragraph a section, as `--SECTION.kind` takes the names."""
    from textwrap import fill

    texts = (f"--{name}.kind  {KINDS[name]}" for name in sections)
    return "\n".join(fill(text, 110, subsequent_indent=" " * 8, break_on_hyphens=False) for text in texts)
