"""Configs: TOML or JSON in, one frozen typed object out, every mistake at once with file and line."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from training.errors import UserError
from training.files import finite
from training.machine.launcher import first_process
from training.messages import note
from training.settings import plugins, reading
from training.settings.families import families, suggestion, unknown_key, unknown_kind
from training.settings.reading import Values as Values
from training.settings.reading import names as names
from training.settings.reading import parse, read
from training.settings.sections import Conditioning, Format, Loss, Optimizer, Prior, Sample, Train
from training.settings.upgrading import upgrade, version

if TYPE_CHECKING:
    from autoencoder.discriminator import Discriminator
    from ldm.schedules import NoiseSchedule
    from ldm.students import Student

DRAWING = ("sampler", "grid", "guidance")
ASKED = "command line"  # where a value of a flag stands
ASKED_HINT = "--help names what can be given; of a training --print-config shows every key"
MOST_TOLD = 20  # mistakes named at once; of more only the number is told


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Stage one: the model, its losses and critic, and how long to train."""

    model: Any
    loss: Loss
    latent: Any
    discriminator: Discriminator
    optimizer: Optimizer
    train: Train


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """Stage two: backbone and text encoder, the process it learns, and how pictures are sampled."""

    backbone: Any
    text: Any
    adapter: Any
    conditioning: Conditioning
    image: Any
    schedule: NoiseSchedule
    prediction: Any
    times: Any
    weighting: Any
    pairing: Any
    objective: Any
    representation: Any
    student: Student
    prior: Prior
    optimizer: Optimizer
    train: Train
    sample: Sample
    sampler: Any
    grid: Any
    guidance: Any
    format: Format = Format()  # noqa: RUF009  # frozen, without state


Config = AutoencoderConfig | DenoiserConfig
STAGES: dict[str, type] = {"autoencoder": AutoencoderConfig, "denoiser": DenoiserConfig}


@cache
def sections(stage: str) -> dict[str, tuple[type, ...]]:
    """The sections of a stage's config, each with the kinds it may hold, installed packages' last; the first is the
    default. Raises UserError where such a package is at fault."""
    named = {name: (own, kinds(own)) for name, own in families(stage).items()}
    return {name: own + plugins.members(name, known) if known else own for name, (own, known) in named.items()}


def kinds(members: tuple[type, ...]) -> list[str]:
    """The names by which the members of a family are chosen (empty for a section of one plain kind)."""
    return [str(f.default) for m in members for f in dataclasses.fields(m) if f.name == "kind"]


def load(stage: str, source: str, overrides: Mapping[str, str] | None = None, as_of: int | None = None) -> Config:
    """Read config NAME or FILE, lay `section.key -> text` overrides over it, and validate the whole.

    `as_of`: the version of a run that goes on, which then counts instead of the one that the file names.
    Raises UserError listing every unknown key, wrong type and refused value.
    """
    text, where = reading.read(stage, source)
    own = reading.parse(text, where)
    if not as_of and stage == "denoiser" and "format" not in own:
        note(f"{where} has no [format] version and is read as version 1")
    values = lay_over(stage, upgrade(own, sections(stage), as_of or version(own)), overrides or {}, where)
    lines = {key: f"{where}:{line}" for key, line in reading.lines(text)}
    lines |= dict.fromkeys(overrides or {}, ASKED)
    return decode(stage, values, lines)


def decode_stored(stage: str, values: Values, lines: Mapping[str, str] | None = None) -> Config:
    """What a run's config.json, of whatever version, means."""
    return decode(stage, upgrade(values, sections(stage), version(values)), lines)


def lay_over(stage: str, values: Values, overrides: Mapping[str, str], where: str) -> Values:
    """`overlay`, where an override may choose another kind than the values of `where` have.

    A sampler, grid or guidance of another kind starts from its defaults; another kind elsewhere, a network say, keeps
    the keys that both have. What is dropped so and was not a default is said.
    """
    dropped: list[str] = []
    for name, members in sections(stage).items():
        section, kind = values.get(name, {}), reading.literal(overrides.get(f"{name}.kind", "null"))
        by_kind = dict(zip(kinds(members), members, strict=False))
        before = isinstance(section, dict) and by_kind.get(str(section.get("kind", next(iter(by_kind), ""))))
        if kind not in by_kind or not before or by_kind[kind] is before:
            continue
        rules = upgrade({"format": values.get("format", {}), name: {"kind": kind}}, sections(stage), version(values))
        new = {field.name for field in dataclasses.fields(by_kind[kind])}
        kept = rules[name] if name in DRAWING else {key: value for key, value in section.items() if key in new}
        plain = {f.name: json.loads(json.dumps(f.default, default=str)) for f in dataclasses.fields(before)}
        gone = [key for key in section if key not in {"kind", *kept} and section[key] != plain.get(key)]
        dropped += [f"{name}.{key}" for key in gone if f"{name}.{key}" not in overrides]
        values = {**values, name: kept}
    if dropped and first_process():
        note(f"{where}: not used with another kind: {', '.join(dropped)}")
    return overlay(values, overrides)


def overlay(values: Values, overrides: Mapping[str, str]) -> Values:
    """Values with `section.key -> text` laid over them."""
    result = {name: dict(section) if isinstance(section, dict) else section for name, section in values.items()}
    for key, raw in overrides.items():
        section, _, name = key.partition(".")
        if isinstance(part := result.setdefault(section, {}), dict):
            part[name] = reading.literal(raw)
    return result


def decode(stage: str, values: Values, lines: Mapping[str, str] | None = None, folder: str = "") -> Config:
    """Plain sections -> typed config. `lines` names the place of each `section.key` for error messages, `folder` where
    in configs/ there are others, if not in that of the stage."""
    problems: list[str] = []
    parts: dict[str, Any] = {}
    known = sections(stage)
    unknown = sorted(values.keys() - known.keys())
    for name in unknown[:MOST_TOLD]:
        problems.append(_at(lines, name) + f"unknown section [{name}]{suggestion(name, list(known))}")
    for name, members in known.items():
        section = values.get(name, {})
        if not isinstance(section, dict):
            problems.append(_at(lines, name) + f"{name}: expected a section [{name}], got {json.dumps(section)}")
            continue
        part, wrong = _section(name, members, section)
        parts[name] = part
        problems += [_at(lines, key) + message for key, message in wrong]
    if problems:
        told = [problem[:2000] for problem in sorted(problems)[:MOST_TOLD]]
        more = [f"{len(unknown)} unknown sections in all"] if unknown[MOST_TOLD:] else []
        more += [f"and {len(problems) - MOST_TOLD} more mistakes"] if problems[MOST_TOLD:] else []
        asked = all(problem.startswith(ASKED) for problem in problems)
        hint = f"see the keys with --print-config, or start from: {', '.join(names(folder or stage))}"
        raise UserError("\n       ".join(told + more), hint=ASKED_HINT if asked else hint)
    config: Config = STAGES[stage](**parts)
    if isinstance(config, DenoiserConfig):
        try:
            config.grid(config.sample.steps, config.schedule)
        except ValueError as refused:
            hint = "see the keys of the grid with --print-config"
            raise UserError(_at(lines, "grid.kind") + f"grid: {refused}", hint=hint) from None
    return config


def chosen(section: str, overrides: Mapping[str, str]) -> Any:
    """The member of an "editing" family that `section.key -> text` ask for. Raises UserError for what it has not."""
    keys = {key.partition(".")[2]: text for key, text in overrides.items() if key.partition(".")[0] == section}
    members = sections("editing")[section]
    part, wrong = _section(section, members, {name: reading.literal(text) for name, text in keys.items()})
    if wrong:
        raise UserError("\n       ".join(f"{ASKED}: {message}" for _, message in wrong),
                        hint=f"--{section}.kind is one of {', '.join(kinds(members))}")
    return part


def values_of(member: Any) -> Values:
    """The settings of a member of a family as plain data; `recalled` takes them back."""
    return json.loads(json.dumps(dataclasses.asdict(member), allow_nan=False))  # type: ignore[no-any-return]


def recalled(section: str, values: Mapping[str, Any]) -> Any:
    """The member whose settings were told by `values_of`. Raises UserError where they are none of the family's."""
    return chosen(section, {f"{section}.{key}": json.dumps(value) for key, value in values.items()})


def stated(stage: str, source: str, key: str) -> Any:
    """What a config itself says of `section.key`; None where it leaves it to the default."""
    section, _, name = key.partition(".")
    part = parse(*read(stage, source)).get(section)
    return part.get(name) if isinstance(part, dict) else None


def to_values(config: Config) -> Values:
    """The whole config as plain JSON data; `decode` is its inverse."""
    return json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))  # type: ignore[no-any-return]


def diff(old: Values, new: Values) -> list[str]:
    """The keys in which two configs differ, as `section.key: old -> new`."""
    flat = [{f"{s}.{k}": v for s, section in side.items() for k, v in section.items()} for side in (old, new)]
    keys = sorted(flat[0].keys() | flat[1].keys())
    return [f"{k}: {flat[0].get(k)} -> {flat[1].get(k)}" for k in keys if flat[0].get(k) != flat[1].get(k)]


def _section(name: str, members: tuple[type, ...], values: dict[str, Any]) -> tuple[Any, list[tuple[str, str]]]:
    from pydantic import ValidationError

    kind_names = kinds(members)
    if kind_names:
        values = {"kind": kind_names[0], **values}
        if values["kind"] not in kind_names:
            return None, [(f"{name}.kind", unknown_kind(name, str(values["kind"]), kind_names))]
    member = members[kind_names.index(values["kind"])] if kind_names else members[0]
    fields = [f.name for f in dataclasses.fields(member)]
    texts = {f.name for f in dataclasses.fields(member) if str(f.type).startswith(("tuple[str, ...", "tuple[Literal"))}
    values = {k: [part.strip() for part in v.split(",") if part.strip()] if k in texts and isinstance(v, str) else v
              for k, v in values.items()}  # fmt: skip
    unknown = [k for k in values if k not in fields]
    mistakes = [(f"{name}.{k}", _unknown(name, k, fields, members, values)) for k in unknown[:MOST_TOLD]]
    if unknown[MOST_TOLD:]:
        mistakes.append((name, f"{name}: {len(unknown)} unknown keys"))
    try:
        plain = json.dumps({k: v for k, v in values.items() if k in fields}, default=str)  # TOML also has dates
        part = _adapter(member).validate_json(plain, strict=True)
        whole = dataclasses.asdict(part)  # with the defaults, which are not looked at above
        endless = [key.removesuffix("_is") for key in finite(whole).keys() - whole.keys()]
        mistakes += [(f"{name}.{key}", f"{name}.{key}: expected a finite number, got {whole[key]}") for key in endless]
        return part, mistakes
    except ValidationError as failure:
        for error in failure.errors():
            place = [str(p) for p in error["loc"]]
            reason, field = _reason(error), place[0] if place else ""
            if not place and (match := re.match(r"(\w+): ", reason)) and match[1] in fields:
                reason, field = reason[match.end() :], match[1]  # a member's own check that names its key
            key = f"{name}.{field}" if field else name
            mistakes.append((key, f"{key}: {reason}"))
        return None, mistakes


def _unknown(name: str, key: str, field_names: list[str], members: tuple[type, ...], values: dict[str, Any]) -> str:
    """What to say of a key that the chosen kind does not have: whose it is, or what may have been meant."""
    owners = kinds(tuple(m for m in members if key in {f.name for f in dataclasses.fields(m)}))
    if not owners:
        return unknown_key(name, key, field_names)
    takes = ", ".join(k for k in field_names if k != "kind") or "no keys"
    return f"'{name}.{key}' belongs to kind {', '.join(owners)}; kind {values['kind']} takes {takes}"


@cache
def _adapter(member: type) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    # The families are plain dataclasses, free of pydantic; the attribute is how pydantic lets such a class be strict.
    member.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[attr-defined]
    return TypeAdapter(member)


def _reason(error: Any) -> str:
    text = json.dumps(error["input"], default=str)
    type_name = {
        "float_type": "a number",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "bool_type": "true or false",
        "string_type": "a text",
        "tuple_type": "a list",
        "finite_number": "a finite number",
    }.get(error["type"])
    if type_name:
        return f"expected {type_name}, got {text}"
    return f"{error['msg'].removeprefix('Value error, ')}" + ("" if error["type"] == "value_error" else f", got {text}")


def _at(lines: Mapping[str, str] | None, key: str) -> str:
    place = (lines or {}).get(key) or (lines or {}).get(key.partition(".")[0])
    return f"{place}: " if place else ""
