"""The work of `inspect_autoencoder`: what an autoencoder's latents and reconstructions are like."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoder.base import Autoencoder
from autoencoder.fidelity import psnr
from autoencoder.images import to_uint8, to_unit
from autoencoder.perceptual import Perceptual
from autoencoder.posterior import Posterior
from autoencoder.precision import double
from autoencoder.quantizer import code_counts, perplexity, usage
from autoencoder.regularisers import Move, equivariance_error, log_spectrum
from ldm.noise import Noise
from training.data.images import Images
from training.errors import DATA, as_user_error
from training.files import finite, write_bytes, write_json
from training.guarding import check_free, check_output, make_folder
from training.machine import memory, processes
from training.measuring.features import load_features
from training.measuring.held_out import of_one_size
from training.measuring.probe import probe
from training.messages import answer, tell
from training.models.autoencoders import autoencoder_hashes, load_autoencoder
from training.models.folders import find
from training.models.lpips import load_distance
from training.models.reconstructions import Fidelity
from training.next_step import encoding, tell_next
from training.pictures import grids, html
from training.runs.folder import versions
from training.settings.flags import check_least
from training.shards.reading import ShardSet, held_out_shards

if TYPE_CHECKING:
    import argparse

DEAD = 0.01  # standard deviation of a normalised channel's means below which it says nothing of the picture
NOISE = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)  # standard deviations of what is added to normalised latents
CLOSE = 256  # pictures of the measures that call the networks several times
WORST = 8


def inspect(args: argparse.Namespace) -> int:
    """Measure, print the main numbers, write inspection.json and inspection.html. Returns the exit code."""
    memory.keep_memory()
    since, output, device = time.perf_counter(), Path(args.output), processes.resolve(args.device)
    check_least(args, {"count": 0, "batch_size": 1, "probe_steps": 0, "probe_samples": 2})
    check_output(output)
    for file in ("inspection.json", "inspection.html"):
        check_free(output / file, args.overwrite)
    held_out = of_one_size(Images(held_out_shards(args.data)), "inspect_autoencoder")
    model = load_autoencoder(args.model, device)
    features, distance = load_features(args.features, device), load_distance(args, held_out, device)
    with as_user_error("inspect with pictures like those that it was trained on", DATA):
        study = Study(model, distance)
        study.see(held_out, args.count, args.batch_size)
        numbers = study.numbers()
        if args.probe_steps:
            tell(f"training the probe for {args.probe_steps} steps")
            train = Images(ShardSet(args.data, "train"))
            numbers["probe"] = probe(model, train, held_out, features, args.probe_steps, args.probe_samples)
    about: dict[str, Any] = {"hashes": autoencoder_hashes(model), "factor": model.factor}
    about |= {"latent_channels": model.latent_channels, "versions": versions()}
    about |= {"lpips": f"{args.lpips_net} {Path(args.lpips).name}" if args.lpips else None}
    measured = {**about, **numbers, "seconds": round(time.perf_counter() - since, 1)}
    numbers = without_words(measured)
    make_folder(output)
    write_json(output / "inspection.json", finite(measured))
    write_bytes(output / "inspection.html", page(Path(args.model).name, numbers, study.worst(held_out)).encode())
    for name, value in numbers["reconstruction"].items():
        mean, low, high = (html.cell_text(value[key]) for key in ("mean", "low", "high"))
        answer(f"{name:12} {mean} ({low} to {high})")
    tell(f"wrote {output / 'inspection.html'} and inspection.json")
    if find(args.model, "autoencoder").finished:
        tell_next(encoding(args.model, args.data, {"device": args.device}))
    return 0


class Study:
    """What is gathered of one autoencoder, batch by batch of held-out pictures."""

    def __init__(self, model: Autoencoder, distance: Perceptual | None) -> None:
        self.model, self.fidelity = model, Fidelity(distance)
        self.seen = 0
        self.powers, self.means, self.rates = Tensor(), Tensor(), Tensor()  # sums over pictures, per channel
        self.rows: dict[str, list[Tensor]] = {}  # one number per picture
        self.spectra: dict[str, list[Tensor]] = {"latents": [], "pictures": []}
        self.counts: Tensor | None = None  # of codes
        self.cells = 0  # of one picture's latents

    @torch.no_grad()
    def see(self, images: Images, count: int, size: int) -> None:
        """Measure `count` pictures, evenly over the split, all where it is 0, `size` at once."""
        device = self.model.norm.scale.device
        for batch in images.chunks(images.evenly(count), size, "measuring"):
            pixels, noise = batch.data.to(device), Noise(batch.slots.to(device))
            moments = self.model.encode(to_unit(pixels))
            self.statistics(moments, noise)
            mean = self.model.norm.mean_latents(moments)
            self.fidelity.add(to_uint8(self.model.decode(mean)), pixels)
            if self.model.quantize:
                found = code_counts(self.model.quantize.indices(moments), self.model.quantize.codes)
                self.counts = found if self.counts is None else self.counts + found
            if self.seen < CLOSE:
                self.look_closely(pixels, mean, noise)
            self.seen += len(pixels)

    def statistics(self, moments: Tensor, noise: Noise) -> None:
        """Power sums of normalised latents and of their means per channel, and the posterior's KL."""
        norm = self.model.norm
        mean = double(norm.mean_latents(moments))
        latents = double(norm.latents(moments, noise.normal(mean.shape[1:], "posterior")))
        powers = torch.stack([latents.pow(k).sum((0, 2, 3)) for k in (1, 2, 3, 4)]).cpu()
        means = torch.stack([mean.pow(k).sum((0, 2, 3)) for k in (1, 2)]).cpu()
        self.powers, self.means = (powers, means) if not self.seen else (self.powers + powers, self.means + means)
        self.cells = mean[0, 0].numel()
        if norm.gaussian:  # `kl` sums all but the first axis, which here is the channel
            logvar = double(Posterior.split(moments).logvar) - 2 * double(norm.scale).log()
            rates = Posterior(mean.transpose(0, 1), logvar.transpose(0, 1)).kl().cpu()
            self.rates = self.rates + rates if self.seen else rates

    def look_closely(self, pixels: Tensor, mean: Tensor, noise: Noise) -> None:
        """Spectra, equivariance, and what noise in the latents does to the picture."""
        height, width = mean.shape[2:]
        images = to_unit(pixels)
        for level in NOISE:
            noisy = mean + level * noise.normal(mean.shape[1:], "sensitivity", dtype=mean.dtype)
            self.note(f"noise {level:g}", psnr(to_uint8(self.model.decode(noisy)), pixels))
        self.note("turned by a quarter", equivariance_error(self.model, images, Move(height, width, 1)))
        if min(height, width) >= 2:
            self.note("half the size", equivariance_error(self.model, images, Move(height // 2, width // 2, 0)))
            self.spectra["latents"].append(log_spectrum(mean).exp().cpu())
            self.spectra["pictures"].append(
                log_spectrum(F.interpolate(images, (height, width), mode="area")).exp().cpu()
            )

    def note(self, name: str, values: Tensor) -> None:
        """Keep one number per picture (B,) under a row's name."""
        self.rows.setdefault(name, []).append(double(values).cpu())

    def numbers(self) -> dict[str, Any]:
        """Everything gathered."""
        parts = {name: interval(torch.cat(values)) for name, values in self.rows.items()}
        rows = self.channels()
        return {
            "pictures": self.seen,
            "reconstruction": {n: interval(double(v).cpu()) for n, v in self.fidelity.values().items()},
            "channels": rows,
            "dead_channels": [row["channel"] for row in rows if row["dead"]],
            "kl": sum(row["kl"] for row in rows) if self.model.norm.gaussian else None,
            "spectrum": {name: torch.cat(v).mean(0).tolist() for name, v in self.spectra.items() if v},
            "equivariance_error": {n: parts[n] for n in ("half the size", "turned by a quarter") if n in parts},
            "psnr_of_noisy_latents": {f"{level:g}": parts[f"noise {level:g}"] for level in NOISE},
            "codes": self.codes(),
        }

    def channels(self) -> list[dict[str, Any]]:
        """Moments of normalised latents per channel; `signal` is the standard deviation of the posterior's means, `kl`
        in nats per picture against N(0, 1), near to what the channel tells of it.
        """
        count = self.seen * self.cells
        mean, second, third, fourth = self.powers / count
        variance = (second - mean**2).clamp_min(0)
        tails = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        signal = (self.means[1] / count - (self.means[0] / count) ** 2).clamp_min(0).sqrt()
        return [
            {
                "channel": i,
                "mean": mean[i].item(),
                "std": variance[i].sqrt().item(),
                "kurtosis": (tails[i] / variance[i] ** 2).item() if variance[i] > 0 else None,
                "kl": self.rates[i].item() / self.seen if self.model.norm.gaussian else None,
                "signal": signal[i].item(),
                "dead": signal[i].item() < DEAD,
            }
            for i in range(len(mean))
        ]

    def codes(self) -> dict[str, Any] | None:
        """Usage and perplexity of a quantiser's codes, with how many choices they rest on."""
        if self.counts is None:
            return None
        told = {"codes": len(self.counts), "choices": int(self.counts.sum())}
        return {**told, "usage": usage(self.counts).item(), "perplexity": perplexity(self.counts).item()}

    @torch.no_grad()
    def worst(self, images: Images) -> Any:
        """The pictures of lowest PSNR, their reconstructions, and the difference."""
        chosen = self.fidelity.values()["psnr"].cpu().argsort()[:WORST].tolist()
        pixels = next(images.chunks(chosen, WORST, "")).data
        given = to_unit(pixels.to(self.model.norm.scale.device))
        ours = to_uint8(self.model(given, None)[0]).cpu()
        return grids.comparison({"input": pixels, "reconstruction": ours})


def interval(values: Tensor) -> dict[str, float]:
    """Mean of (N,) and its 95 % confidence interval, mean ± 1.96 std / √N."""
    mean = values.mean().item()
    half = 1.96 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": mean, "low": mean - half, "high": mean + half}


def without_words(value: Any) -> Any:
    """None in place of numbers that JSON does not have: the PSNR of a perfect copy, the error of a constant latent."""
    if isinstance(value, dict):
        return {key: without_words(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_words(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page(name: str, numbers: dict[str, Any], worst_picture: Any) -> str:
    """The page."""
    rows = [[key, *value.values()] for key, value in numbers["reconstruction"].items()]
    equivariance = [[key, *value.values()] for key, value in numbers["equivariance_error"].items()]
    noisy = [(float(level), value["mean"]) for level, value in numbers["psnr_of_noisy_latents"].items()]
    spectrum = {key: [(k + 1, v) for k, v in enumerate(line)] for key, line in numbers["spectrum"].items()}
    head, told = ("", "mean", "95 % from", "to"), ("hashes", "versions")
    facts = [[f"{key} {of}", what] for key in told for of, what in numbers[key].items()]
    facts += [[key, numbers[key]] for key in ("pictures", "factor", "latent_channels", "lpips", "seconds")]
    columns = list(numbers["channels"][0])
    channels = [[row[key] for key in columns] for row in numbers["channels"]]
    sections = {
        "Reconstruction": [html.table(head, rows)],
        "Worst reconstructions": [html.picture(worst_picture, "worst reconstructions")],
        "Latent channels (normalised)": [
            html.paragraph(
                f"Dead: {numbers['dead_channels'] or 'none'}. KL in all: {html.cell_text(numbers['kl'])} nats."
            ),
            html.table(columns, channels),
        ],
        "Latent spectrum": [html.chart(spectrum, "ring (cycles per shorter side)", "share of power")],
        "Equivariance error (0 = commutes)": [html.table(head, equivariance)],
        "Decoder's sensitivity": [html.chart({"PSNR": noisy}, "noise added to normalised latents (std)", "dB")],
    }
    if numbers["codes"]:
        sections["Codes"] = [html.table(("", ""), list(numbers["codes"].items()))]
    if "probe" in numbers:
        sections["Probe"] = probe_section(numbers["probe"])
    return html.page(f"Autoencoder {name}", {**sections, "Made of": [html.table(("", ""), facts)]})


def probe_section(numbers: dict[str, Any]) -> list[str]:
    """The probe's part of the page."""
    line = [(float(t), value) for t, value in numbers["loss_by_time"].items()]
    table_rows = [[key, value] for key, value in numbers.items() if key != "loss_by_time"]
    limits = (
        "A small unconditional denoiser of fixed seed and budget. Distances compare autoencoders of the same pictures, "
        "budget, features and number of samples; losses only those of one latent shape. It tells which latents are "
        "learnt soonest, not how a large denoiser fares after a long training."
    )
    return [
        html.paragraph(limits),
        html.table(("", ""), table_rows),
        html.chart({"held-out loss": line}, "t", "mean squared error of the velocity"),
    ]
