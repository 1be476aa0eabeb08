"""Every hint that proposes a flag or a command works when followed.

`hints.toml` beside this file has a line for each such message. A new one fails here until it has its line: the name of
a scenario of `followed.toml` (or several, with "; " between), which says this message and goes on by its words; a test
that follows it elsewhere (`tests/…py::test_…`); "cannot: " and why nothing here can; or, at last, "flags", where what
it names is looked up, as it is for all. Messages are found by their text, so that a changed one asks for its line anew.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from pathlib import Path

import hint_places
import hint_runs
import hints
import pytest
import tiny

from training.errors import UserError
from training.settings.decoding import STAGES, sections

TABLE = tomllib.loads((Path(__file__).parent / "hints.toml").read_text("utf-8"))
FOLLOWED = tomllib.loads((Path(__file__).parent / "followed.toml").read_text("utf-8"))
SHORT, SCENARIOS = FOLLOWED["short"], FOLLOWED["scenarios"]
PREPARED = vars(hint_places) | vars(hint_runs)
ASSIGNED = re.compile(r"[A-Z_]+=.*")
ALL = {hint.name: hint for hint in hints.hints()}
DOORS = sorted(path.stem for path in tiny.SCRIPTS.glob("*.py") if "run_main" in path.read_text())
# Scenarios of messages whose text is made of parts, none of which names a flag or command with its door.
MADE_OF_PARTS = {"no data", "unknown flag", "unknown config", "no captions", "broken picture", "precision of encoding"}
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
    doors = [Path(name.partition(":")[0]).stem] if room == "doors" else ROOMS.get(room, DOORS)
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
        assert set(path.split("; ")) <= set(SCENARIOS) or path == "flags" or path.startswith("cannot: ")


class Followed(hint_places.Place):
    """A scenario: commands of `followed.toml`, and what they end with."""

    def words(self, text: str) -> str:
        """A command with `{tmp}`, `{shapes}`, and the names of SHORT filled in."""
        for _ in range(3):
            text = re.sub(r"\{(\w+)\}", self._meant, text)
        return text

    def _meant(self, found: re.Match[str]) -> str:
        known = {**SHORT, "tmp": str(self.folder), "A": shlex.join(tiny.AUTOENCODER), "D": shlex.join(tiny.DENOISER)}
        return known[found[1]] if found[1] in known else str(self.made(found[1]))

    def call(self, command: str) -> UserError | int:
        """What `NAME=value SCRIPT WORDS` ends with."""
        words = shlex.split(self.words(command))
        while ASSIGNED.fullmatch(words[0]):
            self.patch.setenv(*words.pop(0).split("=", 1))
        script, *rest = words
        try:
            return tiny.call(script, *rest)
        except UserError as problem:
            return problem

    def step(self, text: str, wrong: str, said: str) -> UserError | int:
        """One step of what follows. Words within «» stand in the message; RUN is the command that stands there."""
        for quoted in re.findall("«(.*?)»", text):
            assert self.words(quoted) in said, f"{quoted!r} is not in:\n{said}"
        text = text.translate({ord("«"): None, ord("»"): None}).replace("--batch-size: ", "--batch-size ")
        if text.startswith("- "):
            removed, _, added = text[2:].partition(" + ")
            assert removed in wrong
            return self.call(wrong.replace(removed, "") + " " + added)
        if text.startswith("+ "):
            return self.call(f"{wrong} {text[2:]}")
        if text == "AGAIN":
            return self.call(wrong)
        if text.startswith("RUN"):
            return self.call(self.proposed(text[3:], said))
        return self.call(text)

    def proposed(self, places: str, said: str) -> str:
        """The command of the message, pasted; `places` tell what stands for its words in capitals."""
        commands = re.findall(r"\S*python\S* (?:'[^']*?|\S*?)(\w+)\.py'?((?: [^\n;]*)?)", said)
        assert commands, f"nothing to paste in:\n{said}"
        script, rest = commands[0 if places.startswith("1") else -1]
        places = places.removeprefix("1")
        for place in filter(None, (part.strip() for part in places.split(";"))):
            name, _, meant = place.partition("=")
            assert name in rest.split(), f"{name} is not in {rest}"
            rest = " ".join(meant if word == name else word for word in rest.split(" "))
        return f"{script} {rest}"


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_hint_followed_comes_further(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    wrong, *steps = SCENARIOS[name]
    prepare, colon, command = wrong.partition(": ")
    place = Followed(tmp_path, request, monkeypatch)
    if colon:
        for one in prepare.split("+"):
            PREPARED[one](place)
        wrong = command
    place.words(" ".join([wrong, *steps]))  # makes the data and runs that are needed
    capfd.readouterr()
    said = f"{place.call(wrong)}\n{''.join(capfd.readouterr()[::-1])}"
    lines = [ALL[line] for line, scenario in TABLE.items() if name in scenario.split("; ") and line in ALL]
    assert [line.text for line in lines if not line.stands_in(said)] == [], said
    for text in steps:
        later = text.startswith("later: ")
        outcome = place.step(text.removeprefix("later: "), wrong, said)
        now = f"{outcome}\n{''.join(capfd.readouterr()[::-1])}"
        assert outcome == 0 or later, now
    assert not [line.text for line in lines if line.stands_in(now)], now


def test_every_scenario_follows_a_hint() -> None:
    assert set(SCENARIOS) - MADE_OF_PARTS <= {name for value in TABLE.values() for name in value.split("; ")}
