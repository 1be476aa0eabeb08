"""Settings that were given and that nothing of this training reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

CRITIC = "adversarial_loss discriminator_start adversarial_start adversarial_ramp plateau plateau_steps return_margin"
CRITIC += " return_pause return_limit discriminator_lr r1 r1_every lecam augment"
LEARNING = ["loss", "latent", "discriminator", "optimizer", "train.max_steps", "train.batch_size", "train.ema"]
# Stage one: keys, and the weight that has to be above 0 for them to be read.
LOSS = {
    "adversarial": CRITIC.split(),
    "perceptual": ["perceptual_net", "perceptual_weights"],
    "align": ["align_adaptive", "align_cosine_margin", "align_distance_margin"],
    "plateau": ["plateau_steps"],
    "return_margin": ["return_pause", "return_limit"],
    "r1": ["r1_every"],
}


def without_use(config: Any, given: Iterable[str], device: str = "cuda") -> list[str]:
    """The keys among `given`, `section.key`, that this config leaves without use, each with the reason."""
    reasons: dict[str, str] = {}
    if loss := getattr(config, "loss", None):
        for weight, keys in LOSS.items():
            if not getattr(loss, weight) and not (weight == "perceptual" and config.discriminator.on_features):
                reasons |= {f"loss.{key}": f"loss.{weight} is 0" for key in keys}
        if not loss.adversarial:
            reasons["discriminator"] = "loss.adversarial is 0"
    if getattr(getattr(config, "model", None), "kind", "") == "identity":
        reasons |= dict.fromkeys(LEARNING, "an identity autoencoder learns nothing")
    if config.optimizer.decay == "constant":
        reasons["optimizer.final_lr"] = "optimizer.decay is constant"
    if (prior := getattr(config, "prior", None)) and not prior.weight:
        reasons |= {"prior": "prior.weight is 0", "prior.weight": ""}  # which may be given to say so
    if (adapter := getattr(config, "adapter", None)) and not adapter.words:
        reasons["adapter.kin"] = "adapter.words is empty"
    if objective := getattr(config, "objective", None):
        if objective.reading is None:
            reasons["student"] = f"objective.kind is {objective.kind}"
        elif objective.taught == "no":
            reasons["student.learns_from"] = f"objective.kind {objective.kind} learns from data alone"
    if not config.train.ema_lengths:
        reasons["train.ema_every"] = "train.ema_lengths is empty"
    if device == "cpu":
        asked = [key for key in ("tf32", "cudnn_benchmark") if getattr(config.train, key)]
        reasons |= {f"train.{key}": "the run is on a CPU" for key in asked}
    found = [(key, reasons.get(key, reasons.get(key.partition(".")[0]))) for key in given]
    return [f"{key}: {why}" for key, why in found if why]
