"""Meters: seconds, memory, FLOPs of a call; of a sampler, where the host waits for a GPU, and what it keeps alive."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ldm.exact import Smooth
from ldm.grids import Uniform
from ldm.noise import Noise
from ldm.samplers import Sampler, prior, sample
from ldm.schedules import Flow

aten = torch.ops.aten
# A CPU scalar enters these as an argument of their kernel.
ARITHMETIC = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)

# FLOPs of a CPU's own kernel of attention, which torch's counter does not know, by the shapes it is given.
of_attention: Any = sdpa_flop_count
of_its_gradient: Any = sdpa_backward_flop_count
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: of_attention(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda y, q, k, v, *_, **__: of_its_gradient(y, q, k, v),
}  # fmt: skip


def seconds(call: Callable[[], object], device: str, *, processor: bool = False) -> float:
    """What one call takes, the device's own work included; with `processor`, of this process's processor time."""
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    clock = time.process_time if processor else time.perf_counter
    wait()
    since = clock()
    call()
    wait()
    return clock() - since


def peak(call: Callable[[], object], device: str) -> float:
    """MiB that one call has at most, beyond what was there."""
    return allocated(call, device)[1] / 2**20


def allocated(call: Callable[[], object], device: str) -> tuple[int, int]:
    """Bytes that one call leaves and has at most, beyond what was there: on a CPU the allocator's own, by the profiler.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells that it starts, and that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held = highest = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return held, highest


class Whole:
    """Stands for what tells a counter of FLOPs which module is at work: none is asked for."""

    parents = frozenset({"Global"})

    def __enter__(self) -> Whole:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was begun."""


def flops(call: Callable[[], object]) -> float:
    """FLOPs of a call, two for each multiply-add: matrix products, convolutions and attention, which are what hardware
    is rated by. On tensors of the meta device, too, where nothing is computed."""
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    counter.mod_tracker = Whole()  # type: ignore[assignment]  # torch's own does not bear `autograd.grad` in a step
    with counter:
        call()
    return float(counter.get_total_flops())


def host_waits(call: Callable[[], object]) -> int:
    """How often a call makes the host wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(warning.message) for warning in caught)


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists where the host would wait for a GPU, for which the meta device stands.

    A tensor there has a shape and no values. Reading one is listed, and answered with True; so is a copy from the host
    that blocks, and any operation but arithmetic that mixes devices, since it would copy. A copy back, and an
    operation whose result has the shape of its values (`nonzero`, a mask), are refused by the device itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            self.found.append("a value is read")
            return True
        parts = [part for arg in args for part in (arg if isinstance(arg, list | tuple) else [arg])]
        devices = {part.device.type for part in parts if isinstance(part, Tensor)}
        if kwargs.get("device") is not None and devices:
            devices.add(torch.device(kwargs["device"]).type)
        mixed = len(devices) > 1 and not kwargs.get("non_blocking") and func not in ARITHMETIC
        if mixed or (func is aten.lift_fresh.default and args[0].is_meta):
            self.found.append(str(func))
        return func(*args, **kwargs)


def waits(sampler: Sampler, steps: int) -> list[str]:
    """Where `steps` steps of a sampler would wait, the network apart."""
    noise, grid = Noise.from_seeds([0, 1], "meta"), Uniform()(steps, Flow())
    x = prior(Flow(), (3, 4, 4), noise)
    found = Waits()
    with found:
        sample(sampler, Smooth(Flow()), x, grid, noise)
    return found.found


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows which results of operations, of one shape, something still refers to."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape, self.made, self.tensors = shape, 0, WeakValueDictionary[int, Tensor]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, list | tuple) else [result]:
            if isinstance(part, Tensor) and part.shape == self.shape:
                self.tensors[self.made] = part
                self.made += 1
        return result


def holding(sampler: Sampler) -> tuple[int, int]:
    """The most tensors of a sample's size that a sampler holds beside x, after 8 to 10 and after 23 and 24 steps."""
    size, noise, counts = (3, 4, 4), Noise.from_seeds([0, 1]), dict[int, int]()
    x = prior(Flow(), size, noise)
    with Alive((2, *size)) as alive:
        sample(sampler, Smooth(Flow()), x, Uniform()(25, Flow()), noise,
               lambda shot: counts.update({shot.step: len(alive.tensors) - 1}))
    return max(counts[step] for step in (7, 8, 9)), max(counts[step] for step in (22, 23))
