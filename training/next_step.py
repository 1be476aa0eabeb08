"""What a finished step says last: the command of the step that follows, with this one's paths, to be pasted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from training.commands import EMBEDDED, HIDDEN, door
from training.messages import note, printable, tell

SCRIPTED = "LDM_SCRIPTED"  # in the environment: whoever runs one step after another knows what follows
ROLES = ("data", "autoencoder", "ae", "latents", "denoiser", "dit", "unet", "pictures")  # how such folders are called
LONGEST = 200  # characters of a caption that is proposed as a prompt
LOOKED_AT = 100  # captions, for one that can be pasted


def tell_next(*commands: str) -> None:
    """A line `next: COMMAND` for each, in the order in which they are to be run."""
    if SCRIPTED in os.environ:
        return
    for command in commands:
        tell(f"next: {command}")
    if any(HIDDEN in command for command in commands):
        note(f"put user, password or query of the address back where {HIDDEN} stands")


def beside(path: str | Path, role: str) -> str:
    """A folder of that role next to `path` which is not there yet: `runs/ae` -> `runs/latents`, `photos` ->
    `photos-autoencoder`, `x-data` -> `x-latents-2` where `x-latents` is there. Where nothing can be written next to
    `path`, in the working folder."""
    folder = Path(path)
    if "://" in str(path):
        folder = Path(str(path).partition("?")[0].rstrip("/").rpartition("/")[2])
    if folder.name == "final":
        folder = folder.parent
    if folder.name in ("", ".."):
        folder = Path(os.path.abspath(folder))
    name, _, last = folder.name.rpartition("-")
    name = "-".join(filter(None, (name if last in ROLES else folder.name, role)))
    wanted = (folder.parent if os.access(folder.parent, os.W_OK) else Path()) / name
    place, number = wanted, 2
    while os.path.lexists(place):
        place, number = wanted.with_name(f"{name}-{number}"), number + 1
    return str(place)


def prompt(captions: Iterable[str], known: Callable[[str], bool] = bool) -> list[str]:
    """The first of some captions that can be pasted as one line, as words of a command; of those `known` to the model
    if there are any."""
    looked_at = [caption for caption, _ in zip(captions, range(LOOKED_AT), strict=False)]
    one_line = (text for text in looked_at if text.strip() and "\n" not in text and printable(text) == text)
    sound = [text for text in one_line if len(text) <= LONGEST]
    text = next((text for text in sound if known(text)), (sound or [""])[0])
    return [f"--prompt={text}"] if text.startswith("-") else ["--prompt", text]


def encoding(autoencoder: str | Path, data: str, flags: Mapping[str, object]) -> str:
    """The command that encodes pictures with an autoencoder, `flags` being what was asked for of both."""
    output = beside(data if autoencoder in EMBEDDED else autoencoder, "latents")
    return door("encode_latents", "--autoencoder", autoencoder, "--data", data, "--output", output, *again(flags))


def again(flags: Mapping[str, object]) -> list[str]:
    """Flags that were given, as the next command needs them too: `{"tile": 8}` -> `--tile 8`; without those that say
    nothing."""
    given = {name: value for name, value in flags.items() if value and value != "auto"}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]
