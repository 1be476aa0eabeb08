"""The settings of a run that are not models: optimiser, budget, losses, sampling. Frozen, flat, free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


def positive(owner: str, **values: float) -> None:
    """Refuse values that are not > 0. Raises ValueError naming the key."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{owner}{name}: must be > 0 (got {value})")


def fraction(owner: str, **values: float) -> None:
    """Refuse values outside [0, 1). Raises ValueError naming the key."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{owner}{name}: must lie in [0, 1) (got {value})")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW; its rate is a pure function of the step: linear warm-up, then constant, cosine or linear decay.

    `matrices` "muon": weights of linear and convolutional layers are moved by Muon instead (Jordan et al. 2024), at
    `matrix_lr` times the rate.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    matrices: Literal["adamw", "muon"] = "adamw"
    matrix_lr: float = 1.0
    momentum: float = 0.95  # of Muon
    weight_decay: float = 0.0
    warmup: int = 100
    decay: Literal["constant", "cosine", "linear"] = "cosine"
    final_lr: float = 0.0  # the end of the decay, as a fraction of lr
    clip: float = 1.0  # largest gradient norm; 0 turns clipping off

    def __post_init__(self) -> None:
        positive("", lr=self.lr, matrix_lr=self.matrix_lr)
        fraction("", momentum=self.momentum, beta1=self.betas[0], beta2=self.betas[1])
        if min(self.warmup, self.weight_decay, self.final_lr, self.clip) < 0:
            raise ValueError("warmup, weight_decay, final_lr and clip must be >= 0")


VERSION = 3  # of configs: what they mean by a key (settings/upgrading.py)


@dataclass(frozen=True, kw_only=True)
class Format:
    """Which version of the configs this is."""

    version: int = VERSION

    def __post_init__(self) -> None:
        if not 1 <= self.version <= VERSION:
            raise ValueError(f"version: this program understands 1 to {VERSION} (got {self.version}); update it")


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long, how much at once, and how often to save and look."""

    max_steps: int = 10_000
    batch_size: int = 64  # images per optimiser step, over all processes
    # Images per process and backward pass; 0 = batch_size / processes; "auto" = so too, halved where memory runs out,
    # in several processes until a size has held for 50 steps.
    micro_batch_size: int | Literal["auto"] = 0
    seed: int = 0
    # "full": processes share out weights, gradients, moments and averages, of which each holds all with "none".
    sharding: Literal["none", "full"] = "none"
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    num_workers: int = 0
    window_shards: int = 16  # shards at an address are mixed so many at a time; those of a folder all together
    flip: bool = False  # mirror half of the images, keyed by (seed, epoch, sample)
    ema: float = 0.999  # decay of the averaged weights, reached through a warm-up; 0 turns averaging off
    ema_lengths: tuple[float, ...] = ()  # power-function averages kept besides, as shares of the steps trained (EDM2)
    ema_every: int = 1000  # steps between their snapshots, of which posthoc_ema makes an average of any length
    compile: bool = False
    tf32: bool = False  # float32 products on a GPU's tensor cores, from numbers rounded to 10 bits: faster, less exact
    cudnn_benchmark: bool = False  # a GPU tries the algorithms of a convolution and takes the fastest: other last bits
    log_every: int = 20
    save_every: int = 1000
    save_async: bool = False  # write checkpoints beside the training, from a copy in the CPU's memory
    keep_last: int = 2  # checkpoints kept, besides pinned ones (that hold a file `pinned`) and the best
    keep_best: bool = True  # keep the checkpoint of the best validation, too
    spike_factor: float = 0.0  # skip a step whose gradient norm is this many times the running median; 0 = never
    sample_every: int = 1000  # pictures and validation
    validation_size: int = 512  # held-out images looked at each time, evenly over them; training ones as well

    def __post_init__(self) -> None:
        positive("", max_steps=self.max_steps, batch_size=self.batch_size, log_every=self.log_every)
        positive("", window_shards=self.window_shards)
        positive("", save_every=self.save_every, sample_every=self.sample_every)
        positive("", ema_every=self.ema_every)
        fraction("", ema=self.ema)
        if not all(0 < length <= 12**-0.5 for length in self.ema_lengths):
            raise ValueError(f"ema_lengths: each must lie in (0, {12**-0.5:.4f}] (got {list(self.ema_lengths)})")
        if self.keep_last < 2:
            raise ValueError(f"keep_last: keep at least 2 checkpoints (got {self.keep_last})")
        if self.spike_factor and self.spike_factor <= 1:
            raise ValueError(f"spike_factor: must be 0 (off) or > 1 (got {self.spike_factor})")
        micro = self.micro_batch_size if isinstance(self.micro_batch_size, int) else 0
        if min(micro, self.num_workers, self.validation_size) < 0:
            raise ValueError("micro_batch_size, num_workers and validation_size must be >= 0")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed: must lie in [0, 2^63) (got {self.seed})")
        unshared = {"compile": (True, "false"), "save_async": (True, "false"), "mixed_precision": ("fp16", "bf16"),
                    "micro_batch_size": ("auto", "a number")}  # auto: a process may not come to an exchange of parts
        for key, (value, way) in unshared.items() if self.sharding == "full" else ():
            if getattr(self, key) == value:
                raise ValueError(f"sharding: full does not go with {key} {str(value).lower()}; set {key} to {way}")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Stage one: reconstruction + LPIPS + KL + adversarial, each with its weight (0 = off).

    The discriminator learns from `discriminator_start`; its gradient reaches the decoder only from `adversarial_start`,
    rising linearly over `adversarial_ramp` steps, so that an untrained critic never touches a reconstruction.
    """

    reconstruction: Literal["l1", "l2", "charbonnier"] = "l1"
    perceptual: float = 1.0
    perceptual_net: Literal["vgg", "alex", "squeeze"] = "vgg"
    perceptual_weights: str = "standard"  # "standard", or "random": a seeded random backbone, asked for by name
    log_variance: Literal["fixed", "learned"] = "fixed"  # learned: reconstruction * exp(-s) + s, s trained too
    kl: float = 1e-6
    codebook: float = 1.0  # a quantiser's own terms, where the model has one instead of a posterior
    align: float = 0.0  # of latents with the features of the vision model given by --align-with (VA-VAE)
    align_adaptive: bool = False  # times the ratio of the gradients, decoder's over alignment's, at the latents
    align_cosine_margin: float = 0.5  # 1 - cosine that costs nothing
    align_distance_margin: float = 0.25  # difference of two positions' cosines that costs nothing
    adversarial: float = 0.5
    adversarial_loss: Literal["hinge", "non-saturating", "least-squares"] = "hinge"
    discriminator_start: int = 0
    adversarial_start: int = 1000
    adversarial_ramp: int = 1000
    plateau: float = 0.0  # > 0: start, after adversarial_start, where reconstruction falls less than this share
    plateau_steps: int = 1000  # in so many steps
    return_margin: float = 0.0  # > 0: held-out PSNR so many dB below the best brings the best checkpoint back
    return_pause: int = 1000  # steps without the adversarial gradient after a return; then it rises anew, at half
    return_limit: int = 3  # returns before the run stops
    discriminator_lr: float = 1.0  # as a multiple of optimizer.lr
    r1: float = 0.0  # gamma of the gradient penalty on real images
    r1_every: int = 1  # steps from one penalty to the next, each then so many times as strong (StyleGAN2: 16)
    lecam: float = 0.0
    augment: tuple[Literal["colour", "translation", "cutout"], ...] = ()  # what the discriminator sees (DiffAug)

    def __post_init__(self) -> None:
        weights = (self.perceptual, self.kl, self.codebook, self.align, self.adversarial, self.r1, self.lecam)
        if min(*weights, self.adversarial_ramp, self.discriminator_start, self.return_margin, self.return_limit) < 0:
            raise ValueError("loss weights, starts, ramps, return_margin and return_limit must be >= 0")
        if not (0 <= self.align_cosine_margin < 2 and 0 <= self.align_distance_margin < 2):
            raise ValueError("align_cosine_margin and align_distance_margin must lie in [0, 2)")
        fraction("", plateau=self.plateau)
        positive("", plateau_steps=self.plateau_steps, return_pause=self.return_pause, r1_every=self.r1_every)
        if self.align_adaptive and not self.align:
            raise ValueError("align_adaptive: is the weight of an alignment; set align above 0, too")
        if self.perceptual_weights not in ("standard", "random"):
            raise ValueError(
                f'perceptual_weights: must be "standard" or "random" (got "{self.perceptual_weights}"); '
                "a file is named on the command line: --lpips-weights FILE"
            )
        if self.adversarial and self.adversarial_start < self.discriminator_start:
            raise ValueError("adversarial_start must not come before discriminator_start")


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """How the caption is used in training: `dropout` is the share of captions replaced by the empty one. `size`: the
    network is told each picture's own height and width, and where it was cut (SDXL, section 2.2)."""

    dropout: float = 0.1
    size: bool = False

    def __post_init__(self) -> None:
        fraction("", dropout=self.dropout)


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Prior preservation (DreamBooth, Ruiz et al. 2023, 2208.12242): `count` pictures of the class, which the base
    draws once of `captions`, in turn, are trained on beside those given; their mean loss counts `weight` times.

    `target` "answers": not the pictures are predicted of them, but what the base predicts, noise level by noise level
    (learning without forgetting, Li & Hoiem 2016, 1606.09282). Nothing is lost on it before something is learned.
    """

    weight: float = 0.0  # 0: none are drawn
    count: int = 200
    captions: str | tuple[str, ...] = ()  # one, or several
    dropout: float = 0.1  # of their captions: what guidance moves away from is held, too
    target: Literal["pictures", "answers"] = "pictures"

    def __post_init__(self) -> None:
        positive("", count=self.count)
        fraction("", dropout=self.dropout)
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight: must be >= 0 (got {self.weight})")

    @property
    def texts(self) -> list[str]:
        """The caption of each of the pictures."""
        several = [self.captions] if isinstance(self.captions, str) else self.captions
        return [several[number % len(several)] for number in range(self.count)] if any(several) else []


@dataclass(frozen=True, kw_only=True)
class Sample:
    """How pictures are made by default: while training, and by generate where its flags are silent."""

    steps: int = 25
    size: tuple[int, int] = (0, 0)  # height and width in pixels; (0, 0) becomes those of the training pictures
    buckets: tuple[tuple[int, int], ...] = ()  # the sizes of training pictures in buckets, taken from these
    dynamic_threshold: float = 0.0  # in pixels: the quantile of |x0| that is scaled into range (Imagen: 0.995); 0 = off
    image_scale: float = 1.0  # guidance by the picture that is to be changed, with image.kind source; 1 = none

    original_size: tuple[int, int] = (0, 0)  # with conditioning.size: what a drawing is told; (0, 0) is its own size
    crop_offset: tuple[int, int] = (0, 0)  # and what was cut off above and to the left

    def __post_init__(self) -> None:
        positive("", steps=self.steps)
        if min(*self.original_size, *self.crop_offset) < 0 or (0 in self.original_size and any(self.original_size)):
            raise ValueError("original_size and crop_offset: a height and a width in pixels, of which none is below 0 "
                             f"(got {self.original_size} and {self.crop_offset})")
        if not 0 <= self.dynamic_threshold <= 1:
            raise ValueError(f"dynamic_threshold: must lie in [0, 1] (got {self.dynamic_threshold})")
        if not 0 <= self.image_scale < float("inf"):
            raise ValueError(f"image_scale: must be at least 0 (got {self.image_scale})")
