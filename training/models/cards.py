"""Model cards: the README.md of a model folder, with the front matter that the Hugging Face hub reads.

It is written from config.json, from card.json (`FACTS`: what no other file there says) and from what lies beside. Text
from outside, as captions, is escaped or fenced.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from training.errors import PACKAGE
from training.files import write_bytes, write_json
from training.guarding import make_folder, read_record
from training.pictures import grids
from training.runs.folder import logged

FACTS, SAMPLES, VOCABULARY = "card.json", "samples.png", "tokenizer/vocabulary.json"
BASE = "base.json"  # of an adapter, in final/: name and hashes of its base; in the run's folder: where that was found
TEACHER = "teacher.json"  # in final/: by whom a model was taught, a tiny autoencoder or a few-step denoiser
HINT = "hint.png"  # in a control's final/: one to draw by
SHOWN, HOLE = "shown.png", "hole.png"  # in final/ of a model that is shown pictures: one to draw by, of a mask its hole
# How such a model draws by these, by its image.kind: the door, and its words, of which files are in final/.
EXAMPLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "none": ("generate", ()), "hint": ("generate", ("--hint", HINT)), "low-res": ("upscale", (SHOWN,)),
    "masked": ("generate", ("--image", SHOWN, "--mask", HOLE)), "source": ("generate", ("--image", SHOWN)),
}  # fmt: skip
LONGEST_SIDE = 1024  # pixels of `SAMPLES`
MEANINGS = {
    "psnr": "dB, reconstructions against held-out pictures; higher is nearer",
    "ssim": "structural similarity of the same; 1 is equal",
    "lpips": "perceptual distance of the same; 0 is equal",
    "loss": "mean of those below; not comparable with other data, predictions or autoencoders",
    "loss_train": "the same mean on as many training pictures",
    "loss_gap": "by how much it is lower on training pictures: the larger, the more they are learnt by heart",
    "loss_t": "the objective at this noise level; lower is better",
}
OF_JUMPS = "mean squared distance from where one jump from this noise level lands to where it should; lower is better"


def write_card(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write card.json and README.md of a model folder whose other files are there."""
    write_json(folder / FACTS, facts)
    write_bytes(folder / "README.md", text(folder, facts).encode())


def stored_facts(folder: Path) -> dict[str, Any]:
    """What `write_card` was told; empty for a model of an earlier version."""
    path = folder / FACTS
    return read_record(path, {}) if path.is_file() else {}


def example(folder: Path, kind: str, place: str | Path) -> tuple[str, list[str]]:
    """The door that draws by what `folder` keeps for a model of an image.kind, and its words, files as in `place`; ""
    where nothing is kept."""
    verb, words = EXAMPLES.get(kind, ("", ()))
    files = {word for word in words if word.endswith(".png")}
    if not all((folder / file).is_file() for file in files):
        return "", []
    return verb, [f"{place}/{word}" if word in files else word for word in words]


def keep_samples(run: Path, step: int, folder: Path) -> None:
    """The newest sheet of pictures that a run had drawn at `step`, made small, as `SAMPLES`; none where there is none.
    """
    steps = sorted(p for p in run.glob("samples/step-*/grid.png") if p.parent.name <= f"step-{step:08d}")
    found = [p for p in (*steps, run / "samples" / "final" / "grid.png") if p.is_file()]
    make_folder(folder)
    (folder / SAMPLES).unlink(missing_ok=True)
    if found:
        with Image.open(found[-1]) as image:
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            grids.write(image.convert("RGB"), folder / SAMPLES)


def measured(run: Path, step: int) -> dict[str, Any]:
    """The numbers of a run's last validation up to `step`, by name: of metrics.jsonl, so that a resume has the same."""
    path = run / "metrics.jsonl"
    rows = map(logged, path.read_bytes().splitlines()) if path.is_file() else ()
    looks = [row for row in rows if row and row["step"] <= step and any(name.startswith("val/") for name in row)]
    return {name.removeprefix("val/"): value for name, value in (looks[-1] if looks else {}).items() if "val/" in name}


def text(folder: Path, facts: Mapping[str, Any]) -> str:
    """The card of a model folder, whose config.json tells which stage it is of."""
    values = read_record(folder / "config.json", {})
    denoiser = "backbone" in values
    base = read_record(folder / BASE, {"name": str})["name"] if (folder / BASE).is_file() else ""
    parts = [
        _front_matter(denoiser),
        _what(values, facts, denoiser, base, _teacher(folder) if denoiser else ""),
        _picture(folder, denoiser),
        _use(folder, values, facts, base),
        _data(facts),
        _training(values, facts),
        _numbers(facts, MEANINGS | ({"loss_t": OF_JUMPS} if denoiser and _student(values, "") else {})),
        _limits(folder, values, facts, denoiser),
        _made_of(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(value: object) -> str:
    """Text from outside on one line of Markdown, as it is."""
    line = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "|<>[]`*_\\~$#!&" else c for c in line)


def fenced(lines: Iterable[str], language: str = "") -> str:
    """A block of code that no text within can end."""
    block = "\n".join(lines)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block)), default=0))
    return f"{fence}{language}\n{block}\n{fence}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(rows: Mapping[str, Any], head: str = "| | |\n| --- | --- |") -> str:
    return "\n".join([head, *(f"| {escaped(name)} | {escaped(value)} |" for name, value in rows.items())])


def _front_matter(denoiser: bool) -> str:
    tags = ["text-to-image", "latent-diffusion"] if denoiser else ["autoencoder", "latent-diffusion"]
    task = ["pipeline_tag: text-to-image"] if denoiser else []
    licence = "# license: not stated; whoever publishes this model names one here, as apache-2.0"
    return "\n".join(["---", licence, f"library_name: {PACKAGE}", *task, "tags:", *(f"- {t}" for t in tags), "---"])


def _size(values: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    height, width = values.get("sample", {}).get("size") or facts.get("data", {}).get("resolution") or (0, 0)
    return f"{width}x{height}" if width else ""


def _what(values: Mapping[str, Any], facts: Mapping[str, Any], denoiser: bool, base: str, teacher: str) -> str:
    count = f" of {facts['parameters']:,} weights" if "parameters" in facts else ""
    size, kind = _size(values, facts), escaped(values["backbone" if denoiser else "model"]["kind"])
    origin = f" {escaped(facts['origin'])}" if "origin" in facts else ""
    if base:
        adapter = escaped(values["adapter"]["kind"])
        body = f"What was learned ({adapter}{count}) upon the denoiser {escaped(base)}, without which it draws nothing."
        return f"# Adapter of {escaped(base)}\n\n{body} Its hashes are in [{BASE}]({BASE})."
    if denoiser:
        body = f"A denoiser ({kind}{count}) that draws pictures from captions in the latents of autoencoder/."
        return f"# Text to image{f', {size}' if size else ''}\n\n{body}{_student(values, teacher)}{origin}"
    body = f"Stage one of latent diffusion ({kind}{count}): pictures to latents and back"
    return f"# Autoencoder{f', {size}' if size else ''}\n\n{body}.{origin}"


def _teacher(folder: Path) -> str:
    path = folder / TEACHER
    return str(read_record(path, {"name": str})["name"]) if path.is_file() else ""


def _student(values: Mapping[str, Any], teacher: str) -> str:
    """What a few-step model says of itself: by whom and how it was taught, its steps and its guidance."""
    student, kind = values.get("student", {}), values.get("objective", {}).get("kind", "denoising")
    if kind == "denoising":
        return ""
    scales = student.get("guidance_scale", [])
    scales = [scale for scale in (scales if isinstance(scales, list) else [scales]) if scales not in (1, [1])]
    steps, default = " or ".join(map(str, student.get("steps", []))), values["sample"]["steps"]
    drawn = f"It draws in {_steps(steps)}." if steps == str(default) else (
        f"It draws in {_steps(steps or 'any number of')}, and by default in {default}.")
    by = f" by {escaped(teacher)}, whose hashes are in [{TEACHER}]({TEACHER})" if teacher else " by data alone"
    guided = {0: "No guidance was taken in.", 1: "Guidance at scale {:g} is baked in: give no other.",
              2: "It is told its guidance scale, {:g} to {:g}, and needs no second call."}[len(scales)].format(*scales)
    return f" It is a few-step model ({escaped(kind)}), taught{by}. {drawn} {guided}"


def _steps(count: str) -> str:
    return f"{count} step{'' if count == '1' else 's'}"


def _picture(folder: Path, denoiser: bool) -> str:
    if not (folder / SAMPLES).is_file():
        return ""
    reconstructed = "Held-out pictures, their reconstructions, and twice the difference"
    shown = "Pictures of held-out captions" if denoiser else reconstructed
    return f"![{shown}]({SAMPLES})\n\n*{shown}, as they came: none was chosen.*"


def _use(folder: Path, values: Mapping[str, Any], facts: Mapping[str, Any], base: str) -> str:
    denoiser, kind = "backbone" in values, values.get("image", {}).get("kind", "none")
    captions = facts.get("data", {}).get("captions") or ["a caption"]
    prompt = " ".join(min(captions, key=len).split())
    if denoiser:
        hinted = base and (folder / HINT).is_file()
        at_work = f"BASE --control FOLDER --hint FOLDER/{HINT}" if hinted else "BASE --adapter FOLDER"
        model = at_work if base else "FOLDER"
        verb, shown = example(folder, kind, "FOLDER")
        words = ["--model", model, *shown, "--prompt", shlex.quote(prompt), "--output", "pictures"]
        command = " ".join([f"latent-diffusion-{verb or 'generate'}", *words])
        given = '"BASE", adapters=["FOLDER"]' if base else '"FOLDER"'
        python = ["from training import load_pipeline", "", f"pipeline = load_pipeline({given})"]
        python.append(f"images = pipeline([{json.dumps(prompt, ensure_ascii=False)}], seeds=[0])  # PIL images")
    else:
        command = "latent-diffusion-encode-latents --autoencoder FOLDER --data DATA --output LATENTS"
        python = ["from training import load_autoencoder", "", 'autoencoder = load_autoencoder("FOLDER")']
    shell = fenced([f"pip install {PACKAGE}", command], "bash")
    where = f"FOLDER is this folder, BASE that of {escaped(base)}." if base else "FOLDER is this folder."
    if denoiser and (hinted or kind != "none"):
        return f"## Use\n\n{where}\n\n{shell}"
    return f"## Use\n\n{where}\n\n{shell}\n\n{fenced(python, 'python')}"


def _data(facts: Mapping[str, Any]) -> str:
    data = facts.get("data", {})
    if not data:
        return ""
    names = {"train": "pictures trained on", "held_out": "held out", "resolution": "resolution, height and width"}
    names |= {"buckets": "sizes of the buckets, height and width"}
    names |= {"channels": "channels", "index_sha256": "sha256 of the shards' index"}
    rows = {said: _plain(data[name]) for name, said in names.items() if data.get(name) is not None}
    captions = "\n".join(f"- “{escaped(caption)}”" for caption in data.get("captions", []))
    examples = f"\n\nCaptions of held-out pictures:\n\n{captions}" if captions else ""
    origin = "What the pictures show, where they come from and who allowed their use is not known to the program."
    return f"## Training data\n\n{_table(rows)}{examples}\n\n{origin} Whoever publishes this model says it here."


def _training(values: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    if "steps" not in facts:
        return ""
    train, optimizer, seen = values["train"], values["optimizer"], facts.get("data", {}).get("train")
    rows = {"steps": facts["steps"], "batch size": train["batch_size"]}
    if seen:
        rows["epochs"] = f"{facts['steps'] * train['batch_size'] / seen:.3g}"
    rows |= {"learning rate": f"{optimizer['lr']:g}, {optimizer['decay']}", "averaged weights": train["ema"]}
    rows |= {"mixed precision": train["mixed_precision"], "seed": train["seed"]}
    if "weights" in facts:
        rows["weights"] = facts["weights"]
    return f"## Training\n\n{_table(rows)}\n\nEvery setting is in [config.json](config.json), which repeats the run."


def _numbers(facts: Mapping[str, Any], meanings: Mapping[str, str]) -> str:
    numbers = facts.get("numbers", {})
    shown = {n: numbers.get(f"{n}_is", v) for n, v in numbers.items() if not n.endswith("_is") and n != "returned_to"}
    if not shown:
        return "## Measured\n\nNothing was kept with this model."
    lines = ["| on held-out data | value | what it means |", "| --- | --- | --- |"]
    for name, value in shown.items():
        meaning = meanings.get(name) or meanings.get("loss_t" if name.startswith("loss_t") else "", "")
        told = escaped(value if isinstance(value, str) else format(value, ".4g"))
        lines.append(f"| {escaped(name)} | {told} | {meaning} |")
    rounded = facts.get("weights", "float32") != "float32"
    remark = f"\n\nMeasured in float32, before the weights were rounded to {facts['weights']}." if rounded else ""
    return "## Measured\n\n" + "\n".join(lines) + remark


def _limits(folder: Path, values: Mapping[str, Any], facts: Mapping[str, Any], denoiser: bool) -> str:
    size, seen = _size(values, facts), facts.get("data", {}).get("train")
    lines = [f"Trained at {size} pixels; other sizes are untried."] if size else []
    if denoiser and not (folder / BASE).is_file():
        lines.append(_words(folder, values["text"]))
    if seen and "steps" in facts and denoiser:
        epochs = facts["steps"] * values["train"]["batch_size"] / seen
        often = f"It has seen each of its {seen:,} pictures about {epochs:.3g} times"
        lines.append(f"{often}. Few pictures seen often come back as copies; whether they do was not measured here.")
    if denoiser:
        lines.append("It shows what its data show, with their omissions and prejudices. Nothing filters what it draws.")
    else:
        lines.append("What it does not keep of a picture, as small letters and faces, no denoiser on it can draw.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _words(folder: Path, text: Mapping[str, Any]) -> str:
    stored = read_record(folder / VOCABULARY, {}) if (folder / VOCABULARY).is_file() else {}
    if classes := stored.get("classes"):
        return f"It draws {len(classes):,} captions, taken whole as labels, and no other."
    if words := stored.get("vocabulary"):
        most = f"of a caption it reads {text['length']} at most"
        return f"It knows {len(words):,} words ({VOCABULARY}) and reads every other as unknown; {most}."
    return f"Of a caption it reads {text.get('length', 'some')} tokens at most."


def _made_of(facts: Mapping[str, Any]) -> str:
    hashes, versions = facts.get("hashes", {}), facts.get("versions", {})
    said = "Weights are safetensors, all else is JSON: nothing here is run when it is loaded."
    tables = [_table(rows, f"| {head} | |\n| --- | --- |")
              for head, rows in (("sha256 of the contents", hashes), ("version", versions)) if rows]  # fmt: skip
    return "## Made of\n\n" + "\n\n".join([said, *tables])
