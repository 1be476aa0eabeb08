"""How a picture was drawn, as programs read it that follow AUTOMATIC1111's web UI: the text chunk `parameters`.

Three parts on lines of their own: the prompt, `Negative prompt: ...` where there is one, and `Name: value` pairs with
commas between. Our own facts stay what `--like` reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from training.errors import PACKAGE

CHUNK = "parameters"
# Their names of what is the same there; all else goes by its kind.
SAMPLERS = {
    "euler": "Euler", "heun": "Heun", "lms": "LMS", "ddim": "DDIM", "pndm": "PLMS", "unipc": "UniPC",
    "restart": "Restart", "dpm-solver-2": "DPM2", "dpmpp-2m": "DPM++ 2M", "dpmpp-sde-2m": "DPM++ 2M SDE",
    "dpmpp-sde-3m": "DPM++ 3M SDE", "consistency": "LCM",
}  # fmt: skip
SCHEDULES = {"karras": "Karras", "exponential": "Exponential"}
ALONE = {"autoguidance", "classifier"}  # guidances whose scale is none of a negative prompt
EDITS = ("image", "inpaint", "outpaint")  # facts of starts that noise a picture


def parameters(facts: Mapping[str, Any]) -> str:
    """The text of the chunk for a picture with these facts; what they do not say is left out."""
    prompt, negative = (_clean(facts.get(key, "")) for key in ("prompt", "negative_prompt"))
    pairs = ", ".join(f"{name}: {quoted(value)}" for name, value in _pairs(facts).items() if value not in (None, ""))
    return "\n".join([prompt, *([f"Negative prompt: {negative}"] if negative else []), pairs]).strip()


def quoted(value: object) -> str:
    """A value of a pair: as JSON where a comma, a colon, a quote or the end of a line would be taken for another's."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text


def _pairs(facts: Mapping[str, Any]) -> dict[str, Any]:
    settings = facts.get("settings", {})
    sampler, grid, guidance, sample = (settings.get(name, {}) for name in ("sampler", "grid", "guidance", "sample"))
    told: Mapping[str, Any] = next((facts[key] for key in EDITS if facts.get(key)), {})
    size, also = facts.get("size"), facts.get("also") or []
    return {
        "Steps": sample.get("steps"),
        "Sampler": SAMPLERS.get(sampler.get("kind"), sampler.get("kind")),
        "Schedule type": SCHEDULES.get(grid.get("kind"), grid.get("kind")),
        "CFG scale": None if guidance.get("kind") in ALONE else guidance.get("scale"),
        "Seed": facts.get("seed"),
        "Size": f"{size[1]}x{size[0]}" if size else None,
        "Model hash": facts.get("hashes", {}).get("denoiser", "")[:10],
        "Model": facts.get("model"),
        "Denoising strength": told.get("strength"),
        "Also": "; ".join(f"{weight:g} {caption}" for caption, weight in also),
        "Version": f"{PACKAGE} {_version()}".strip(),
    }


def _version() -> str:
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:  # read from a checkout
        return ""


def _clean(text: str) -> str:
    """Without the characters that a text chunk may not hold; lines end in line feeds."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", " ", text.replace("\r\n", "\n"))
