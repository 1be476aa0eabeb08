"""The command line that every script shares: flags, aliases, and how errors leave the program. Free of torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.commands import door, own_name, own_verb
from training.errors import USAGE, UserError
from training.messages import hush
from training.settings import foreign
from training.settings.embedded import check_model
from training.settings.families import FAMILIES, all_kinds, suggestion, unknown_key, unknown_kind
from training.settings.net import run_main as run_main  # of every script
from training.settings.sections import Conditioning, Loss, Optimizer, Sample, Train

# Flags that stand for a config key, with the names that users of diffusers' training scripts know.
KEYS = {
    "max-steps": ("train.max_steps", "optimiser steps in all", ["max-train-steps"]),
    "batch-size": ("train.batch_size", "images per optimiser step, over all processes", []),
    "micro-batch-size": ("train.micro_batch_size", "images per process and backward, or auto", ["train-batch-size"]),
    "lr": ("optimizer.lr", "learning rate", ["learning-rate"]),
    "seed": ("train.seed", "seed of weights, order and noise", []),
    "save-every": ("train.save_every", "steps between checkpoints", ["checkpointing-steps"]),
    "keep-last": ("train.keep_last", "checkpoints kept", ["checkpoints-total-limit"]),
    "sample-every": ("train.sample_every", "steps between pictures and validation", ["validation-steps"]),
    "num-workers": ("train.num_workers", "loader processes", ["dataloader-num-workers"]),
    "mixed-precision": ("train.mixed_precision", "no, bf16 or fp16", []),
    "lr-warmup-steps": ("optimizer.warmup", "steps in which the rate rises", []),
    "lr-scheduler": ("optimizer.decay", "constant, cosine or linear, after the warm-up", []),
    "max-grad-norm": ("optimizer.clip", "largest gradient norm; 0 = no clipping", []),
    "adam-weight-decay": ("optimizer.weight_decay", "weight decay", []),
}
ALIASES = {
    "output-dir": "output",
    "resume-from-checkpoint": "resume",
    "gradient-accumulation": "gradient-accumulation-steps",
} | {alias: flag for flag, (_, _, aliases) in KEYS.items() for alias in aliases}
# Sections of one kind, whose keys and numbers can be judged without torch; `configs.decode` judges all the rest.
PLAIN: dict[str, type] = {"conditioning": Conditioning, "loss": Loss, "optimizer": Optimizer, "sample": Sample,
                          "train": Train}  # fmt: skip
STREAM = {
    "autoencoder": "read --data, here tars ('a/{000..123}.tar', addresses, pipe:COMMAND), from front to end, without an"
    " index, in the order they come; a resumed run reads others, so it is not the run that was not stopped",
    "denoiser": "read the shards of --latents from front to end, none kept on disk, in the order they come; a resumed"
    " run reads others, so it is not the run that was not stopped",
}


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there are any, and keeps the layout of the description."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default not in (None, False, "", [], argparse.SUPPRESS)
        return (action.help or "") + (" (default: %(default)s)" if shown else "")


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are UserErrors, and which reads `--a_b` as `--a-b`."""

    part = ""  # whose config keys may be flags: a stage, or "sampling"

    def __init__(self, description: str = "", epilog: str = "", prog: str | None = None) -> None:
        named = own_name() if prog is None else prog
        super().__init__(prog=named, description=description, epilog=epilog, formatter_class=Help, allow_abbrev=False)

    def error(self, message: str) -> Any:
        """Raises UserError (exit 2), where argparse would end the program itself."""
        command = door(self.prog.replace(own_name(), own_verb(), 1), "--help")
        raise UserError(message, hint=f"{command} lists the flags", code=USAGE)

    def machine(self, group: Any = None, device: str = "auto") -> None:
        """Where a door computes (`device` unless told; "": nowhere of its own), and what it shows of its work."""
        add = (group or self).add_argument
        if device:
            add("--device", default=device, help="auto, cpu, cuda, cuda:N or mps")
        add("--quiet", action="store_true", help="say nothing but warnings, errors and what is asked for")
        add("--debug", action="store_true", help="show tracebacks")

    def add_data(self, text: str, required: bool = False) -> None:
        """The packed pictures that a door reads, and where those of an address are kept."""
        self.add_argument("--data", metavar="DIR", required=required, help=text)
        add_cache(self)

    def read(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Parse `argv`; flags may be spelled with hyphens or underscores, or by their alias."""
        args = self.parse_args(self._spelled(argv, dotted=False))
        check_inputs(args)
        return args

    def read_with_keys(self, argv: list[str] | None = None) -> argparse.Namespace:
        """As `read`, but unknown `--section.key value` pairs are kept: `.overrides` maps `section.key` to its text."""
        self.part = "sampling"
        args = self._keyed(argv)
        check_keys({"sampler.kind": args.sampler, **args.overrides} if args.sampler else args.overrides)
        check_inputs(args)
        return args

    def _spelled(self, argv: list[str] | None, *, dotted: bool) -> list[str]:
        """The words in our spelling. Raises UserError for flags that are none of ours."""
        words = sys.argv[1:] if argv is None else argv
        hush("--quiet" in words)
        self._refuse_unknown(words, dotted=dotted)
        return [canonical_word(word) for word in words]

    def _keyed(self, argv: list[str] | None) -> argparse.Namespace:
        args, rest = self.parse_known_args(self._spelled(argv, dotted=True))
        args.overrides = self._dotted(rest)
        return args

    def _dotted(self, rest: list[str]) -> dict[str, str]:
        values: dict[str, str] = {}
        words = iter(rest)
        for word in words:
            flag, equals, value = word[2:].partition("=")
            if not word.startswith("--"):
                self.error(f"unrecognized argument: {word}")
            try:
                values[flag] = value if equals else next(words)
            except StopIteration:
                self.error(f"{word}: expected a value")
        return values

    def _refuse_unknown(self, words: list[str], *, dotted: bool) -> None:
        """Refuse, all at once, flags that are none of ours, each with what it is here. Raises UserError."""
        options = self._options()
        flags = [word.partition("=")[0] for word in (words[: words.index("--")] if "--" in words else words)]
        flags = [flag for flag in flags if re.match(r"--\w|-[A-Za-z]", flag) and not (dotted and "." in flag)]
        unknown = {flag: canonical_word(flag) for flag in flags if canonical_word(flag) not in options}
        said = [flag + self._advice(flag, name, options) for flag, name in unknown.items()]
        if said:
            separator = "\n       "
            some = f"unrecognized arguments:{separator}" if said[1:] else "unrecognized argument: "
            self.error(some + separator.join(said))

    def _advice(self, flag: str, name: str, options: list[str]) -> str:
        bare = flag.lstrip("-").replace("_", "-")
        if keys := foreign.keys_named(bare.replace("-", "_"), self.part):
            return f"; did you mean '--{keys[0]}'?" if not keys[1:] else f"; is it {', '.join(f'--{k}' for k in keys)}?"
        if here := foreign.meaning(bare, own_verb()):
            return f"; here: {here}"
        return suggestion(name, options, cutoff=0.8)

    def _options(self) -> list[str]:
        """Every flag, of the verbs too."""
        verbs = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        parsers = [self, *(parser for choices in verbs for parser in choices.values())]
        return [option for parser in parsers for option in parser._option_string_actions]


def written_out(overrides: Mapping[str, str]) -> list[str]:
    """`section.key -> text` as words of a command line, by the flag that stands for a key where one does."""
    flags = {key: flag for flag, (key, _, _) in KEYS.items()}
    return [word for key, text in overrides.items() for word in (f"--{flags.get(key, key)}", text)]


def canonical_word(word: str) -> str:
    """`--train_batch_size=4` -> `--micro-batch-size=4`; config keys keep their underscores."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word[2:].partition("=")
    flag = flag.replace("-", "_") if "." in flag else flag.replace("_", "-")
    return "--" + ALIASES.get(flag, flag) + equals + value


def check_keys(overrides: Mapping[str, str]) -> None:
    """Refuse what shows to be wrong of `section.key -> text` before torch is loaded: kinds, plain keys and numbers.

    Raises UserError with all of it.
    """
    problems = [f"command line: {reason}" for key, text in overrides.items() if (reason := _wrong(key, text))]
    if problems:
        raise UserError("\n       ".join(problems), hint="--print-config shows every key, --help every kind")


def _wrong(key: str, text: str) -> str:
    section, _, name = key.partition(".")
    if name == "kind" and section in FAMILIES:
        there = all_kinds(section)
        return "" if text in there else unknown_kind(section, text, there)
    if section not in PLAIN:
        return ""
    types = {field.name: field.type for field in dataclasses.fields(PLAIN[section])}
    if name not in types:
        return unknown_key(section, name, list(types))
    try:
        float(text if types[name] in ("int", "float") else 0)
    except ValueError:
        expected = "a whole number" if types[name] == "int" else "a number"
        return f"{key}: expected {expected}, got {json.dumps(text)}"
    return ""


def check_least(args: argparse.Namespace, least: Mapping[str, int], hint: str = "") -> None:
    """Raises UserError for a number below the least that means anything."""
    for name, number in least.items():
        if (given := getattr(args, name)) < number:
            raise UserError(f"--{name.replace('_', '-')}: must be at least {number} (got {given})", hint=hint)


def check_inputs(args: argparse.Namespace) -> None:
    """Refuse runs and folders of shards that are not there, before torch is loaded. Raises UserError."""
    for run in (getattr(args, name, None) for name in ("model", "autoencoder", "base")):
        if run is not None:
            check_model(run)
    for kind in ("data", "latents"):
        folder = getattr(args, kind, None)
        if getattr(args, "stream", False) and folder == getattr(args, "data", None):
            continue  # it names tars, no folder
        if folder and ":" not in str(folder):  # an address is read, or refused, by those who know its kind
            from training.guarding import no_index

            if not (Path(folder) / "index.json").is_file():
                raise no_index(Path(folder), latents=kind == "latents")


class TrainParser(Parser):
    """The flags of both training scripts, plus any config key as `--section.key value`."""

    def __init__(self, description: str, stage: str, configs: str = "") -> None:
        super().__init__(
            description,
            epilog="Any config key can be set: --section.key value. See them all, as resolved, with --print-config.",
        )
        self.stage, self.part, self.source = stage, stage, {"autoencoder": "data", "denoiser": "latents"}[stage]
        self.configs = configs or stage
        self.data = self.add_argument_group("data")
        text = "a sample that cannot be read: stop, or fill its place with another (up to 1 %%)"
        self.data.add_argument("--on-bad-data", choices=("error", "skip"), default="skip", help=text)
        add_cache(self.data)
        add_stream(self.data, stage)
        run = self.add_argument_group("run")
        proposed = "" if configs else "; when not given, one is proposed for the data and the device"
        text = f"a config of configs/{self.configs}/, or a file{proposed}"
        run.add_argument("--config", metavar="NAME|FILE", help=text)
        run.add_argument("--output", metavar="DIR", help="the run folder")
        text = "auto: newest sound checkpoint, or start fresh; latest: it must exist"
        run.add_argument("--resume", metavar="auto|latest|PATH", help=text)
        text = "go on with another --batch-size than the run's"
        run.add_argument("--allow-batch-change", action="store_true", help=text)
        run.add_argument("--init-from", metavar="RUN", help="take the weights of another run, nothing else")
        text = "tell metrics and pictures to trackers too, with commas between: tensorboard, wandb, mlflow, trackio ..."
        run.add_argument("--report-to", metavar="NAMES", default="none", help=text)
        run.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
        run.add_argument("--dry-run", action="store_true", help="check config, data and model, then stop")
        self.machine(run)
        keys = self.add_argument_group("config keys with a flag of their own")
        for flag, (key, text, aliases) in KEYS.items():
            also = f" (also --{', --'.join(aliases)})" if aliases else ""
            keys.add_argument(f"--{flag}", metavar="X", default=argparse.SUPPRESS, help=f"{text}; sets {key}{also}")
        text = "backward passes per optimiser step; follows from the batch sizes when not given"
        keys.add_argument("--gradient-accumulation-steps", metavar="X", type=int, default=argparse.SUPPRESS, help=text)

    def read_training(self, argv: list[str] | None = None) -> argparse.Namespace:
        """As `read_with_keys`, the flags that stand for a config key among the overrides, and no path missing."""
        from training.settings.decoding import names

        args = self._keyed(argv)
        flags = {KEYS[f][0]: text for f in KEYS if (text := getattr(args, f.replace("-", "_"), None)) is not None}
        args.overrides = flags | args.overrides
        check_keys(args.overrides)
        stage = "adapter" if getattr(args, "base", None) else self.configs
        known = not args.config or Path(args.config).exists() or args.config.removesuffix(".toml") in names(stage)
        if known and not args.print_config:  # a config that is not there is told first, when it is read
            self._check_paths(args)
        return args

    def _check_paths(self, args: argparse.Namespace) -> None:
        if not getattr(args, self.source):
            raise UserError(f"--{self.source} is missing", hint=f"name the folder of shards: --{self.source} DIR")
        if not args.output and not args.dry_run:
            raise UserError("--output is missing", hint="name the run folder: --output runs/NAME")
        if getattr(args, "resolution", None) and not args.stream:
            hint = f"pack with: {door('make_shards pack SOURCE --output DIR --resolution N')}"
            raise UserError("--resolution is that of the packed pictures; here it is for --stream alone", hint=hint)
        check_inputs(args)


def add_cache(group: Any) -> None:
    """The flags of data that lie at an address."""
    text = "where shards read from an address (s3://, https:// ...) are kept; the user's cache folder if not given"
    group.add_argument("--cache-dir", metavar="DIR", help=text)
    text = "of these shards, GB; those not read for longest are removed"
    group.add_argument("--cache-size", metavar="GB", type=float, default=20.0, help=text)


def add_stream(group: Any, stage: str) -> None:
    """The flags of shards that are read as a stream."""
    group.add_argument("--stream", action="store_true", help=STREAM[stage])
    text = "records that --stream mixes among each other in each loader process"
    group.add_argument("--shuffle-buffer", metavar="N", type=int, default=1000, help=text)
    if stage == "autoencoder":
        text = "of the pictures of a --stream, which are fitted to it; packed pictures have theirs"
        group.add_argument("--resolution", metavar="N", type=int, help=text)
