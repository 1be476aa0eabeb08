"""`generate --like PICTURE`: all that is asked for is read from a picture made before, and the new one held to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from training.drawing import adapters, controls, references
from training.drawing.starts import TOLD
from training.errors import CHECKPOINT, DATA, UserError
from training.pictures import grids
from training.runs.ingredients import difference

if TYPE_CHECKING:
    import argparse

NEEDED = {"prompt": str, "seed": int, "settings": dict, "hashes": dict, "size": list, "negative_prompt": str}
MAY_BE = {"also": list, "tile": int, "batch": int, "precision": str, "versions": dict}
MAY_BE |= {"preview": str}  # all of these may be absent
# What a picture may ask for, which anyone may have written: forged numbers would fill the memory.
LARGEST_BATCH, LARGEST_STEPS, LARGEST_ALSO = 4096, 10_000, 64
LARGEST_PICTURE, LARGEST_WORK = 1 << 26, 1 << 28  # pixels of a picture, and of the batch that is filled up
PAIRS = [str, float], [str, int]  # of `also`: caption and weight
GIVE = {"weak": "--weak-model", "classifier": "--classifier"}  # ingredients by flag
GIVE |= {"text_encoder": "--text-encoder", "tokenizer": "--text-encoder", "adapter": "--adapter or --control"}
LATER = {"vocabulary", "tokenizer"}  # ingredients that the first pictures do not name
TAKEN = ["sampler", "steps", "guidance_scale", "dynamic_threshold", "image_guidance_scale", "size", "overrides", "also",
         "negative_prompt"]  # fmt: skip
TAKEN += ["mixed_precision"]
TAKEN += dict.fromkeys(flag for start in TOLD.values() for flag, _ in start.settings.values())
TAKEN += ["source_prompt", "control_scale", "control_interval"]


@dataclass(frozen=True)
class Original:
    """A picture made before, and what it says of how."""

    path: Path
    facts: dict[str, Any]


def recall(args: argparse.Namespace) -> Original:
    """The picture of --like, its prompt, seed, size and conditions put where their flags would put them.

    Raises UserError where the picture does not say, and where a flag says otherwise.
    """
    if flags := [name for name in TAKEN if getattr(args, name)] + (["num_images"] if args.num_images != 1 else []):
        raise UserError(f"--like takes everything from its picture: leave out --{flags[0].replace('_', '-')}")
    path = Path(args.like)
    facts = told_by(path)
    if "upscale" in facts:
        raise UserError(f"{path} was made larger by upscale", hint="run upscale again, on the same picture")
    args.prompt, args.seed, args.negative_prompt = [facts["prompt"]], facts["seed"], facts["negative_prompt"]
    args.size = "x".join(map(str, facts["size"]))
    args.also = [(str(weight), caption) for caption, weight in facts.get("also") or []]
    args.mixed_precision = facts.get("precision", "no")
    for key, start in TOLD.items():
        if key in facts:
            start.recall(args, path, facts[key])
    if references.FACT in facts:
        references.recall(args, facts[references.FACT])
    adapters.recall(args, path, facts.get(adapters.FACT))
    controls.recall(args, path, facts.get(controls.FACT))
    return Original(path, facts)


def told_by(path: Path) -> dict[str, Any]:
    """What a picture of `generate` says of how it was made, all of the right kinds and sizes; nulls are left out.

    Raises UserError where it is no such picture, or asks for more than makes sense.
    """
    try:
        if not path.is_file():  # opening a pipe may wait for ever
            raise OSError
        facts = grids.facts(path)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, RecursionError, Image.DecompressionBombError):
        hint = "--like takes a PNG that generate wrote"
        raise UserError(f"{str(path)[:200]}: not a PNG that can be read", hint=hint, code=DATA) from None
    if not _sound(facts):
        hint = "--like takes a PNG that generate wrote; other programs drop its text when they save"
        raise UserError(f"{path} does not say how it was made", hint=hint, code=DATA)
    facts = {name: value for name, value in facts.items() if value is not None}
    if what := _too_much(facts):
        raise UserError(f"{path} asks for {what}", hint="was it edited? draw it by flags instead", code=DATA)
    return facts


def _sound(facts: Any) -> bool:
    """Whether the facts in a picture, which anyone may have written, are of the kinds that `generate` writes."""
    if not isinstance(facts, dict) or not all(isinstance(facts.get(name), kind) for name, kind in NEEDED.items()):
        return False
    optional = {name: facts[name] for name in MAY_BE if facts.get(name) is not None}
    return (
        all(isinstance(value, MAY_BE[name]) for name, value in optional.items())
        and all(isinstance(pair, list) and [type(part) for part in pair] in PAIRS for pair in optional.get("also", []))
        and all(start.sound(facts[key]) for key, start in TOLD.items() if facts.get(key) is not None)
        and (facts.get(references.FACT) is None or references.sound(facts[references.FACT]))
        and (facts.get(adapters.FACT) is None or adapters.sound(facts[adapters.FACT]))
        and (facts.get(controls.FACT) is None or controls.sound(facts[controls.FACT]))
        and len(facts["size"]) == 2
        and all(type(side) is int and side > 0 for side in facts["size"])
        and isinstance(facts["settings"].get("sample", {}), dict)
        and 0 <= optional.get("tile", 0) <= LARGEST_BATCH
        and 0 < optional.get("batch", 1) <= LARGEST_BATCH
    )


def _too_much(facts: dict[str, Any]) -> str:
    """What sound facts ask for beyond all sense; empty where they do not."""
    (height, width), batch = facts["size"], facts.get("batch", 1)
    steps, also = facts["settings"].get("sample", {}).get("steps", 1), facts.get("also", [])
    if height * width > LARGEST_PICTURE:
        return f"{width}x{height} pixels"
    if batch * height * width > LARGEST_WORK:
        return f"batches of {batch} pictures of {width}x{height} pixels"
    if not isinstance(steps, int) or steps > LARGEST_STEPS:
        return f"{steps} steps"
    if not all(math.isfinite(weight) for _, weight in also):
        return "weights of further captions that are no finite numbers"
    return f"{len(also)} further captions" if len(also) > LARGEST_ALSO else ""


def compare(original: Original, facts: dict[str, Any]) -> None:
    """Raises UserError(code 4) that names the first ingredient which is not the picture's, with both hashes."""
    then, preview = original.facts.get("preview"), facts.get("preview")
    if then != preview:
        was, now = (f"preview {value[:12]}" if value else "no preview" for value in (then, preview))
        hint = "give the same one with --preview" if then else "leave --preview out"
        raise UserError(f"{original.path} was decoded with {was}, this is {now}", hint=hint, code=CHECKPOINT)
    recorded, current = original.facts["hashes"], facts["hashes"]
    if change := difference(recorded, current, sorted({*recorded, *current} - (LATER - set(recorded)))):
        hint = f"give the same one with {GIVE.get(change.name.partition('-')[0], '--model')}"
        what = f"{original.path} was made with {change.name} {change.before}, this is {change.now}"
        raise UserError(what, hint=hint, code=CHECKPOINT)
    for key, start in TOLD.items():
        start.compare(original.path, original.facts.get(key), facts.get(key))
    controls.compare(original.path, original.facts.get(controls.FACT), facts.get(controls.FACT))


def verdict(original: Original, picture: Path) -> str:
    """One sentence: the same pixels, or how far off and what differs."""
    old, new = (np.asarray(Image.open(path)).astype(int) for path in (original.path, picture))
    if old.shape != new.shape:
        return f"another size than {original.path}: it was changed after it was made"
    if not (off := int(abs(old - new).max())):
        return f"the same pixels as {original.path}"
    changed = grids.changed(original.path)
    if changed:
        return f"within {off} of 255 of {original.path}: its pixels or what it says were changed after it was made"
    then, now = original.facts.get("versions", {}), grids.facts(picture)["versions"]
    other = [name for name in now if then.get(name) not in (None, now[name])]
    differences = [f"{name} {then[name]} then, {now[name]} now" for name in other]
    # A picture of an earlier version does not tell whether it was changed.
    unsealed = ", or the picture or what it says was changed after it was made" if changed is None else ""
    cause = (", ".join(differences) or "the processor or its threads") + unsealed
    return f"within {off} of 255 of {original.path}; what differs: {cause}"
