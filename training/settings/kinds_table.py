"""The table of what can be combined, made of the families themselves."""

from __future__ import annotations

import re

from training.settings.decoding import STAGES, kinds
from training.settings.families import families

HEAD = "| section | kinds |\n| --- | --- |\n"


def table() -> str:
    """A row for each section that is a choice among kinds, stage two's first, those of editing last; of the kinds, the
    default."""
    named = {name: kinds(own) for stage in (*reversed(STAGES), "editing") for name, own in families(stage).items()}
    return HEAD + "".join(f"| {name} | {', '.join(own)} |\n" for name, own in named.items() if own)


def renew(text: str) -> str:
    """A page whose table of kinds is that of now."""
    return re.sub(re.escape(HEAD) + r"(\|.*\n)*", lambda _: table(), text)
