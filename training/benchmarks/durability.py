"""What durability costs a training: checkpoints, checksums and watchdogs, as shares of the time of a step.

One run on made-up latents. In each round come a step without watchdogs, a step with them, the checksums of all weights
(which several processes compare), and a checkpoint: written as always, then begun in the background. Prints a Markdown
table: medians over the rounds, each spread over the steps between two of its kind, checkpoints over the config's own
`train.save_every`. Of a save in the background only the time for which it holds the training up is told; on a CPU its
writing takes from the next steps.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from training.errors import UserError
from training.messages import answer
from training.settings.flags import Parser

if TYPE_CHECKING:
    from training.loop.loop import Loop

SAVES = [("checkpoint", "save"), ("or begun in the background", "begin")]


def flags(parser: Parser) -> None:
    """The flags of this benchmark."""
    add = parser.add_argument
    add("--config", metavar="NAME|FILE", default="dit-s", help="a denoiser whose text encoder learns")
    add("--batch-size", metavar="N", type=int, default=64, help="images a step")
    add("--side", metavar="N", type=int, default=32, help="latents of 4 x N x N")
    add("--rounds", metavar="N", type=int, default=5, help="how often everything is timed, after once for nothing")
    add("--threads", metavar="N", type=int, default=0, help="processor threads; 0: torch's own choice")
    add("--folder", metavar="DIR", help="on the disk to write to; a temporary folder when not given")
    parser.machine(device="cpu")


def run(args: Any) -> None:
    """Time everything in turn and print the table."""
    if min(args.batch_size, args.side, args.rounds) < 1 or args.threads < 0:
        raise UserError("--batch-size, --side and --rounds must be at least 1, --threads at least 0")
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.folder) as folder:
        answer(*table(args, Path(folder)))


def table(args: Any, folder: Path) -> list[str]:
    """Time everything in turn; the rows."""
    import torch

    from training.benchmarks.meters import seconds
    from training.loop.loop import COMPARED_EVERY

    if args.threads:
        torch.set_num_threads(args.threads)
    loop = begin(args, folder)
    times: dict[str, list[float]] = {name: [] for name in ("bare", "step", "judge", "compare", "save", "begin")}
    dogs: Any = loop.watchdogs
    part, kind = "judge" if loop.waits else "defer", loop.accelerator.device.type
    judge = getattr(dogs, part)

    def judged(*seen: Any) -> Any:
        answers: list[Any] = []
        times["judge"].append(seconds(lambda: answers.append(judge(*seen)), kind))
        return answers[0]

    for number in range(0, 2 * args.rounds + 2, 2):
        for name, watchdog in (("bare", lambda *_: True if loop.waits else None), ("step", judged)):
            setattr(dogs, part, watchdog)
            times[name].append(seconds(lambda: advance(loop), kind))
        times["compare"].append(seconds(lambda: checksums(loop), kind))
        for name, wait in (("save", True), ("begin", False)):
            times[name].append(seconds(partial(loop.save, number + 1 + (not wait), wait=wait), kind))
        loop.writer.finish()
    middle = {name: median(values[1:]) for name, values in times.items()}
    rows = [("watchdogs", "judge", 1), ("checksums, with several processes", "compare", COMPARED_EVERY)]
    rows += [(part, name, loop.train.save_every) for part, name in SAVES]
    shares = {name: middle[name] / every / middle["bare"] for _, name, every in rows}
    count = sum(p.numel() for p in loop.stage.networks["denoiser"].parameters())
    what = f"{args.config}, {count:,} parameters, batch {args.batch_size}, latents 4x{args.side}x{args.side}"
    each = f"{middle['bare']:.3f} s a step without watchdogs, {middle['step']:.3f} s with them"
    lines = [f"{what}, {kind}, {torch.get_num_threads()} thread(s): {each}.\n"]
    lines += ["| part | seconds | every | share of a step |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {part} | {middle[name]:.4f} | {every} | {shares[name]:.3%} |" for part, name, every in rows]
    return [*lines, f"| all but the last | | | {sum(shares.values()) - shares['begin']:.3%} |"]


def advance(loop: Loop) -> None:
    """One step as the loop takes it."""
    step, loop.done = loop.done, loop.done + 1
    loop.journal.record(step + 1, loop.gradients(step) | loop.step(step, 1e-4), 1e-4)


def checksums(loop: Loop) -> Any:
    """What `Watchdogs.compare` gathers, where there are several processes."""
    import torch

    from training.loop.watchdogs import checksum

    return torch.stack([checksum(value) for value in loop.state.replicated().values()]).tolist()


def begin(args: Any, folder: Path, data: Any = None) -> Loop:
    """The loop of a denoiser of `args.config` on `data`, or on made-up latents with captions of one word."""
    import torch

    from autoencoder.norm import LatentNorm
    from training.loop.loop import Loop
    from training.machine import processes
    from training.settings import decoding
    from training.stages.denoiser import DenoiserStage

    keys = {"batch_size": args.batch_size, "micro_batch_size": 0, "num_workers": 0}
    keys |= {"max_steps": 10**6, "log_every": 10**6}
    flags = {f"train.{key}": str(value) for key, value in keys.items()}
    if processes.resolve(args.device).type == "cpu":
        flags["train.mixed_precision"] = "no"
    config: Any = decoding.load("denoiser", args.config, flags)
    accelerator = processes.start(args.device, config.train.mixed_precision)
    torch.manual_seed(0)
    text = config.text.build(config.text.vocabulary(["picture"]))
    sizes = {"context_dim": text.context_dim, "pooled_dim": text.pooled_dim}
    network = config.backbone.build(channels=4, **sizes).to(accelerator.device)
    data = data or made_up(args.side, 4 * args.batch_size)
    pipeline: Any = None  # nothing is drawn
    stage = DenoiserStage(config, network, text.to(accelerator.device), LatentNorm(4), data, data, pipeline)
    loop = Loop(stage, config.train, config.optimizer, accelerator, folder, 1, args.batch_size)
    loop.passes.open_data(0)
    return loop


def made_up(side: int, count: int) -> Any:
    """`count` random latents, as a data set."""
    import torch

    from training.data.order import Slot
    from training.data.samples import Batch

    class MadeUp:
        shards = SimpleNamespace(  # no files
            remote=None, windows=((), 0), buckets={}, summary={}, directory=Path("."), split=""
        )
        text, features = False, 0
        moments = torch.randn(count, 8, side, side, generator=torch.Generator().manual_seed(0))

        def __len__(self) -> int:
            return count

        def __getitems__(self, slots: list[Slot]) -> Batch:
            numbers = torch.tensor([slot.slot for slot in slots])
            return Batch(self.moments[[slot.index for slot in slots]], numbers, ["picture"] * len(slots))

    return MadeUp()
