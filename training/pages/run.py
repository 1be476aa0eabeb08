"""The page of one run: what it is, its curves, pictures, data, cost, what it is made of, and how to repeat it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

from training.messages import duration
from training.pages import curves, data, shown
from training.pages.record import GONE, Log, Record
from training.pictures import html

PLACE = (
    "t is the place on the way from the picture, t = 0, to noise, t = 1. Near 1 next to nothing of the picture is "
    "left, and the network settles what is where, by the caption; near 0 all but the finest detail is there, and it "
    "settles texture and edges."
)
LEVELS = (
    "The value is the mean squared error of what the network predicts ({}) on held-out samples, always with the same "
    "noise, so that validations differ by the weights alone. It reaches 0 nowhere: what noise has hidden can only be "
    "guessed. A level that still falls still learns; one that rises while the training loss falls is overfitted; one "
    "far above another run's, on the same latents and with the same prediction, shows where this one is worse."
)
JUMPS = (
    "The value is the mean squared distance, on held-out samples and always with the same noise, from where this "
    "few-step model ({}) lands in one jump from that level to where its teacher's way ends, or to the picture where it "
    "has none. It is not comparable with a denoiser's loss, and says little of pictures drawn in several steps."
)
DENOISES = ("denoising", "its target")  # objectives whose loss by noise level is a denoiser's; early runs name none
DRAWING = ("sampler", "grid", "guidance")  # of the pictures that are looked at, not of what is trained
NO_PICTURES = "There are no pictures: samples/ holds no grid.png. They come with the validations, from step 0 on."
NO_CURVES = "There are no curves: metrics.jsonl is not in this folder."
SCRIPT_NEEDED = "<noscript><p>Curves and sliders need the script of this page, which loads nothing.</p></noscript>"


def sections(record: Record, given: Path | None = None) -> dict[str, list[str]]:
    """HTML parts by heading; every part of a run has its place, and says so where it is missing."""
    pictures = "Reconstructions" if record.stage == "autoencoder" else "Samples"
    found = {"Curves": curve_section(record), f"{pictures} over time": picture_section(record, pictures.lower())}
    if record.stage == "denoiser":
        found["Validation by noise level"] = level_section(record)
    return found | {
        "Data": data.section(record, given),
        "Cost": cost_section(record),
        "Not used as given": list(remarks(record)),
        "Made of": made_of(record),
        "How to repeat": repetition(record),
    }


def lead(record: Record) -> str:
    """What the run is, in a line, and where it stands, as far as one must know it to read on."""
    return f'<p class="lead">{escape(what(record))}</p>{html.items(missing(record), "notice")}'


def what(record: Record) -> str:
    """The kinds that a run is made of, and its size."""
    parts = {name: part for name, part in record.config.items() if isinstance(part, dict) and name not in DRAWING}
    kinds = [f"{name} {part['kind']}" for name, part in parts.items() if "kind" in part]
    train = record.config.get("train", {})
    asked = [f"batch {train['batch_size']}", f"seed {train['seed']}"] if {"batch_size", "seed"} <= train.keys() else []
    weights = record.run.get("outlook", {}).get("parameters")
    asked += [f"{weights:,} parameters"] if weights else []
    asked += [f"distilled from the {record.stage} {teacher(record)[:12]}"] if teacher(record) else []
    title = "Autoencoder (stage one)" if record.stage == "autoencoder" else "Denoiser of latents (stage two)"
    return f"{title}: {', '.join([*kinds, *asked])}."


def teacher(record: Record) -> str:
    """The hash of the autoencoder that a preview was distilled from, or of a student's teacher; empty for a model
    without one."""
    name = str(record.run.get("teacher", {}).get(record.stage, "none"))
    return "" if name == "none" else name


def missing(record: Record) -> Iterator[str]:
    """What is not as in a finished run, in sentences."""
    if not record.run:
        yield "This folder holds a model, and nothing of its training: run.json, metrics and samples are in the run's."
        return
    if GONE in record.state:
        yield "The process that trained it is gone without a word; the same command with --resume auto goes on."
    elif record.run["status"] == "failed":
        yield "The training failed; what it said stands in its terminal alone."
    if not (record.folder / "final" / "model.safetensors").is_file():
        yield "There is no final/ model yet: it is exported at the last step."
    for name, log in (("metrics.jsonl", record.metrics), ("timing.jsonl", record.timing)):
        if log.damaged:
            yield f"{name}: {log.damaged} damaged line(s) left out; a run that is cut off leaves one at the end."
    for name, odd in record.metrics.odd.items():
        first, word = odd[0]
        yield f"{name}: {len(odd)} value(s) that are no finite numbers, the first {word} at step {first:,}."


def curve_section(record: Record) -> list[str]:
    """Every number of the run over its steps."""
    plots = "".join(curves.of_one(record))
    if not plots:
        return [html.paragraph(NO_CURVES)]
    numbers = html.folded("all of them in numbers", f'<div class="scroll">{curves.last_numbers(record)}</div>')
    return [*tools([record]), f'<div class="plots">{plots}</div>', numbers]


def tools(records: Sequence[Record]) -> list[str]:
    """The slider that smooths all curves, and what their points are."""
    slider = '<input type="range" id="smoothing" min="0" max="0.99" step="0.01" value="0.6">'
    return [
        SCRIPT_NEEDED,
        html.paragraph(
            f"{curves.grouping(records)} The thick line is the debiased moving average, the thin one what was measured;"
            " validations and the rate are not smoothed. Point at a curve for its values."
        ),
        f'<label class="tools">smoothing {slider}<output>0.6</output></label>',
    ]


def picture_section(record: Record, what: str) -> list[str]:
    """The grids of the validations, by a slider."""
    if not record.grids:
        return [html.paragraph(NO_PICTURES)]
    whose = ", what its teacher and what it" if teacher(record) else " and what the autoencoder"
    about = {
        "autoencoder": f"Held-out pictures{whose} makes of them, and the difference, twice as strong.",
        "denoiser": "The same held-out captions and the same seeds each time, drawn with averaged weights.",
    }
    parts = [html.paragraph(about[record.stage]), *shown.slider(record.grids, what)]
    if captions := shown.captions(list(record.grids.values())[-1]):
        lines = "".join(f"<li>{escape(caption)}</li>" for caption in captions)
        parts.append(html.folded("captions of these pictures, row by row", f"<ol>{lines}</ol>"))
    return parts


def level_section(record: Record) -> list[str]:
    """A denoiser's validation loss against the noise level: at the first, the middle and the last validation."""
    levels = {float(found[1]): points for name, points in record.metrics.series.items()
              if (found := curves.LEVEL.fullmatch(name))}  # fmt: skip
    if not levels:
        return [html.paragraph("There is no validation by noise level in metrics.jsonl yet.")]
    steps = sorted({step for points in levels.values() for step, _ in points})
    lines = {}
    for step in dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1])):
        lines[f"step {step:,}"] = [
            [level, value] for level, points in sorted(levels.items()) for at, value in points if at == step
        ]
    meaning = curves.Meaning("", "Held-out loss against the noise level", "")
    predicted, objective = (str(record.config.get(name, {}).get("kind", "its target"))
                            for name in ("prediction", "objective"))  # fmt: skip
    value = LEVELS.format(predicted) if objective in DENOISES else JUMPS.format(objective)
    told = [html.paragraph(PLACE), html.paragraph(value)]
    return [*told, f'<div class="plots">{curves.plot(meaning, lines, across="t")}</div>']


def cost_section(record: Record) -> list[str]:
    """Time, speed and memory, as far as timing.jsonl tells them."""
    if not record.timing.series.get("images_per_second"):
        return [html.paragraph("There is nothing of the cost: timing.jsonl is not in this folder, or empty.")]
    environment = record.run.get("environment", {})
    where = {name: environment[name] for name in ("device", "processes") if name in environment}
    return [html.facts({**cost(record), **where}), html.paragraph(
        "Of the training's steps and what is saved between them; validations, start and export are not in it. "
        "Processor time is that of the main process."
    )]  # fmt: skip


def cost(record: Record) -> dict[str, str]:
    """Wall and processor time, speed, waiting and memory of the steps that timing.jsonl tells of."""
    batch = record.config.get("train", {}).get("batch_size")
    rates = record.timing.series.get("images_per_second", [])
    steps = [b - a for a, b in pairwise([0, *(step for step, _ in rates)])]
    images = [batch * count for count in steps] if isinstance(batch, int) else []
    if not images:
        return {}
    seconds = [image / rate for image, (_, rate) in zip(images, rates, strict=True) if rate > 0]
    waits = [share for _, share in record.timing.series.get("data_wait", [])]
    told = {"steps": f"{rates[-1][0]:,}", "images": f"{sum(images):,}", "wall time": duration(sum(seconds))}
    if samples := record.run.get("outlook", {}).get("samples"):
        told["epochs"] = f"{sum(images) / samples:.1f} of {samples:,} samples"
    told["processor time"] = _processor_time(record.timing)
    told["speed"] = f"{sum(images) / max(1e-9, sum(seconds)):.3g} images/s"
    if len(waits) == len(seconds):
        waited = sum(share * time for share, time in zip(waits, seconds, strict=True))
        told["waiting for data"] = f"{waited / max(1e-9, sum(seconds)):.1%}"
    if memory := record.timing.series.get("memory_bytes"):
        told["peak memory"] = f"{max(value for _, value in memory) / 2**30:.2f} GiB"
    return told


def _processor_time(timing: Log) -> str:
    points = timing.series.get("processor_seconds", [])
    known = len(points) == len(timing.series["images_per_second"])
    return duration(sum(value for _, value in points)) if known else "not told for all steps by this run's version"


def remarks(record: Record) -> Iterator[str]:
    """The ledger of the run, and what its files tell of its way: steps skipped, returns, resumes elsewhere."""
    lines = data.ledger_lines(record.run.get("ledger"))
    if not record.run:
        yield html.paragraph("Unknown: run.json is not in this folder.")
        return
    if record.run["status"] == "training":  # what run.json holds by then is of the checkpoint it went on from
        yield html.paragraph("This is written down where a training ends or stops." + (" So far:" if lines else ""))
        yield data.ledger(lines, "")
    else:
        told = "Everything was used as it was given." if "ledger" in record.run else "run.json tells of no ledger."
        yield data.ledger(lines, told)
    way = []
    if skipped := [step for step, _ in record.metrics.series.get("skipped", [])]:
        way.append(f"{len(skipped)} step(s) were skipped, the first at {skipped[0]:,}: their gradients moved nothing.")
    for step, value in record.metrics.series.get("val/returned_to", []):
        way.append(f"At step {step:,} it returned to the weights of step {int(value):,}.")
    for resume in record.run.get("resumes", []):
        way.append(f"Resumed at step {resume.get('step', '?')} with {', '.join(map(str, resume.get('changed', [])))}.")
    yield data.ledger(way, "No step was skipped, and no resume changed software or machine.")


def made_of(record: Record) -> list[str]:
    """Hashes and versions."""
    groups = ("data", "teacher", "vision", "hashes")
    hashes = {f"{group}: {key}": value for group in groups for key, value in record.run.get(group, {}).items()}
    hashes |= {"model": record.run["model"]} if "model" in record.run else {}
    hashes |= {f"final: {name}": value for name, value in record.parts.items()}
    versions = {**record.run.get("versions", {}), **record.run.get("environment", {})}
    if not hashes and not versions:
        return [html.paragraph("Nothing here names hashes or versions: run.json is not in this folder.")]
    told = {name: value if isinstance(value, str) else json.dumps(value) for name, value in hashes.items()}
    about = html.paragraph("Hashes are sha256: of the data's index, and of the tensors of each part.")
    return [about, html.facts(told)] + ([html.folded("versions and machine", html.facts(versions))] if versions else [])


def repetition(record: Record) -> list[str]:
    """Commands and the whole config."""
    config = html.folded("config.json", html.verbatim(json.dumps(record.config, indent=1, ensure_ascii=False)))
    if not record.run:
        return [html.paragraph("The config that it was trained with:"), config]
    data_flag = "--data DATA" if record.stage == "autoencoder" else "--latents LATENTS"
    taught = record.stage == "denoiser" and teacher(record)
    script = f"python -m training {'distill' if taught else 'train'}-{record.stage}"
    given = [data_flag, *_frozen_parts(record)]
    again = " ".join([script, "--config RUN/config.json", *given, "--output NEW"])
    going_on = " ".join([script, "--config RUN/config.json", *given, "--output RUN --resume auto"])
    return [
        html.paragraph("The config holds everything but the places of files; the data of the hash above give the run "
                       "again, on a CPU to the bit:"),
        html.verbatim(again),
        html.paragraph("In a checkout the scripts/ are the same. Where the run is not finished, or is to take more "
                       "--max-steps, it goes on:"),
        html.verbatim(going_on),
        config,
    ]  # fmt: skip


def _frozen_parts(record: Record) -> Iterator[str]:
    """The flags that name other models, for a run that was made with some."""
    if teacher(record):
        yield "--teacher TEACHER"
    if record.run.get("base"):
        yield "--base BASE"
    if record.config.get("loss", {}).get("align", 0):
        yield "--align-with VISION"
    if record.config.get("text", {}).get("kind") == "huggingface":
        yield "--text-encoder ENCODER"
