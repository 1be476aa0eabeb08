"""The gradient step of a few-step model: of one that learns from a frozen teacher, or from data alone."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from ldm.conditioning import Cond
from ldm.jumps import SCALE, beside
from ldm.noise import Noise
from ldm.objectives import Beside
from ldm.teacher import Teacher
from training.data.samples import Batch
from training.stages.denoiser import DenoiserStage


class FewStepStage(DenoiserStage):
    """Trains a backbone to jump, with the companions that its objective asks for beside it.

    With a `teacher` the text encoder is its own and stays as it is: captions are encoded once, for both.
    """

    def __init__(self, *args: Any, teacher: Teacher | None = None, guided: float = 1.0) -> None:
        super().__init__(*args)
        self.teacher, self.guided = teacher, guided  # the scale at which a validation asks, where it is told one
        self.frozen_text = not any(p.requires_grad for p in self.text.parameters())
        self.unused_gradients = self.unused_gradients and not self.frozen_text
        self.companions = dict(self.config.objective.companions())
        for name, companion in self.companions.items():
            network = deepcopy(self.network).requires_grad_(companion.kept is None)
            if self.frozen_text:
                network.text = None  # captions are encoded before
            if companion.kept is None:
                self.optimizers[name] = ([name], companion.rate)
            self.networks = {**self.networks, name: network}
        self.averaged = {"denoiser": self.network}
        if teacher is not None:
            parts = [teacher.denoiser.backbone, self.text]  # type: ignore[attr-defined]
            self.frozen = [*self.frozen, *(part for part in parts if isinstance(part, nn.Module))]

    def connect(self) -> None:
        """Also the companions, in their wrappers; they begin with the weights that the network has been given since."""
        super().connect()
        self.asked = {name: self.wrapped[name] for name in self.companions}
        given = self.network.state_dict()
        for name in self.companions:
            own = self.networks[name]
            own.load_state_dict({key: given[key] for key in own.state_dict()})

    def beside(self, step: int) -> Beside:
        """Teacher, companions and the bare network, in a step of all."""
        return Beside(step, self.config.train.max_steps, self.network, self.asked, self.teacher)

    def condition(self, batch: Batch, keep: torch.Tensor) -> Any:
        """Encoded here where the text encoder does not learn, once for all networks."""
        cond = super().condition(batch, keep)
        if isinstance(cond, Cond) or not self.frozen_text:
            return cond
        with torch.no_grad():
            return self.text(cond.texts)._replace(extras=cond.extras)

    def told(self, cond: Any, noise: Noise | None) -> Any:
        """With a guidance scale, uniform in its range, where the student is told one."""
        if not self.config.student.embedded:
            return cond
        count = len(cond.mask) if isinstance(cond, Cond) else len(cond.texts)
        low, high = self.config.student.scales
        scale = torch.full((count,), self.guided, device=self.accelerator.device)
        if noise is not None:
            scale = (low + (high - low) * noise.uniform((), SCALE)).to(scale)
        return beside(cond, SCALE, scale)

    def routed(self, cond: Any, latents: torch.Tensor, noise: Noise) -> Any:
        """A student learns with all tokens, as its teacher answers."""
        return cond

    @torch.no_grad()
    def after_step(self, step: int, *, taken: bool) -> None:
        """Companions as the next step asks them. A step that was skipped moves none, but where one becomes a copy: a
        plan that says so of the next step says it of no other."""
        super().after_step(step, taken=taken)
        learning = dict(self.network.named_parameters())
        for name, companion in self.companions.items():
            share = 1.0 if companion.kept is None else companion.kept(step + 1, self.config.train.max_steps)
            if share < 1 and (taken or share == 0):
                own = dict(self.networks[name].named_parameters())
                torch._foreach_lerp_(list(own.values()), [learning[key].detach() for key in own], 1 - share)
