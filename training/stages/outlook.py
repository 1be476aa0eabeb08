"""What a training is about to do, in numbers, before its first step: epochs, disk, and what speaks against it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from training.data.order import BucketOrder, order_of
from training.guarding import gigabytes
from training.loop.ema import averaged_parameters
from training.machine.launcher import first_process
from training.messages import note, tell, warn
from training.settings.recipes import MANY_EPOCHS, in_epochs
from training.shards.reading import holding_out
from training.stages.checks import checkpoint_bytes

if TYPE_CHECKING:
    from training.loop.stage import Stage
    from training.stages.job import Job

LEAST_HELD_OUT = 20  # pictures whose mean says something
SHOWN = 24  # pictures of a look
OFTEN = (
    "{epochs} of few {thing}, as is the rule for what is learned upon a base; where it draws nothing but them, fewer "
    "steps or a smaller weight of the adapter leave more of the base"
)


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Steps, batch and the data they meet (None: a stream, which has no count); parameters that are exported; bytes of
    a checkpoint, of all that is kept in the end, and how many checkpoints and looks that are. `left_over`: samples that
    an epoch leaves out, for they fill no batch of their bucket."""

    steps: int
    batch: int
    samples: int | None
    held_out: int | None
    parameters: int
    checkpoint: int
    checkpoints: int
    looks: int
    disk: int
    left_over: int = 0

    @property
    def epochs(self) -> float | None:
        """Passes over the data."""
        return self.steps * self.batch / (self.samples - self.left_over) if self.samples else None

    def lines(self, thing: str) -> list[str]:
        """What is told, of data called `thing`."""
        seen = f"{self.steps:,} steps of {self.batch}"
        if self.samples is None:
            passes = f"{seen} take {self.steps * self.batch:,} {thing} of a stream, which has no count: no epochs"
        else:
            passes = f"{seen} are {in_epochs(self.epochs or 0)} of {self.samples:,} {thing}"
        if self.left_over:
            passes += f"; each epoch leaves {self.left_over:,} out that fill no batch of their bucket, each time others"
        kept = f"{self.checkpoints} checkpoint{'s' * (self.checkpoints > 1)} of {gigabytes(self.checkpoint)}"
        return [passes, f"on disk about {gigabytes(self.disk)}: {kept}, final/, pictures of {self.looks} steps"]

    def facts(self) -> dict[str, Any]:
        """For run.json."""
        return {**asdict(self), "epochs": self.epochs}


def look_ahead(job: Job, stage: Stage) -> Outlook:
    """The outlook of a run whose parts are built."""
    train, stream = job.config.train, job.args.stream
    averaged = averaged_parameters(stage.averaged).values()
    size = checkpoint_bytes(stage, train)
    saves, looks = math.ceil(train.max_steps / train.save_every), 1 + math.ceil(train.max_steps / train.sample_every)
    kept = min(saves, train.keep_last + train.keep_best)
    snapshots = math.ceil(train.max_steps / train.ema_every) * len(train.ema_lengths)
    final = sum(value.nbytes for module in stage.averaged.values() for value in module.state_dict().values())
    disk = kept * size + snapshots * 4 * sum(p.numel() for p in averaged if p.requires_grad) + final
    return Outlook(
        steps=train.max_steps,
        batch=train.batch_size,
        samples=None if stream else len(job.dataset),
        held_out=None if stream or job.held_out.shards.split == "train" else len(job.held_out),
        parameters=sum(p.numel() for p in averaged),
        checkpoint=size,
        checkpoints=kept,
        looks=looks,
        left_over=left_over(job.dataset, train.batch_size),
        disk=disk + job.beside() + looks * SHOWN * math.prod(job.picture()),
    )


def left_over(dataset: Any, batch: int) -> int:
    """Samples that an epoch leaves out, where batches are of one bucket each; names the buckets that fill none."""
    order = order_of(dataset, batch, 0)
    if not isinstance(order, BucketOrder):
        return 0
    counts = zip(dataset.sizes, order.counts, strict=True)
    if (few := [f"{size[0]}x{size[1]} ({n})" for size, n in counts if n < batch]) and first_process():
        what = f"buckets of fewer samples than a batch of {batch} are never trained on: {', '.join(few)}"
        warn(f"{what}; give a smaller --batch-size, or pack into fewer buckets")
    return len(dataset) - order.batches * batch


def tell_outlook(job: Job, stage: Stage) -> dict[str, Any]:
    """Say what is ahead and warn of what speaks against it, in the process that speaks; for run.json, the numbers.
    Nothing of a model that has nothing to train."""
    if not stage.networks:
        return {}
    outlook, thing = look_ahead(job, stage), {"autoencoder": "pictures", "denoiser": "latents"}[job.stage]
    if first_process():
        tell("outlook: " + "\n         ".join(outlook.lines(thing)))
        for why in [] if job.of_few() else objections(outlook, steps_proposed=job.args.steps_proposed):
            warn(why)
        if job.of_few() and (outlook.epochs or 0) > MANY_EPOCHS:
            note(OFTEN.format(epochs=in_epochs(outlook.epochs or 0), thing=thing))
    return outlook.facts()


def objections(outlook: Outlook, *, steps_proposed: bool) -> list[str]:
    """What makes the result worse than it could be. Of many epochs nothing, where nobody asked for so many steps: the
    proposal has said it."""
    said = []
    if (outlook.epochs or 0) > MANY_EPOCHS and not steps_proposed:
        steps = max(1, MANY_EPOCHS * (outlook.samples or 0) // outlook.batch)
        said.append(
            f"{outlook.epochs:,.0f} epochs, more than {MANY_EPOCHS}: training pictures are learnt by heart rather than "
            f"what they have in common; give --max-steps {steps}, or pack more pictures"
        )
    if outlook.held_out is not None and outlook.held_out < LEAST_HELD_OUT:
        again = holding_out(LEAST_HELD_OUT, (outlook.samples or 0) + outlook.held_out)
        said.append(
            f"only {outlook.held_out} held-out pictures, fewer than {LEAST_HELD_OUT}: validation says little; "
            f"where more can be spared: {again}"
        )
    return said
