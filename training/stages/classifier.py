"""Training a classifier of captions: a small convolutional network by cross-entropy, through the one loop.

loss = mean over the batch of -sum_c q_c log p_c, with q = 0.95 on the caption's class and 0.05 spread over all.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.noise import Noise
from training.data.images import Images
from training.data.samples import Batch
from training.errors import DATA, UserError
from training.files import write_json
from training.guarding import check_free
from training.loop.short_run import short_run
from training.loop.stage import StatelessStage
from training.machine import processes
from training.messages import tell
from training.models.judge import Classifier, caption
from training.settings.sections import Optimizer
from training.shards.reading import ShardSet, held_out_shards
from training.shards.remote import open_address
from training.tensors import save_tensors

if TYPE_CHECKING:
    import argparse


def train_classifier(args: argparse.Namespace) -> int:
    """Train on the real training pictures alone, measure on held-out ones, store {config.json, model.safetensors}."""
    output = Path(args.output)
    if (output / "model.safetensors").exists():
        raise UserError(f"{output} already holds a classifier", hint="choose another --output")
    check_free(output / "config.json", None)
    device = processes.resolve(args.device)
    # Each shard is fetched when it is read: the cache may be smaller than the windows of the order.
    data = open_address(args.data, args.cache_dir, args.cache_size, prefetch=False)
    train, held_out = Images(ShardSet(data, "train")), Images(held_out_shards(data, at_least="test"))
    names = [caption(train, i) for i in range(len(train))]
    classes = tuple(sorted(set(names)))
    if not 2 <= len(classes) <= 1000:
        raise UserError(
            f"{data}: {len(classes)} different captions cannot be classes",
            hint="a classifier needs 2 to 1000 of them",
            code=DATA,
        )
    torch.manual_seed(args.seed)
    model = Classifier(classes, args.width, args.kind)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    labels = torch.tensor([classes.index(n) for n in names])
    stage = ClassifierStage(model, train, labels, held_out, args.seed)
    steps = max(1, args.epochs * len(train) // args.batch_size)
    share = fit(stage, output, steps, args.batch_size, args.device)
    save_tensors(output / "model.safetensors", model.state_dict())
    shape = {"classes": list(classes), "width": args.width, "kind": args.kind}
    write_json(output / "config.json", {**shape, "seed": args.seed, "accuracy": share, "images": len(held_out)})
    tell(f"classifier: {share:.2%} of {len(held_out):,} held-out pictures named right -> {output}")
    return 0


class ClassifierStage(StatelessStage):
    """Cross-entropy with smoothed labels of pictures moved by up to two pixels and mirrored."""

    dataset: Images

    def __init__(self, model: Classifier, train: Images, labels: Tensor, held_out: Images, seed: int) -> None:
        self.model, self.dataset, self.labels, self.held_out, self.seed = model, train, labels, held_out, seed
        self.networks: dict[str, nn.Module] = {"classifier": model}
        self.averaged, self.optimizers = self.networks, {"classifier": (["classifier"], 1.0)}
        self.score = ("accuracy", -1.0)
        self.random = torch.get_rng_state()

    def connect(self) -> None:
        """Every training call goes through the process wrapper; labels lie where the logits do."""
        self.forward, self.labels = self.wrapped["classifier"], self.labels.to(self.accelerator.device)

    def compiled_parts(self) -> tuple[nn.Module, ...]:
        """None: its settings never ask for it."""
        return ()

    def backward(self, batch: Batch, step: int, share: float) -> dict[str, Tensor]:
        """One micro-batch, its augmentation keyed by slot."""
        if step == 0:  # dropout draws on from where the seed's weights ended, whatever else has drawn since
            torch.set_rng_state(self.random)
        self.model.train()
        pixels = augment(batch.data.to(self.accelerator.device), Noise(batch.slots).fold(self.seed))
        loss = F.cross_entropy(self.forward(pixels), self.labels[list(batch.indices)], label_smoothing=0.05)
        self.accelerator.backward(loss * share)
        return {"loss": loss.detach()}

    def evaluate(self, folder: Path) -> dict[str, float]:
        """The share of held-out pictures named right; leaves the model in eval mode, as it is stored."""
        self.model.eval()
        return {"accuracy": accuracy(self.model, self.held_out)}


def fit(stage: ClassifierStage, run: Path, steps: int, batch_size: int, device: str) -> float:
    """Train in the folder `run`; returns the accuracy at the end."""
    settings = Optimizer(lr=2e-3, betas=(0.9, 0.99), weight_decay=0.05, warmup=100, decay="cosine", clip=0.0)
    accelerator = processes.start(device)
    return -short_run(stage, settings, accelerator, run, steps=steps, batch_size=batch_size, seed=stage.seed)


def augment(pixels: Tensor, noise: Noise) -> Tensor:
    """Shifts of up to two pixels and mirror images, keyed by slot."""
    u = noise.uniform((3,), "augment")
    height, width = pixels.shape[-2:]
    down, right = (u[:, :1] * 5 - 2).floor().long(), (u[:, 1:2] * 5 - 2).floor().long()
    rows = (down + torch.arange(height, device=u.device)).clamp(0, height - 1)
    columns = (right + torch.arange(width, device=u.device)).clamp(0, width - 1)
    columns = torch.where(u[:, 2:] < 0.5, columns.flip(1), columns)
    batch = torch.arange(len(pixels), device=u.device)[:, None, None]
    places = (place.to(pixels.device) for place in (batch, rows[:, :, None], columns[:, None, :]))
    return pixels.permute(0, 2, 3, 1)[*places].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(model: Classifier, images: Images) -> float:
    """The share of packed pictures whose caption the classifier names."""
    device, right = next(model.parameters()).device, 0
    for batch in images.chunks(range(len(images)), 250, "measuring"):
        answers = model(batch.data.to(device)).argmax(1).tolist()
        right += sum(model.classes[a] == caption(images, i) for a, i in zip(answers, batch.slots.tolist(), strict=True))
    return right / len(images)
