"""The processes in which a case's sides take turns: one for each setting, for an allocator that was tuned stays so."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

from training.benchmarks.case import PEAK_GPU, Case, Contest, Lane, Place, Setting
from training.errors import CHECKPOINT, DISK, UserError

# What every process would import for seconds, and the server it is forked from imports once, doing nothing with it.
PRELOADED = ["torch", "lpips", "accelerate", *(f"diffusers.{name}" for name in (
    "training_utils", "models.transformers.dit_transformer_2d", "models.transformers.pixart_transformer_2d",
    "models.unets.unet_2d_condition", "models.autoencoders.autoencoder_kl",
    "pipelines.stable_diffusion.pipeline_stable_diffusion"))]  # fmt: skip
SIDE = {"smoke": 512, "cpu": 1024, "gpu": 8192}  # of the matrices of the product
SHORTEST = {"smoke": 0.05, "cpu": 0.5, "gpu": 0.3}  # seconds that a turn lasts, by as many calls as that takes
WARM = {"smoke": 2, "cpu": 2, "gpu": 5}  # calls that do not count


class Crew:
    """The processes of one case, each with all sides built; they work one at a time."""

    def __init__(self, case: Case, lanes: Sequence[Lane], place: Place) -> None:
        """Starts them. Raises UserError where a peer is missing, or where the sides do not give the same."""
        self.case, self.stack = case, ExitStack()
        self.ends: dict[Setting, Connection] = {}
        self.told: dict[str, Any] = {}
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(PRELOADED)
        try:
            for setting in dict.fromkeys(lane.setting for lane in lanes):
                own, other = server.Pipe()
                work = server.Process(target=serve, args=(other, case, place._replace(setting=setting)), daemon=True)
                work.start()
                other.close()
                self.stack.callback(work.join)
                self.stack.callback(own.close)  # at which the process ends
                self.ends[setting] = own
                self.told = self._heard(own)  # one is built after the other
        except BaseException:
            self.stack.close()
            raise

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def turn(self, lane: Lane) -> float:
        """One measurement of a lane: seconds of a call, or MiB."""
        return float(self._asked(self.ends[lane.setting], lane.side))

    def facts(self) -> dict[str, float]:
        """What else the case measures, in the process that is set up as ours is launched."""
        return dict(self._asked(self.ends["launched"], ""))

    def _asked(self, end: Connection, what: str) -> Any:
        end.send(what)
        return self._heard(end)

    def _heard(self, end: Connection) -> Any:
        try:
            value = end.recv()
        except (EOFError, ConnectionResetError):
            what = f"{self.case.kind}: its process ended before it answered"
            hint = "where memory is short, take --smoke, or leave the case out with --cases"
            raise UserError(what, hint=hint, code=DISK) from None
        if isinstance(value, UserError):
            raise value
        return value


def serve(end: Connection, case: Case, place: Place) -> None:
    """Build the case and do what is asked until the other end closes: a side's name is a turn of it, "" the facts."""
    try:
        bench = Bench(case, place)
        end.send({"items": bench.contest.items, "unit": bench.contest.unit, "flops": bench.contest.flops})
        while True:
            side = end.recv()
            end.send(bench.turn(side) if side else {name: fact() for name, fact in bench.contest.facts.items()})
    except (EOFError, ConnectionResetError, BrokenPipeError):
        return
    except UserError as problem:
        end.send(problem)
    except AssertionError as difference:
        what = f"{case.kind}: the sides do not give the same, so they are not timed: {difference}"
        end.send(UserError(" ".join(what.split()), code=CHECKPOINT))


class Bench:
    """One process's sides, warmed up, each with the number of calls that a turn of it takes."""

    def __init__(self, case: Case, place: Place) -> None:
        from training.messages import hush

        hush(True)
        self.case, self.place = case, place
        set_up(place)
        self.contest: Contest = case.build(place)
        if place.setting != "compiled":  # as compiled for float32 and without gradients it would be compiled twice
            with exact():
                self.contest.agree()
        if self.contest.flops:
            self.contest.calls["product"] = product(place)
        self.calls: dict[str, int] = {}

    def turn(self, side: str) -> float:
        """Seconds of one call of a side, over a turn of several; or the MiB that a call has at most."""
        from training.benchmarks.meters import peak

        call = self.contest.calls[side]
        if side not in self.calls:
            warm = 0 if self.contest.alone else WARM[self.place.size]  # processes of their own are never warm
            once = [self._timed(call, 1) for _ in range(warm)]
            self.calls[side] = max(1, round(SHORTEST[self.place.size] / max(once[-1], 1e-6))) if once else 1
        if self.case.measure == "peak":
            return peak(call, self.place.device)
        each = self._timed(call, self.calls[side])
        if side == "product":  # as long as a product of as many FLOPs as a call of ours would take
            return each * self.contest.flops / (2 * SIDE[self.place.size] ** 3)
        return each

    def _timed(self, call: Any, times: int) -> float:
        from training.benchmarks.meters import seconds

        if self.contest.alone:
            return float(call())
        device, processor = self.place.device, self.place.processor
        return seconds(lambda: [call() for _ in range(times)], device, processor=processor) / times


def set_up(place: Place) -> None:
    """This process as a setting has it."""
    import torch

    from training.machine.memory import keep_memory

    if place.threads:
        torch.set_num_threads(place.threads)
    if place.setting != "installed":
        keep_memory()
        torch.set_flush_denormal(True)
    torch.manual_seed(0)


def exact() -> Any:
    """Inside, a GPU's convolutions do not round to TF32."""
    import torch

    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def product(place: Place) -> Any:
    """A call that multiplies two square matrices, in bfloat16 on a GPU."""
    import torch

    side, dtype = SIDE[place.size], torch.bfloat16 if place.device == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=place.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def at_peak(flops: float) -> float:
    """Seconds that a GPU at the rate of its data sheet would take."""
    return flops / PEAK_GPU
