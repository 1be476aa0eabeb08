"""Training a classifier of captions: a small convolutional network by cross-entropy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.noise import Noise
from training.data.order import DataOrder
from training.data.samples import Images
from training.errors import DATA, UserError
from training.files import save_tensors, write_json
from training.loop.optim import adamw, learning_rate, set_learning_rate
from training.machine import memory, processes
from training.models.judge import Classifier, caption
from training.settings.sections import Optimizer
from training.shards.reading import ShardSet
from training.shards.remote import located

if TYPE_CHECKING:
    import argparse


def train_classifier(args: argparse.Namespace) -> int:
    """Train on the real training pictures alone, measure on held-out ones, store {config.json, model.safetensors}."""
    output = Path(args.output)
    if (output / "model.safetensors").exists():
        raise UserError(f"{output} already holds a classifier", hint="choose another --output")
    device = processes.resolve(args.device)
    memory.keep_memory()
    data = located(args.data, args.cache_dir, args.cache_size)
    train, held_out = Images(ShardSet(data, "train")), Images(ShardSet(data, "val"))
    names = [caption(train, i) for i in range(len(train))]
    classes = tuple(sorted(set(names)))
    if not 2 <= len(classes) <= 1000:
        raise UserError(
            f"{data}: {len(classes)} different captions cannot be classes",
            hint="a classifier needs 2 to 1000 of them",
            code=DATA,
        )
    torch.manual_seed(args.seed)
    model = Classifier(classes, args.width).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    _fit(model, train, torch.tensor([classes.index(n) for n in names]), args)
    right = accuracy(model, held_out)
    output.mkdir(parents=True, exist_ok=True)
    save_tensors(output / "model.safetensors", model.state_dict())
    write_json(
        output / "config.json",
        {"classes": list(classes), "width": args.width, "seed": args.seed, "accuracy": right, "images": len(held_out)},
    )
    print(f"classifier: {right:.2%} of {len(held_out):,} held-out pictures named right -> {output}", file=sys.stderr)
    return 0


def _fit(model: Classifier, train: Images, labels: Tensor, args: argparse.Namespace) -> None:
    device = next(model.parameters()).device
    settings = Optimizer(lr=2e-3, betas=(0.9, 0.99), weight_decay=0.05, warmup=100, decay="cosine")
    optimizer = adamw(settings, [model])
    order = DataOrder(len(train), args.batch_size, args.seed, (0, 0), *train.shards.windows)
    steps = args.epochs * len(train) // args.batch_size
    model.train()
    for step in range(steps):
        slots = order.at(step, 0, args.batch_size)
        pixels = augment(
            train.__getitems__(slots).data.to(device), Noise(torch.tensor([s.slot for s in slots])).fold(args.seed)
        )
        set_learning_rate(optimizer, learning_rate(settings, step, steps))
        loss = F.cross_entropy(model(pixels), labels[[s.index for s in slots]].to(device), label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"classifier step {step + 1}/{steps}  loss {loss.item():.4f}", file=sys.stderr)
    model.eval()


def augment(pixels: Tensor, noise: Noise) -> Tensor:
    """Shifts of up to two pixels and mirror images, keyed by slot."""
    u = noise.uniform((3,), "augment").to(pixels.device)
    height, width = pixels.shape[-2:]
    down, right = (u[:, :1] * 5 - 2).floor().long(), (u[:, 1:2] * 5 - 2).floor().long()
    rows = (down + torch.arange(height, device=u.device)).clamp(0, height - 1)
    columns = (right + torch.arange(width, device=u.device)).clamp(0, width - 1)
    columns = torch.where(u[:, 2:] < 0.5, columns.flip(1), columns)
    batch = torch.arange(len(pixels), device=u.device)[:, None, None]
    return pixels.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(model: Classifier, images: Images) -> float:
    """The share of packed pictures whose caption the classifier names."""
    device, right = next(model.parameters()).device, 0
    for batch in images.chunks(range(len(images)), 250):
        answers = model(batch.data.to(device)).argmax(1).tolist()
        right += sum(model.classes[a] == caption(images, i) for a, i in zip(answers, batch.slots.tolist(), strict=True))
    return right / len(images)
