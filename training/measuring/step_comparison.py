"""The work of `compare_steps`: runs drawn in few and in many steps, and what each number of steps costs and is worth.

All settings draw the same captions with the same seeds, batch by batch in turn, so that what else the machine does
falls on all of them alike. What is measured is measured as `evaluate` does, to the same numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.pipeline import Sampling
from training.drawing.prompts import tell_reading
from training.drawing.requests import Request, ask, choose
from training.drawing.steering import pipeline_hashes
from training.errors import UserError
from training.files import finite, write_json, write_text
from training.guarding import check_free, make_folder
from training.ledger import Ledger
from training.machine import memory, processes
from training.measuring.generated import Truth, Witness, held_against, rated, witness_of
from training.measuring.held_out import of_one_size
from training.measuring.metered import Cost, Metered, metered
from training.measuring.obedience import Rules, batches, draw, shapes_prompts
from training.measuring.protocol import card, protocol, protocol_hash
from training.measuring.step_report import FILES, chart, qualities, recommendations, report
from training.messages import answer, tell, warn
from training.models.assembly import load_pipeline
from training.models.folders import find, name_of
from training.pictures import grids
from training.progress import Progress
from training.runs.folder import versions
from training.shards.index import data_facts
from training.shards.reading import held_out_split
from training.shards.remote import open_address

STEPS = (1, 2, 4, 8, 16)


class Run(NamedTuple):
    """A model that is compared, and what it is called."""

    name: str
    path: str
    pipeline: Metered
    ledger: Ledger


class Part(NamedTuple):
    """What is drawn at once: captions of the embedded shapes with so many `objects`, or, at 0, those of the data."""

    objects: int
    requests: Sequence[Request]


@dataclass(eq=False)
class Setting:
    """A run, drawn by one sampler in so many steps; and what was seen of its pictures."""

    run: Run
    sampling: Sampling
    settings: dict[str, Any]
    witness: Witness
    rules: Rules = field(default_factory=Rules)
    features: list[Tensor] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)

    @property
    def pipeline(self) -> Metered:
        """The model, at the size of these settings."""
        return dataclasses.replace(self.run.pipeline, size=tuple(self.settings["sample"]["size"]))

    def see(self, part: Part, truth: Truth | None) -> None:
        """Draw a part, and have its pictures judged."""
        pixels, captions = draw(self.pipeline, self.sampling, part.requests)
        self.costs.append(self.run.pipeline.meter.take())
        if part.objects:
            self.rules.see(part.objects, pixels, captions)
        elif truth:
            self.features.append(truth.features(self.witness.see(pixels, captions)).cpu())

    def cost(self) -> dict[str, Any]:
        """Network calls of a picture; its seconds, the median over batches, and the least and most of denoising."""
        each = {what: [getattr(cost, what) / cost.pictures for cost in self.costs]
                for what in ("reading", "denoising", "decoding")}  # fmt: skip
        calls = sum(cost.calls for cost in self.costs) / sum(cost.pictures for cost in self.costs)
        seconds = {f"seconds_{what}": median(values) for what, values in each.items()}
        ends = [min(each["denoising"]), max(each["denoising"])]
        return {"calls": calls, **seconds, "seconds_denoising_range": ends}


def compare(args: argparse.Namespace) -> int:
    """Draw, measure, and write the table, the chart and all numbers. Returns the exit code."""
    output = Path(args.output)
    for file in FILES:
        check_free(output / file, args.overwrite)
    memory.keep_memory()
    device = processes.resolve(args.device)
    if args.data:
        args.data = open_address(args.data, args.cache_dir, args.cache_size)
    settings = every_setting(args, device)
    truth = held_against(args, device) if args.data else None
    if truth:
        of_one_size(truth.images, "compare_steps --data")
    parts = list(parts_of(args, settings, truth))
    draw_in_turns(settings, parts, truth)
    rows, baselines = measured(settings, truth, args)
    about = {"threads": torch.get_num_threads(), "device": str(device), "batch_size": args.batch_size}
    about |= {"count": args.count, "seed": args.seed, "good_enough": args.good_enough, "versions": versions()}
    split = held_out_split(args.data) if truth else None
    alike = {key: value for key, value in rows[0]["numbers"].items() if key not in ("settings", "hashes")}
    stated = protocol(alike | {"versions": about["versions"]}, split)
    found: dict[str, Any] = {"about": about, "recommended": recommendations(rows, args.good_enough)}
    found |= {"rows": rows, "baselines": baselines}
    lines = [*report(found), "", "```", *card(stated), "```"]
    make_folder(output)
    write_json(output / FILES[0], finite({**found, "protocol_hash": protocol_hash(stated), "protocol": stated}))
    write_text(output / FILES[1], "\n".join(lines) + "\n")
    grids.write(chart(rows, args.good_enough), output / FILES[2])
    answer(*lines)
    tell(f"wrote {', '.join(str(output / file) for file in FILES)}")
    return 0


def every_setting(args: argparse.Namespace, device: torch.device) -> list[Setting]:
    """Every run with every sampler and number of steps, each once. Raises UserError for what cannot be compared."""
    for _, path in args.runs:
        find(path, "denoiser")  # all of them, before the first is loaded
    judge, settings = witness_of(args.obedience, None, device).judge, list[Setting]()
    for run in runs_of(args, device):
        kinds = list(dict.fromkeys(args.sampler)) or [None]
        counts = steps_of(find(run.path, "denoiser").config(), args.steps)
        for kind in kinds:
            for steps in counts:
                flags = {"model": run.path, "sampler": kind, "steps": steps, "guidance_scale": args.guidance_scale}
                asked = argparse.Namespace(**flags, dynamic_threshold=None, overrides={})
                sampling, values = choose(asked)
                refuse_jumps(run, sampling)
                settings.append(Setting(run, sampling, values, Witness(judge, None)))
    return settings


def runs_of(args: argparse.Namespace, device: torch.device) -> Iterator[Run]:
    """The runs, loaded, all of which are in memory together. Raises UserError for those shown more than captions."""
    for (name, path) in named(args.runs):
        pipeline = load_pipeline(path, device, args.text_encoder)
        branches = getattr(pipeline.denoiser.backbone, "branches", ())
        if pipeline.image.kind != "none" or any(branch.strength for branch in branches):
            what = f"{name} is shown an image besides the caption, and here all draw from captions alone"
            raise UserError(what, hint="leave it out; evaluate --upscale and evaluate --hints measure such models")
        yield Run(name, path, metered(pipeline), Ledger())


def named(runs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each run by the name that it is given, else its own. Raises UserError where two are called alike."""
    pairs = [(name or name_of(path), path) for name, path in runs]
    for name, path in pairs:
        if [other for other, _ in pairs].count(name) > 1:
            raise UserError(f"two of the runs are called {name}", hint=f"give one another name: NAME={path}")
    return pairs


def steps_of(config: Any, asked: Sequence[int] | None) -> list[int]:
    """The numbers of steps to draw a run in, from few to many, each once: those asked for; else those that a student
    was taught, as its config says; else `STEPS` and the run's own."""
    taught = getattr(getattr(config, "student", None), "steps", None)
    if asked is None and taught:
        asked = taught if isinstance(taught, Sequence) else [taught]
    return sorted({*(asked or (*STEPS, config.sample.steps))})


def refuse_jumps(run: Run, sampling: Sampling) -> None:
    """Raises UserError for a sampler that asks a plain denoiser where x goes."""
    if sampling.sampler.jumps and not hasattr(run.pipeline.denoiser, "jump"):
        what = f"--sampler {sampling.sampler.kind}: takes the steps of a few-step model, and {run.name} is none"
        raise UserError(what, hint="leave --sampler out, and each run draws by its own; or give --sampler dpmpp-2m")


def parts_of(args: argparse.Namespace, settings: Sequence[Setting], truth: Truth | None) -> Iterator[Part]:
    """What every setting draws, batch by batch, as `evaluate` does; how each run reads it goes into its ledger."""
    requests = dict[int, list[Request]]()
    runs = {setting.run.name: setting.run for setting in settings}
    if args.obedience == "shapes":
        for run in runs.values():
            prompts = shapes_prompts(run.pipeline, args.count, args.seed)
        requests |= {objects: ask(captions, 1, args.seed) for objects, captions in prompts.items()}
    if truth:
        requests[0] = ask(truth.captions, 1, args.seed)
    for run in runs.values():
        captions = [request.prompt for each in requests.values() for request in each]
        tell_reading(captions, run.ledger, run.pipeline.text, aloud=False)
        for line in run.ledger.lines():
            warn(f"{run.name}: {line}")
    for objects, each in requests.items():
        yield from (Part(objects, part) for part in batches(each, args.batch_size))


def draw_in_turns(settings: Sequence[Setting], parts: Sequence[Part], truth: Truth | None) -> None:
    """Draw every part by every setting. One picture each goes before, so that what cannot be drawn is told at once, and
    no setting's seconds hold what a first call takes."""
    for setting in settings:
        draw(setting.pipeline, setting.sampling, parts[0].requests[:1])
        setting.run.pipeline.meter.take()
    with Progress("drawing", sum(len(part.requests) for part in parts) * len(settings)) as told:
        for part in parts:
            for setting in settings:
                setting.see(part, truth)
                told.add(len(part.requests))


def measured(settings: Sequence[Setting], truth: Truth | None,
             args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row of each setting with the numbers that `evaluate` gives; and those of pictures that cost no drawing, by the
    autoencoder that reconstructed them."""
    rows, baselines = list[dict[str, Any]](), dict[str, Any]()
    sets = dict[str, dict[str, Tensor]]()
    for setting in settings:
        run, numbers = setting.run, dict[str, Any]()
        numbers |= {"settings": setting.settings, "seed": args.seed, "batch_size": args.batch_size}
        numbers |= {"hashes": pipeline_hashes(run.pipeline), "adapters": None}
        if args.obedience == "shapes":
            numbers |= setting.rules.numbers()
        if truth:
            coder = run.pipeline.hashes["autoencoder"]
            if coder not in sets:
                sets[coder] = truth.beside(run.pipeline.autoencoder)
                baselines[coder] = truth.compared(sets[coder], args.seed)
            drawn = truth.compared({"generated": torch.cat(setting.features)}, args.seed)
            numbers |= rated({**drawn, **baselines[coder]}) | truth.counts(sets[coder])
            numbers |= setting.witness.numbers(truth.images, truth.places, truth.device, run.ledger)
        numbers |= {"data": data_facts(args.data) if truth else None, "ledger": run.ledger.report()}
        sampler = setting.sampling
        row = {"run": run.name, "sampler": sampler.sampler.kind, "steps": sampler.steps, **setting.cost()}
        obeyed = setting.rules.obeyed() or setting.witness.verdicts
        rows.append({**row, "quality": qualities(numbers, obeyed), "numbers": numbers})
    return rows, baselines
