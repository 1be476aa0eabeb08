"""A plan as lines for people: each number with how it is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from training.guarding import gigabytes
from training.messages import per_second, roughly
from training.settings.recipes import in_epochs

Facts = Mapping[str, Any]
UNITS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
THINGS = {"autoencoder": "pictures", "denoiser": "latents"}


def lines(facts: Facts) -> Iterator[str]:
    """All of them."""
    processes = facts["processes"]
    alike = f"{processes} processes are assumed" if processes > 1 else "1 process"
    split = f"{facts['batch']} a step as {facts['accumulation']} micro-batch(es) of {facts['micro_batch']}"
    yield f"plan: {facts['stage']}, config {facts['config']}, on {facts['device']}: {split}, {alike}"
    yield from _parameters(facts["parameters"])
    flops = facts["flops"]
    yield (f"compute (counted; a multiply-add is 2): {_flops(flops['each'])} an image, forward and backward; "
           f"{_flops(flops['training'])} in all")
    yield from _memory(facts["memory"])
    yield from _choices(facts)
    yield from _disk(facts)
    yield from _time(facts)


def _parameters(known: Facts) -> Iterator[str]:
    yield f"parameters (counted): {known['trainable']:,} learn, {known['frozen']:,} are frozen"
    for name, (learning, frozen) in known["parts"].items():
        said = [f"{learning:,}"] * bool(learning) + [f"{frozen:,} frozen"] * bool(frozen)
        yield f"  {name:30} {', '.join(said)}"


def _flops(count: float) -> str:
    size, unit = next((pair for pair in UNITS if count >= pair[0]), UNITS[-1])
    return f"{count / size:.3g} {unit}"


def _memory(known: Facts) -> Iterator[str]:
    yield f"memory (predicted from steps of two smaller micro-batches): {_gib(known['predicted'])} a process"
    for name, size in known["parts"].items():
        how = ", computed" if name == "several processes" else ""
        yield f"  {name:30} {_gib(size)}{how}"
    if "measured" in known:
        off = known["alone"] / known["measured"] - 1
        of = "" if known["alone"] == known["predicted"] else f", {_gib(known['alone'])} predicted of one process"
        yield f"  {'measured peak of the trial':30} {_gib(known['measured'])}{of}: the prediction is {off:+.1%} off"
    elif known["alone"] > known["machine"]:
        yield f"  not tried: this machine has {_gib(known['machine'])}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.3f} GiB"


def _choices(facts: Facts) -> Iterator[str]:
    rows = facts["choices"]
    yield f"micro-batches in {_gib(facts['memory']['given'])} (predicted; fits: with 10 % to spare)"
    for row in rows:
        with_it = "with gradient checkpointing" if row["checkpointing"] else "as it is"
        yield f"  {row['micro_batch']:>6} {with_it:28} {_gib(row['bytes'])}{'  fits' * row['fits']}"
    yield f"flags: {' '.join(facts['flags']) or 'none fits: a smaller model, or --mixed-precision bf16'}"


def _disk(facts: Facts) -> Iterator[str]:
    run, data = facts["run"], facts["disk"]
    kept = f"{run['checkpoints']} x {gigabytes(run['checkpoint'])} of checkpoints, final/, pictures of {run['looks']}"
    yield f"disk (computed): about {gigabytes(run['disk'])}: {kept} steps"
    if data:
        latents, text = (f"{data[name] / 1e3:.1f} kB" for name in ("latents_each", "text_each"))
        each = f"{data['samples']:,} samples of {latents} of latents and {text} of text"
        yield f"  {'latents (' + data['how'] + ')':30} {gigabytes(data['bytes'])}, {each}"


def _time(facts: Facts) -> Iterator[str]:
    run, speed, thing = facts["run"], facts["speed"], THINGS[facts["stage"]]
    epochs = f"{in_epochs(run['epochs'])} of {run['samples']:,} {thing}" if run["samples"] else f"a stream of {thing}"
    yield f"run: {run['steps']:,} steps of {run['batch']}: {epochs}"
    if not speed:
        yield "speed: no trial was made"
        return
    several = f", if all {facts['processes']} processes are as fast as this one" if facts["processes"] > 1 else ""
    yield (f"speed (measured, the median of {speed['timed']} steps of the training's loop): "
           f"{per_second(speed['images_per_second'])}, waiting for data {speed['waiting']:.0%}{several}")
    yield f"  the run takes {roughly(speed['hours'] * 3600)} ({speed['hours']:.3g} h), besides validation and pictures"
    if speed["price"] is not None:
        yield f"  {'price':30} {speed['price']:.2f}"
