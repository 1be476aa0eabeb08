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
        self.companions = dict(self.config.objective.companions())
        for name, companion in self.companions.items():
            network = deepcopy(self.network)
            network.requires_grad_(companion.kept is None)
            if companion.kept is None:
                self.optimizers[name] = ([name], companion.rate)
                if network.text is not None and self.frozen_text:
                    network.text.requires_grad_(False)
            self.networks = {**self.networks, name: network}
        self.averaged = {"denoiser": self.network}
        if teacher is not None:
            parts = [teacher.denoiser.backbone, self.text]  # type: ignore[attr-defined]
            self.frozen = [*self.frozen, *(part for part in parts if isinstance(part, nn.Module))]

    def connect(self) -> None:
        """Also the companions, in their wrappers."""
        super().connect()
        self.asked = {name: self.wrapped[name] for name in self.companions}

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

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        """Also what companions keep of themselves."""
        super().after_backward(step)
        for name, companion in self.companions.items():
            if companion.kept is not None and (share := companion.kept(step, self.config.train.max_steps)) < 1:
                own, learning = self.networks[name].parameters(), self.network.parameters()
                torch._foreach_lerp_(list(own), [p.detach() for p in learning], 1 - share)
