"""A process of several that train every few-step member, one after the other: `student_ranks LATENTS TEACHER HOME`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import student_steps
import torch
from accelerate import Accelerator
from student_steps import CASES, Case, shake
from torch.nn.parallel import DistributedDataParallel
from whole_steps import everything, take

from training.machine import processes
from training.tensors import content_hash

STEPS = 4
MICRO = 4


def hashes(case: Case, latents: Path, teacher: Path, home: Path, accelerator: Accelerator) -> dict[str, str]:
    """Those of all tensors of a checkpoint after a few steps on global batches of eight, and of what each step told.

    Half a batch is in each process, or where there is one in each of its passes: both halves count alike in a sum of
    two, so that not a bit of it is another.
    """
    torch.set_flush_denormal(True)  # as the doors do
    made = student_steps.build(case, latents, teacher, home / "-".join(case), accelerator, MICRO)
    stage, loop = made.stage, made.loop
    shake(loop)
    several = accelerator.num_processes > 1
    for name, wrapped in stage.wrapped.items():
        learns = any(p.requires_grad for p in stage.networks[name].parameters())
        assert isinstance(wrapped, DistributedDataParallel) is (several and learns), name
    for step in range(STEPS):
        take(loop, step)
    loop.watchdogs.compare(STEPS, loop.state.replicated())
    return {name: content_hash({"": value}) for name, value in everything(loop, STEPS)[0].items()}


def main() -> None:
    """In every process; the first writes down what it found."""
    latents, teacher, home = map(Path, sys.argv[1:])
    with processes.together():
        accelerator = processes.start("cpu")
        found = {"-".join(case): hashes(case, latents, teacher, home, accelerator) for case in CASES}
    if accelerator.is_main_process:
        (home / "hashes.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
