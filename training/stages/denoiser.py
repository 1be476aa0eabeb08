"""Stage two's gradient step and evaluation: a denoiser of frozen latents, conditioned on captions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autoencoder.precision import double_device
from ldm.backbones import Backbone
from ldm.conditioning import Cond
from ldm.diffusion import Diffusion
from ldm.image_conditions.base import without
from ldm.jumps import beside
from ldm.noise import Noise
from ldm.objectives import ALONE, LEVELS, Beside, Objective
from ldm.pipeline import Pipeline
from ldm.representation import VISION
from ldm.text import TextEncoder
from ldm.times import Places
from training.data.latents import Latents
from training.data.samples import Batch
from training.errors import DATA, as_user_error
from training.loop.stage import Stage
from training.loop.validation import CHUNK, as_many
from training.machine.processes import announce
from training.messages import warn
from training.models.captions_read import CaptionTally
from training.pictures import grids
from training.pictures.hints import all_beside
from training.progress import Progress
from training.settings.decoding import DenoiserConfig
from training.stages.captioned import Adapted, Captioned, Captions, Sampled, distinct_captions, onto, scored, together
from training.stages.prior import Drawn, load_drawn, refuse_others

if TYPE_CHECKING:
    from autoencoder.norm import LatentNorm
    from ldm.adapters import Adapter

SHOWN = 16
UNPAIRED = "{} pairs nothing: no two samples of a batch have the same condition"
OTHER_PAIRS = (
    "note: this run was begun by a version whose minibatch-ot may have paired noise over the whole batch; from here on "
    "it is paired among samples of one condition, as sampling asks"
)
VALIDATION_SEED = 1 << 40


class DenoiserStage(Stage):
    """Trains backbone (and text encoder), or an adapter, on re-sampled posteriors; drops captions for guidance."""

    tally: CaptionTally
    prior_home: Path | None = None  # where the prior pictures of the run are, if it has some
    prior: Drawn | None = None

    def __init__(
        self,
        config: DenoiserConfig,
        backbone: Backbone,
        text: TextEncoder,
        norm: LatentNorm,
        dataset: Latents,
        held_out: Latents,
        pipeline: Pipeline,
        null: Cond | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self.config, self.text, self.norm, self.pipeline, self.null = config, text, norm, pipeline, null
        self.dataset, self.held_out, self.tally = dataset, held_out, CaptionTally(text, dataset)
        learned = config.weighting.build(config.schedule), config.representation
        whole = Captioned(backbone, text, *learned, dataset.features)
        self.adapter, self.network = adapter, Adapted(adapter, whole) if adapter else whole
        self.networks: dict[str, nn.Module] = {"denoiser": self.network}
        self.averaged = self.networks if adapter else {"denoiser": whole.averaged}
        self.optimizers = {"denoiser": (["denoiser"], 1.0)}
        self.score, self.training_score = ("loss", 1.0), self.loss_of_training
        self.audit = "; evaluate --copies tells whether it repeats them"
        diffusion = Diffusion(
            schedule=config.schedule, prediction=config.prediction, learned_variance=config.backbone.learned_variance
        )
        self.objective: Objective = config.objective.build(
            diffusion=diffusion, times=config.times, weighting=config.weighting, pairing=config.pairing
        )
        self.group = math.lcm(config.objective.group, config.representation.group)
        self.seen = config.times.start()
        self.losses: list[tuple[Tensor, Tensor]] = []  # times and losses of this step, for loss-aware times
        self.paired = True  # until a batch was seen in which nothing is
        self.channels, self.frozen = self.norm.scale.numel(), [self.norm]
        # Where nothing reads the encoder's pooled vector, processes must not wait for the gradients of its projection.
        self.unused_gradients = bool(adapter) or (text.trainable and not config.backbone.pooled)

    def connect(self) -> None:
        """Every training call goes through the process wrapper; loss-aware times lie where the losses do."""
        self.forward, device = self.wrapped["denoiser"], self.accelerator.device
        if self.config.representation.weight:  # compared in steps alone, and within the wrapper
            self.forward = partial(self.forward, compares=True)
        self.network.to(device)  # the learned weighting, which no one else has moved
        self.seen = None if self.seen is None else self.seen.to(double_device(device))
        self.null = self.null and self.null.to(device)
        self.prior = load_drawn(self.prior_home) if self.prior_home else None

    def compiled_parts(self) -> list[nn.Module]:
        """The backbone alone."""
        return [self.network.backbone]

    def units(self) -> list[nn.Module]:
        """Those of the backbone."""
        return self.network.backbone.units()  # type: ignore[no-any-return, operator]

    def backward(self, batch: Batch, step: int, share: float) -> dict[str, Tensor]:
        """One micro-batch; with prior pictures, as many of them beside it, whose mean loss counts `prior.weight` times.
        """
        self.tally.note(batch)
        batch = batch._replace(extras={}) if self.prior else batch  # prior pictures have none, and nothing reads them
        parts = [self.drawn(batch, step)]
        if self.prior:
            beside = self.drawn(self.prior.batch(batch.slots), step, "prior")
            parts.append(self.answered(beside) if self.config.prior.target == "answers" else beside)
        latents, cond, draw = together(parts)
        with self.accelerator.autocast():
            # Through the process wrapper, text encoder included: it averages only what it has seen the forward pass of.
            losses = self.objective.losses(self.forward, latents, cond, draw, self.beside(step))
            own, *prior = (part.mean() for part in losses.total.chunk(len(parts)))
            loss = own + self.config.prior.weight * prior[0] if prior else own
        if self.seen is not None:
            own_ones = slice(len(batch.slots))
            self.losses.append((draw.t[own_ones], losses.seen.detach()[own_ones]))
        self.accelerator.backward(loss * share)
        if losses.parts:  # told in place of a sum that says nothing from step to step
            return {f"loss_{name}": part.detach().mean() for name, part in losses.parts.items()}
        also = {"loss_prior": prior[0].detach()} if prior else {}
        also |= {} if losses.features is None else {"loss_features": losses.features.detach().mean()}
        return {"loss": loss.detach(), **also}

    def drawn(self, batch: Batch, step: int, *purpose: str) -> Sampled:
        """What the network is to see of a batch; noise, times and dropout keyed by (seed, step, slot)."""
        slots = batch.slots.to(self.accelerator.device, non_blocking=True)
        places = self.config.train.batch_size
        key: tuple[int | str, ...] = self.config.train.seed, step, *purpose
        noise = Noise(slots).fold(*key)
        latents = self.sample(batch, noise)
        # By slot, like all that is drawn here: which captions are dropped does not depend on how the batch is split.
        # Drawn on the CPU, where captions are: on a GPU they would wait for the device to say which of them are kept.
        dropout = self.config.prior.dropout if purpose else self.config.conditioning.dropout
        keep = Noise(batch.slots).fold(*key).uniform((1,), "dropout")[:, 0] >= dropout
        vision, batch = batch.extras.get(VISION), self.shown(batch, latents, noise)
        if (lost := self.config.image.left_out(Noise(batch.slots).fold(*key))) is not None:
            batch, keep = batch._replace(extras=without(batch.extras, lost[0])), keep & ~lost[1]
        with self.accelerator.autocast():
            cond = self.condition(batch, keep)
            # Pairing asks only which conditions are equal; captions answer that before an encoder has read them.
            asked = cond.distinct() if isinstance(cond, Captions) else cond
            paired_by = self.config.pairing.labels(asked, len(latents))
            self.look_at_pairs(paired_by, len(latents))
            # A slot's place in the global batch, not in this micro-batch: stratified times cover the global batch once.
            draw = self.objective.draw(latents, noise, Places(slots % places, places), self.seen, paired_by)
        told = self.routed(self.told(cond, noise), latents, noise)
        if vision is not None:  # nothing that a sample is conditioned on
            told = beside(told, VISION, vision.to(self.accelerator.device, non_blocking=True))
        return Sampled(latents, told, draw)

    def beside(self, step: int) -> Beside:
        """What the objective may ask besides the network that learns: nothing."""
        return ALONE

    def told(self, cond: Any, noise: Noise | None) -> Any:
        """The condition as the network is told it; `noise` is a step's, none that of a validation."""
        return cond

    def routed(self, cond: Any, latents: Tensor, noise: Noise) -> Any:
        """With the scores by which tokens pass by blocks, where the backbone that learns routes them."""
        return cond if self.adapter else scored(cond, self.config.backbone, latents, noise)

    def answered(self, sampled: Sampled) -> Sampled:
        """As noisy, and their targets what the base answers without the adapter."""
        assert self.adapter is not None
        self.adapter.strength = 0.0
        with torch.no_grad(), self.accelerator.autocast():
            latents, draw = self.objective.answered(self.network, *sampled)
        self.adapter.strength = 1.0
        return Sampled(latents, sampled.cond, draw)

    def look_at_pairs(self, cond: Cond | Sequence[str] | None, batch: int) -> None:
        """Say once where the pairing of noise with data has no choice."""
        if self.paired and not self.config.pairing.pairs(cond, batch):
            self.paired = False
            announce(self.accelerator, UNPAIRED.format(self.config.pairing.kind), warn)

    def after_backward(self, step: int) -> None:
        """Loss-aware times take in the whole global batch at once, however it was split."""
        if self.seen is not None and self.losses:
            t, loss = (torch.cat(parts) for parts in zip(*self.losses, strict=True))
            self.losses.clear()
            self.seen = self.config.times.updated(self.seen, t, loss, lambda s: self.accelerator.reduce(s, "sum"))

    def state(self) -> dict[str, Any]:
        """What loss-aware times have seen, by what rule noise is paired and which are the prior pictures, where they
        are used."""
        rule = {"paired_within": "conditions"} if self.config.pairing.kind == "minibatch-ot" else {}
        rule |= {"prior": self.prior.hash} if self.prior else {}
        return rule if self.seen is None else {**rule, "seen": self.seen.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`; says where a run of an earlier version goes on by another rule."""
        if self.config.pairing.kind == "minibatch-ot" and "paired_within" not in state:
            announce(self.accelerator, OTHER_PAIRS)
        if self.prior_home and self.prior and state.get("prior") != self.prior.hash:
            refuse_others(self.prior_home)
        if self.seen is not None:
            device = double_device(self.accelerator.device)
            self.seen = torch.tensor(state["seen"], dtype=torch.float64, device=device)

    def sample(self, batch: Batch, noise: Noise) -> Tensor:
        """Normalised latents of a fresh posterior draw."""
        moments = batch.data.to(self.accelerator.device, non_blocking=True)
        shape = (moments.shape[1] // (2 if self.norm.gaussian else 1), *moments.shape[2:])
        return self.norm.latents(moments, noise.normal(shape, "posterior"))

    def shown(self, batch: Batch, latents: Tensor, noise: Noise) -> Batch:
        """The batch with the extras that its image condition makes of what is stored, on the device."""
        given, device = batch.extras.items(), self.accelerator.device
        stored = {name: extra.to(device, non_blocking=True) for name, extra in given if name != VISION}
        with as_user_error("encode again as [image] of the config asks", DATA):
            return batch._replace(extras=self.config.image.extras(latents, stored, noise))

    def condition(self, batch: Batch, keep: Tensor) -> Any:
        """The condition, with the empty caption's where `keep` is False; extras are not dropped with their captions.

        `Captioned` takes both, so that the objective need not know which.
        """
        device = self.accelerator.device
        extras = {name: extra.to(device, non_blocking=True) for name, extra in batch.extras.items()}
        if batch.text is not None and not self.text.trainable:
            assert self.null is not None
            stored = batch.text.to(device).to(device, torch.float32)  # moved first: widening waits for no host
            return stored.where(onto(keep, device), self.null)._replace(extras=extras)
        texts = [caption if kept else "" for caption, kept in zip(batch.captions, keep.tolist(), strict=True)]
        return Captions(texts, extras) if self.text.trainable else self.text(texts)._replace(extras=extras)

    def evaluate(self, folder: Path) -> dict[str, float]:
        """Un-weighted held-out loss at fixed noise levels; pictures of fixed held-out captions and seeds."""
        numbers = self.losses_of(self.held_out.chunks(self.looked_at(), CHUNK, "validating"))
        captions, extras = [caption for caption, _ in self.grid_samples()], self.grid_extras()
        with self.accelerator.autocast(), Progress("drawing", SHOWN) as told:  # these are to look at
            watch = told.by_steps(SHOWN, self.config.sample.steps)
            images = self.pipeline(captions, seeds=0, extras=extras, batch_size=SHOWN, watch=watch)
        images = all_beside(images, extras["image"]) if self.adapter and self.adapter.hint else images
        grids.save(grids.grid(images, 8, captions=captions), folder / "grid.png", {"captions": captions})
        return numbers

    def loss_of_training(self) -> float | None:
        """The same loss of as many training samples, at the same levels and noise."""
        batches = as_many(self.dataset, self.looked_at())
        return None if batches is None else self.losses_of(batches)["loss"]

    def looked_at(self) -> Sequence[int]:
        """The held-out samples of a validation."""
        return self.held_out.evenly(self.config.train.validation_size)

    def losses_of(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The mean of the un-weighted losses at fixed noise levels, no caption dropped, and each of them."""
        # Noise goes by the sample's number and the level, with seeds far from training's: every validation of every run
        # on these data meets the same noise, so that numbers differ by the weights alone, and in float32 whatever the
        # training's precision. Only the main process is here, so nothing may call a process wrapper.
        losses: dict[str, list[Tensor]] = {f"loss_t{t}": [] for t in LEVELS}
        for batch in batches:
            noise = Noise((batch.slots + VALIDATION_SEED).to(self.accelerator.device))
            latents = self.sample(batch, noise)
            whole = torch.ones(len(batch.slots), dtype=torch.bool)
            cond = self.condition(self.shown(batch, latents, noise), whole)
            for t in LEVELS:
                at = torch.full((len(latents),), t, dtype=torch.float64, device=double_device(latents.device))
                eps = noise.normal(latents.shape[1:], "eps", str(t))
                told = self.told(cond, None)
                losses[f"loss_t{t}"].append(self.objective.at(self.network, latents, told, at, eps, self.beside(0)))
        numbers = {name: torch.cat(values).mean().item() for name, values in losses.items()}
        return {"loss": sum(numbers.values()) / len(numbers), **numbers}

    def grid_samples(self) -> list[tuple[str, int]]:
        """Captions of held-out samples, of the bucket that is drawn where there are some, each with its sample."""
        return distinct_captions(self.held_out, SHOWN, self.config.sample.size)

    def grid_extras(self) -> dict[str, Tensor]:
        """What an image condition shows of the samples of the grid, and the hint of an adapter that reads one."""
        hint = self.adapter.hint if self.adapter else ""
        if self.config.image.kind == "none" and not hint:
            return {}
        drawn: list[dict[str, Tensor]] = []
        for batch in self.held_out.chunks([i for _, i in self.grid_samples()], CHUNK):
            noise = Noise((batch.slots + VALIDATION_SEED).to(self.accelerator.device))
            stored = {name: extra.to(self.accelerator.device) for name, extra in batch.extras.items()}
            drawn.append(self.config.image.drawn(self.sample(batch, noise), stored, noise))
        names = [name for name in ("image", "image_level", hint) if name in drawn[0]]
        return {name: torch.cat([extras[name] for extras in drawn]) for name in names}
