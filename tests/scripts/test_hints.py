"""Every hint that proposes a flag or a command works when followed.

`hints.toml` beside this file has a line for each such message. A new one fails here until it has its line: the name of
a scenario below, of a test that follows it elsewhere (`tests/…py::test_…`), or "flags" where only what it names is
looked up. Messages are found by their text, so that a changed one asks for its line anew.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import hints
import pytest
import tiny
from PIL import Image

from training.errors import UserError
from training.settings.decoding import STAGES, sections

TABLE = tomllib.loads((Path(__file__).parent / "hints.toml").read_text("utf-8"))
ALL = {hint.name: hint for hint in hints.hints()}
DOORS = sorted(path.stem for path in tiny.SCRIPTS.glob("*.py") if "run_main" in path.read_text())
TRAINING = ["train_autoencoder", "train_denoiser"]
# The doors that a room speaks to; a room that is not here speaks to all of them.
ROOMS = {
    "drawing": ["generate", "evaluate"], "packing": ["make_shards"], "encoding": ["encode_latents", "make_shards"],
    "loop": TRAINING, "runs": TRAINING, "drills": ["soak", "verify_resume"], "benchmarks": ["benchmark"],
}  # fmt: skip


def test_every_hint_has_its_line() -> None:
    missing = [f'{json.dumps(name, ensure_ascii=False)} = "flags"' for name in ALL if name not in TABLE]
    assert not missing, "add to tests/scripts/hints.toml, best with a scenario:\n" + "\n".join(missing)
    assert not [name for name in TABLE if name not in ALL], "lines of messages that are gone"


@pytest.mark.parametrize("name", ALL)
def test_what_a_hint_names_is_there(name: str) -> None:
    """Each flag in the parser of its door, each config key in a section, each script with its verb."""
    text = ALL[name].text
    room = name.split("/")[1] if name.startswith("training/") else ""
    doors = [name.split("/")[1].split(".py")[0]] if name.startswith("scripts/") else ROOMS.get(room, DOORS)
    for script, verb in hints.COMMAND.findall(text):
        assert script in DOORS, script
        assert not (named := hints.verbs(script)) or verb.strip() in named or not verb, f"{script} {verb}"
        doors = [*doors, script]
    keys = {f"--{s}.{key}" for stage in STAGES for s, members in sections(stage).items() for m in members
            for key in m.__dataclass_fields__}  # fmt: skip
    known = set().union(*map(hints.options, doors)) | keys | hints.OF_LAUNCHERS
    assert [flag for flag in hints.FLAG.findall(text) if flag not in known] == []


@pytest.mark.parametrize("name", TABLE)
def test_the_line_of_a_hint_names_what_there_is(name: str) -> None:
    path, _, test = TABLE[name].partition("::")
    if test:
        tree = ast.parse((tiny.ROOT / path).read_text("utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    else:
        assert path == "flags" or path in SCENARIOS


class Place:
    """Where a scenario plays: its folder, and data and runs of tests."""

    def __init__(self, folder: Path, **made: Path) -> None:
        self.folder, self.made = folder, made

    def words(self, text: str) -> list[str]:
        """The words of a command, `{tmp}`, `{shapes}`, `{latents}`, `{denoiser}` filled in."""
        flags = {"A": shlex.join(tiny.AUTOENCODER), "D": shlex.join(tiny.DENOISER)}
        return shlex.split(text.format(tmp=self.folder, **self.made, **flags))

    def outcome(self, text: str) -> UserError | int:
        """What a command ends with."""
        script, *words = self.words(text)
        try:
            return tiny.call(script, *words)
        except UserError as problem:
            return problem


def pictures(folder: Path, captions: bool) -> None:
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 9, 9)).save(folder / f"{number}.png")
        if captions:
            (folder / f"{number}.txt").write_text(f"red {number}")


def captionless(place: Place) -> None:
    pictures(place.folder / "in", False)


def broken(place: Place) -> None:
    pictures(place.folder / "in", True)
    (place.folder / "in" / "0.png").write_bytes(b"no picture")


def taken(place: Place) -> None:
    pictures(place.folder / "in", True)
    (place.folder / "out").mkdir()
    (place.folder / "out" / "notes.txt").write_text("mine")


def unindexed(place: Place) -> None:
    shutil.copytree(place.made["shapes"], place.folder / "my [data]")
    for path in (place.folder / "my [data]").glob("*"):
        path.suffix == ".tar" or path.unlink()


def drawn(place: Place) -> None:
    (place.folder / "out").mkdir()
    (place.folder / "out" / "00000.png").write_bytes(b"a picture")


def nothing(place: Place) -> None:
    """Nothing to prepare."""


DRY = "train_autoencoder --data {shapes} {A} --dry-run"
# Name: what is prepared, the command refused, what its hint must hold, the command that follows it. RUN as the last is
# the hint's own command, after which the refused one must come further.
RUN = "RUN"
SCENARIOS: dict[str, tuple[Callable[[Place], None], str, str, str]] = {
    "no output": (nothing, "train_autoencoder --data {shapes} {A}", "--output", DRY + " --output {tmp}/run"),
    "no data": (nothing, "train_autoencoder {A} --dry-run", "--data", DRY),
    "large batch": (nothing, DRY + " --batch-size 5000", "lower --batch-size", DRY + " --batch-size 8"),
    "odd batch": (nothing, DRY + " --batch-size 33 --micro-batch-size 8", "nearest", DRY + " --batch-size 32"),
    "half on a cpu": (nothing, DRY + " --mixed-precision fp16", "--mixed-precision no", DRY + " --mixed-precision no"),
    "no gpu": (nothing, DRY + " --device cuda", "--device cpu", DRY + " --device cpu"),
    "no such device": (nothing, DRY + " --device quantum", "cpu", DRY + " --device cpu"),
    "unknown flag": (nothing, DRY + " --frobnicate", "train_autoencoder.py --help", "train_autoencoder --help"),
    "unknown key": (nothing, DRY + " --train.stepz 3", "--print-config", "train_autoencoder --print-config"),
    "unknown config": (nothing, DRY + " --config smok", "smoke", DRY + " --config smoke"),
    "no vision model": (nothing, DRY + " --loss.align 0.5", "loss.align 0", DRY + " --loss.align 0"),
    "no LPIPS weights": (nothing, DRY + " --loss.perceptual 1 --loss.perceptual_weights standard",
                         "--loss.perceptual_weights random", DRY + " --loss.perceptual_weights random"),
    "a run is there": (nothing, "train_denoiser --latents {latents} --output {denoiser} {D}", "--resume auto",
                       "train_denoiser --latents {latents} --output {denoiser} {D} --resume auto"),
    "no index": (unindexed, "train_autoencoder --data '{tmp}/my [data]' {A} --dry-run", "make_shards.py index", RUN),
    "no captions": (captionless, "make_shards pack {tmp}/in --output {tmp}/out --resolution 16",
                    "--missing-caption empty",
                    "make_shards pack {tmp}/in --output {tmp}/out --resolution 16 --missing-caption empty"),
    "broken picture": (broken, "make_shards pack {tmp}/in --output {tmp}/out --resolution 16", "--on-bad-data skip",
                       "make_shards pack {tmp}/in --output {tmp}/out --resolution 16 --on-bad-data skip"),
    "folder taken": (taken, "make_shards pack {tmp}/in --output {tmp}/out --resolution 16", "another --output",
                     "make_shards pack {tmp}/in --output {tmp}/other --resolution 16"),
    "root of a folder": (taken, "make_shards pack {tmp}/in --root x --output {tmp}/new --resolution 16",
                         "make_shards.py pack", "make_shards pack {tmp}/in --output {tmp}/new --resolution 16"),
    "pictures are there": (drawn, "generate --model {denoiser} --prompt red --output {tmp}/out --device cpu",
                           "--overwrite",
                           "generate --model {denoiser} --prompt red --output {tmp}/out --device cpu --overwrite"),
    "what to measure": (nothing, "evaluate --model {denoiser} --device cpu", "--obedience shapes",
                        "evaluate --model {denoiser} --device cpu --obedience shapes --count 4 --batch-size 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_hint_followed_comes_further(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    prepare, wrong, expected, right = SCENARIOS[name]
    needed = {key for key in ("shapes", "latents", "denoiser") if f"{{{key}}}" in wrong + right}
    needed |= {"shapes"} if prepare is unindexed else set()
    place = Place(tmp_path, **{key: request.getfixturevalue(key) for key in needed})
    prepare(place)
    refused = place.outcome(wrong)
    assert isinstance(refused, UserError) and expected in refused.hint, refused
    if right == RUN:
        command = shlex.split(re.split(r"(?:: |; )(?=\S*python)", refused.hint)[-1])
        script = next(word for word in command if word.endswith(".py"))
        assert tiny.call(Path(script).stem, *command[command.index(script) + 1 :]) == 0
        right = wrong
    assert place.outcome(right) == 0


def test_every_scenario_follows_a_hint() -> None:
    made_of_parts = {"no data", "unknown flag"}  # whose text does not stand in the source
    assert set(SCENARIOS) - made_of_parts <= set(TABLE.values())
