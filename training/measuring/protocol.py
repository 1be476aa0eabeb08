"""What a number was measured by: stored and printed beside it, with a hash that two comparable numbers share."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from training.measuring.held_out import CHOSEN
from training.measuring.measures import INTERVALS, MEASURES

WIDTH = 118  # characters of a line of the card
DEFINITIONS = {measure.names[0]: measure.definition for measure in MEASURES} | {
    "psnr": "mean over pictures of 10 log10(255^2 / MSE), 8 bits, all channels",
    "ssim": "mean over pictures; Gaussian window 11x11 of std 1.5, valid positions, mean over channels, 8 bits",
    "lpips": "mean over pictures of LPIPS 0.1",
    "copy_score": "share of drawn pictures nearer to a training picture than all but 5 % of held-out ones are",
    "clip_score": "mean over pictures of max(100 cos(picture, caption), 0) of CLIP embeddings",
    "obedience": "share of captions obeyed, by the judge named",
    "log_likelihood": "mean ln p of latents by the probability-flow ODE, nats",
    "bits_per_dim": "-log2 p of latents / dimensions of a latent",
    "bound_bits_per_dim": "variational bound / dimensions of a latent",
    "accuracy_elbo": "share of pictures whose own caption has the least error of eps, weighted as the bound",
    "accuracy_uniform": "share of pictures whose own caption has the least error of eps",
    "restored": "PSNR, SSIM of draws and their mean, residual / sigma_y, calibration of the draws",
    "hint_iou": "mean over pictures of the intersection over union of the hint of a drawing with the one it was given",
    "centre_error": "root mean squared error along an axis, of obeyed pictures, in thirty-seconds of the side",
    "extent_error": "root mean squared error of the bounding square's side, likewise",
    "edits": "edits of embedded shapes, judged by rules",
}
# What must be equal, beside definitions, network and data, for two numbers to be comparable.
DECIDES = (
    *("images", "pictures", "prompts", "edits", "real_pictures", "reconstructed_pictures", "training_pictures"),
    *("held_out_pictures", "training_split"),
    *("kernel_pictures", "kernel_real_pictures", "draws", "samples", "crop", "lpips_network", "latent_dims"),
    *("likelihood_trace", "latents", "eliminate", "classes", "operator", "sigma_y", "captions", "truth"),
    *("obedience_judge", "edits_judge", "hint"),
)
BASELINE = "numbers of _training: {} real pictures of the train split, about what a perfect model of as many would get"
STATED = ("settings", "adapters", "methods", "seed", "batch_size", "hashes")  # of what was measured: free to differ


def protocol(numbers: Mapping[str, Any], split: str | None) -> dict[str, Any]:
    """How `numbers` were measured, of which `comparable` must be equal for two of them to be compared.

    `split`: of the data they were measured on, if any.
    """

    keys = [f"{key}_" for key, value in numbers.items() if not isinstance(value, str | None)]
    measured = [name for name in DEFINITIONS if any(key.startswith(f"{name}_") for key in keys)]
    comparable: dict[str, Any] = {"measures": {name: DEFINITIONS[name] for name in measured}}
    comparable |= {"data": numbers.get("data"), "split": split, "chosen": CHOSEN if split else None}
    comparable |= {key: numbers[key] for key in ("network", "clip", *DECIDES) if numbers.get(key) is not None}
    stated = {key: numbers[key] for key in STATED if key in numbers}
    stated |= {"interval": INTERVALS, "versions": _versions(numbers)}
    if "frechet_training" in numbers:
        stated["baseline"] = BASELINE.format(numbers["training_pictures"])
    return {"comparable": comparable, "of_this_run": stated}


def protocol_hash(stated: Mapping[str, Any]) -> str:
    """12 digits of what is `comparable` in a protocol."""
    return hashlib.sha256(json.dumps(stated["comparable"], sort_keys=True).encode()).hexdigest()[:12]


def card(stated: Mapping[str, Any]) -> Iterator[str]:
    """A protocol as lines to print, hashes and long lists shortened; the whole is in the JSON."""
    same, own = stated["comparable"], stated["of_this_run"]
    counts = {key: value for key, value in same.items() if key in DECIDES}
    yield f"protocol {protocol_hash(stated)}: numbers of another protocol are not to be compared with these"
    if same["data"]:
        data = f"{same['split']} split, data {same['data']['index_sha256'][:12]}"
        yield from _lines("pictures", f"{data}; {same['chosen']}")
    for name in ("network", "clip"):
        if name in same:
            facts = {key: value[:12] if key == "weights" else value for key, value in same[name].items()}
            yield from _lines(name, ", ".join(f"{key} {value}" for key, value in facts.items()))
    for key, text in same["measures"].items():
        yield from _lines(key, text)
    yield from _lines("counted", ", ".join(f"{key} {_short(value)}" for key, value in counts.items()))
    if "settings" in own:
        sections = own["settings"]
        kinds = ", ".join(f"{name} {value['kind']}" for name, value in sections.items() if "kind" in value)
        scale = f"{kinds} of scale {sections['guidance'].get('scale', 1)}"
        yield from _lines("drawn by", f"{scale}, {sections['sample']['steps']} steps, seed {own['seed']}")
    for name in ("baseline", "interval"):
        if name in own:
            yield from _lines(name, own[name])
    yield from _lines("versions", ", ".join(f"{name} {value}" for name, value in own["versions"].items()))


def _versions(numbers: Mapping[str, Any]) -> dict[str, str]:
    """Those of the run, and of the package that the standard Inception comes from where it measured."""
    fidelity = {"torch-fidelity": metadata.version("torch-fidelity")} if "fid" in numbers else {}
    return {**numbers["versions"], **fidelity}


def _lines(name: str, text: str) -> list[str]:
    return textwrap.wrap(f"  {name:16} {text}", WIDTH, subsequent_indent=" " * 19, break_long_words=False)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:36] + " ..."
