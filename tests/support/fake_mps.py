"""Apple's GPUs as torch shows them, on a CPU: tensors that say `mps`, have no float64, and meet no CPU tensor.

Each is a shell around a CPU tensor. Inside `fake_mps()` whatever torch makes on, or moves to, that device is one of
them; every operation on them is checked by the device's rules, then done on the CPU tensors.

What is as on the device: float64 and complex128 are refused wherever they would come to be there, as a TypeError;
tensors of both devices are refused in one operation, but for scalars (no dimensions) of the CPU and for copies. What is
not: its kernels, their last bits, which of them are missing, and memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

MPS = torch.device("mps", 0)
LACKING = (torch.float64, torch.complex128)
aten = torch.ops.aten
COPY = aten._to_copy.default
BY_INDEX = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
MIXED = {aten.copy_.default}  # takes tensors of both
going: list[str] = [""]  # where what is made or copied now is to lie: "mps", "cpu", or as the arguments


class Refused(TypeError):
    """What the device does not do."""


class Shell(Tensor):
    """A tensor of the device, the CPU tensor `held` in it. To torch's own code it is one of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Shell:
        if held.dtype in LACKING:
            what = f"Cannot convert a MPS Tensor to {str(held.dtype).removeprefix('torch.')} dtype"
            raise Refused(f"{what} as the MPS framework doesn't support it. Please use float32 instead.")
        about: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        shell: Shell = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, **about)
        shell.held = held
        return shell

    device = property(lambda self: MPS)
    is_cpu = property(lambda self: False)
    is_mps = property(lambda self: True)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Shell({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise Refused("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def __deepcopy__(self, memo: Any) -> Any:
        copied = Shell(self.held.clone())
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the held tensors; its results lie where torch would have them."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    shells = [x for x in tensors if isinstance(x, Shell)]
    if shells:
        check(function, tensors, kwargs)
    to_device = going[-1] == "mps" or (bool(shells) and going[-1] != "cpu")
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, Shell) else x, (args, kwargs))
    found = function(*args, **kwargs)
    known = {id(x.held) if isinstance(x, Shell) else id(x): x for x in tensors}

    def outer(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) in known and function is not aten.lift_fresh.default:  # changed in place
            return known[id(x)]
        return Shell(x) if to_device else x

    return tree_map(outer, found)


def check(function: Any, tensors: list[Tensor], kwargs: Any) -> None:
    """Raises Refused for what comes from the device as float64, and for tensors of two devices in one operation."""
    if function is COPY:
        if going[-1] == "cpu" and kwargs.get("dtype") in LACKING:
            raise Refused(f"a tensor of the device is moved to the CPU first, then made {kwargs['dtype']}")
        return
    if function in MIXED:
        if not isinstance(tensors[0], Shell) and tensors[0].dtype in LACKING:
            raise Refused(f"a tensor of the device is moved to the CPU first, then made {tensors[0].dtype}")
        return
    foreign = [x for x in tensors if not isinstance(x, Shell) and x.ndim > 0]
    if function in BY_INDEX:
        foreign = [x for x in foreign if x.dtype not in (torch.int64, torch.bool, torch.uint8)]
    if foreign:
        what = "Expected all tensors to be on the same device, but found at least two devices, mps:0 and cpu!"
        raise Refused(f"{what} ({function}: {[tuple(x.shape) for x in foreign]} on the CPU)")


@contextmanager
def to(place: str) -> Iterator[None]:
    going.append(place)
    try:
        yield
    finally:
        going.pop()


def names_it(x: Any) -> bool:
    return isinstance(x, torch.device | str) and str(x).partition(":")[0] == "mps"


class Called(TorchFunctionMode):
    """Reads where a call of torch wants its result, and asks torch itself for the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (Tensor.to, Tensor.cpu):
            return moved(function, args, kwargs)
        if function in (torch.device, torch._C._nn._parse_to):  # names; a module's `to`
            return function(*args, **kwargs)
        asked = any(map(names_it, (*args, *kwargs.values())))
        args = tuple(torch.device("cpu") if names_it(x) else x for x in args)
        kwargs = {name: torch.device("cpu") if names_it(x) else x for name, x in kwargs.items()}
        backward = function in (Tensor.backward, torch.autograd.grad, torch.autograd.backward)
        shells = any(isinstance(x, Shell) for x in tree_flatten(args)[0])
        with to("mps" if asked or (backward and shells) else going[-1] if backward else ""):
            return function(*args, **kwargs)


def moved(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """`x.to(...)` and `x.cpu()`, by torch's own copy, through which gradients go."""
    x, *rest = args
    words = [*rest, *(kwargs[name] for name in ("device", "dtype", "other") if kwargs.get(name) is not None)]
    like = next((word for word in words if isinstance(word, Tensor)), None)
    device = next((word for word in words if isinstance(word, torch.device | str)), None)
    dtype = next((word for word in words if isinstance(word, torch.dtype)), x.dtype if like is None else like.dtype)
    here = "mps" if isinstance(x, Shell) else "cpu"
    there = "cpu" if function is Tensor.cpu else here
    if like is not None:
        there = "mps" if isinstance(like, Shell) else "cpu"
    if device is not None:
        there = torch.device(device).type
    if there not in ("cpu", "mps"):
        return function(*args, **kwargs)  # type: ignore[no-any-return]
    form = kwargs.get("memory_format")
    if (here, x.dtype) == (there, dtype) and not kwargs.get("copy") and form is None:
        return x  # type: ignore[no-any-return]
    with to(there):
        return COPY(x, dtype=dtype, memory_format=form)  # type: ignore[no-any-return]


class Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes over what is made for the device from nothing of it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


@contextmanager
def fake_mps() -> Iterator[torch.device]:
    """Inside, the machine has such a device, for torch and for Accelerate."""
    there = (patch.object(torch.backends.mps, "is_available", cache(lambda: True)),
             patch("accelerate.state.is_mps_available", lambda *_: True))  # fmt: skip
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # parameters become shells
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with there[0], there[1], Called(), Made():  # type: ignore[no-untyped-call]
            yield MPS
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        AcceleratorState._reset_state(reset_partial_state=True)
