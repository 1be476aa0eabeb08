"""Real processes of one group, each forked from a server that imported torch once; and what may go wrong in one."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import tiny
import torch

from training.drills.verify_resume import launch
from training.tensors import load_tensors


def start(count: int, home: Path, *words: object, wrong: dict[int, str] | None = None, machines: int = 1) -> list[int]:
    """The exit codes of `count` processes running one training; `wrong` maps a rank to its mischief or LDM_FAULT.

    They believe themselves on so many `machines`, evenly. What they said is in home/rank-N.log. The store they meet at
    is held here, as torchrun's agent holds it.
    """
    local = count // machines
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for rank in range(count):
        fault = (wrong or {}).get(rank, "")
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank % local), "GROUP_RANK": str(rank // local)}
        own["LDM_FAULT"] = fault if "=" in fault else ""
        environment = {**group, **own, "MISCHIEF": fault if "=" not in fault else "", "CUDA_VISIBLE_DEVICES": ""}
        log = home / f"rank-{rank}.log"
        log.unlink(missing_ok=True)
        processes.append(launch(Path(__file__), [str(word) for word in words], log, environment))
    for process in processes:
        process.join(240)
        assert process.exitcode is not None, (home / "rank-0.log").read_text()
    return [int(process.exitcode or 0) for process in processes]


def said(home: Path) -> str:
    """All that the processes said."""
    return "".join(path.read_text() for path in sorted(home.glob("rank-*.log")))


def same_weights(one: Path, two: Path, bound: float = 1e-5) -> None:
    """Of two finished runs: no weight differs by more."""
    ours, theirs = (load_tensors(run / "final" / "model.safetensors") for run in (one, two))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=bound)


def nan_loss(step: int) -> None:
    """The loss of this process alone is NaN at `step`."""
    from training.stages.denoiser import DenoiserStage

    kept = DenoiserStage.backward

    def backward(self: Any, batch: Any, number: int, share: float) -> Any:
        values = kept(self, batch, number, share)
        return {**values, "loss": values["loss"] * float("nan")} if number == step else values

    DenoiserStage.backward = backward  # type: ignore[method-assign]


def spike(step: int) -> None:
    """The gradient of this process alone is enormous at `step`, on its way to the others."""
    from training.stages.denoiser import DenoiserStage

    kept = DenoiserStage.backward  # not on the stage, whose values a skipped step gives up

    def backward(self: Any, batch: Any, number: int, share: float) -> Any:
        return kept(self, batch, number, share * 1e6 if number == step else share)

    DenoiserStage.backward = backward  # type: ignore[method-assign]


def bad_sample(step: int) -> None:
    """The data of this process alone cannot be read at `step`."""
    from training.data.latents import Latents
    from training.errors import DATA, UserError

    kept, read = Latents.__getitems__, [0]

    def getitems(self: Any, slots: Any) -> Any:
        read[0] += len(slots) == 16  # validation reads otherwise
        if read[0] == step + 1:
            raise UserError("000007: broken sample", hint="verify the data", code=DATA)
        return kept(self, slots)

    Latents.__getitems__ = getitems  # type: ignore[method-assign]


def unsynchronised(step: int) -> None:
    """A weight of this process alone moves after `step`."""
    from training.loop.loop import Loop

    kept = Loop.step

    def moved(self: Any, number: int, rate: float) -> Any:
        told = kept(self, number, rate)
        if number == step:
            with torch.no_grad():
                next(iter(self.stage.networks["denoiser"].parameters()))[0] += 1e-7
        return told

    Loop.step = moved  # type: ignore[method-assign]


def impatient(seconds: int) -> None:
    """An exchange may take 2 s, and the pictures of this process take so many seconds."""
    import time
    from datetime import timedelta

    from training.loop import loop
    from training.machine import meeting

    kept, meeting.COLLECTIVE = loop.validate, timedelta(seconds=2)

    def slow(*words: Any) -> Any:
        time.sleep(seconds)
        return kept(*words)

    loop.validate = slow


def no_text(_step: int) -> None:
    """This process has no transformers."""
    sys.modules["transformers"] = None  # type: ignore[assignment]


def main() -> None:
    """Run `SCRIPT WORDS` after the mischief that this rank was told."""
    sys.path.insert(0, str(Path(__file__).parent))
    name, _, step = os.environ["MISCHIEF"].partition(":")
    if name == "words":  # given to this process alone
        sys.argv += step.split()
    elif name:
        {f.__name__: f for f in (nan_loss, spike, bad_sample, unsynchronised, impatient, no_text)}[name](int(step))
    script = tiny.SCRIPTS / f"{sys.argv[1]}.py"
    sys.argv = [str(script), *sys.argv[2:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
