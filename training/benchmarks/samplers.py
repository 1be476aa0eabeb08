"""How much each sampler costs beyond the network's own calls: a DiT-S at batch 1 on the CPU, in processor time.

Prints a Markdown table: calls, seconds in the network, seconds outside it and their share, per sampler. Noise, time
embedding and guidance are outside only where they are not the network's. Processor time, so that a busy machine does
not change the answer. Then what a GPU would feel: how often a step makes the host wait for the device (counted on the
meta device, which has no values to wait for), and how many tensors of a sample's size are held after 10 and 24 steps.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.files import write_text
from training.guarding import check_free
from training.messages import answer
from training.settings.flags import Parser


def flags(parser: Parser) -> None:
    """The flags of this benchmark."""
    parser.add_argument("--samplers", metavar="NAME,...", default="all", help="which samplers, by name")
    parser.add_argument("--steps", metavar="N", type=int, default=8, help="steps of each run")
    parser.add_argument("--side", metavar="N", type=int, default=32, help="latents of N x N, in patches of 2")
    parser.add_argument("--threads", metavar="N", type=int, default=1, help="processor threads")
    parser.add_argument("--output", metavar="FILE", help="write the table there too")
    parser.add_argument("--overwrite", action="store_true", help="replace that file where it is there")
    parser.machine(device="")


def run(args: Any) -> None:
    """Print the table, and write it."""
    if min(args.steps, args.side, args.threads) < 1:
        raise UserError("--steps, --side and --threads must be at least 1")
    check_free(args.output, args.overwrite)
    lines = table(args)
    answer(*lines)
    if args.output:
        write_text(Path(args.output), "\n".join(lines) + "\n")


class Timed:
    """A network that adds up its processor time."""

    def __init__(self, network: Any) -> None:
        self.network, self.seconds, self.calls = network, 0.0, 0

    def __call__(self, *inputs: Any) -> Any:
        since = time.process_time()
        answer = self.network(*inputs)
        self.seconds, self.calls = self.seconds + time.process_time() - since, self.calls + 1
        return answer


def table(args: Any) -> list[str]:
    """One row a sampler."""
    import torch

    from ldm.backbones.dit import DiT
    from ldm.conditioning import Cond
    from ldm.diffusion import Diffusion
    from ldm.grids import Uniform
    from ldm.jumps import Jumping
    from ldm.noise import Noise
    from ldm.predictions import Velocity
    from ldm.samplers import Euler, prior, sample
    from ldm.schedules import Flow
    from training.benchmarks.meters import holding, waits
    from training.measuring.conformance import every, select

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    samplers = select(every("sampler"), args.samplers, "--samplers")
    network = DiT(width=384, depth=12, heads=6, patch=2, pooled=False).build(channels=4, context_dim=384)
    network.eval().requires_grad_(False)
    cond = Cond(torch.zeros(1, 16, 384), torch.ones(1, 16, dtype=torch.bool))
    noise, grid = Noise.from_seeds([0]), Uniform()(args.steps, Flow())
    lines = [f"DiT-S/2, latents 1x4x{args.side}x{args.side}, {args.steps} steps, {args.threads} thread(s).\n",
             "| sampler | calls | in the network (s) | outside (s) | share | waits a step | held |",
             "|---|---:|---:|---:|---:|---:|---:|"]
    for warm, sampler in enumerate([Euler(), *samplers.values()]):
        timer = Timed(network)
        denoise = Jumping(timer, Diffusion(schedule=Flow(), prediction=Velocity())).bind(cond)  # a denoiser too
        x, since = prior(Flow(), (4, args.side, args.side), noise), time.process_time()
        sample(sampler, denoise, x, grid, noise)
        outside = time.process_time() - since - timer.seconds
        if warm:
            stops, (early, late) = len(waits(sampler, args.steps)), holding(sampler)
            lines.append(f"| {sampler.kind} | {timer.calls} | {timer.seconds:.3f} | {outside:.4f} | "
                         f"{100 * outside / timer.seconds:.2f} % | {stops / args.steps:g} | {early}, {late} |")
    return lines
