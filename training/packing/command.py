"""The command line of `scripts/make_shards.py`: verbs pack, index and verify."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from glob import glob
from pathlib import Path
from typing import get_args

from training.errors import DATA, USAGE, UserError
from training.ledger import Ledger
from training.messages import answer, warn
from training.packing.builtin_sources import Emoji, FashionMnist, Shapes
from training.packing.pack import pack
from training.packing.settings import Settings
from training.packing.sources import Folder, Source, Tars
from training.pictures.decoding import MAX_PIXELS, Crop
from training.settings.flags import Parser
from training.shards.index import read_index
from training.shards.indexing import index_folder
from training.shards.verifying import verify

ADDRESS = re.compile(r"pipe:|[a-z0-9]+://")
MOST_SHARDS = 1_000_000  # that one pattern may mean
EXAMPLES = """examples:
  make_shards.py pack photos/ --output data/photos --resolution 64
  make_shards.py pack 'tars/{00000..00009}.tar' --output data/web --resolution 128 --on-bad-data skip
  make_shards.py pack fashion-mnist --root /usr/share/datasets/fashion-mnist --output data/fashion
  make_shards.py pack shapes --samples 60000 --output data/shapes
  make_shards.py pack emoji --root package --output data/emoji --resolution 64
  make_shards.py verify data/photos
"""


def braces(pattern: str) -> list[str]:
    """`a{00..02}b` or `a{x,y}b` written out, ranges keeping their width. Raises UserError for more than MOST_SHARDS."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if ends:
        if int(ends[2]) - int(ends[1]) >= MOST_SHARDS:
            raise UserError(f"{pattern}: more than {MOST_SHARDS:,} shards", hint="name them in several packings")
        words = [f"{number:0{len(ends[1])}d}" for number in range(int(ends[1]), int(ends[2]) + 1)]
    else:
        words = match[1].split(",")
    return [rest for word in words for rest in braces(pattern[: match.start()] + word + pattern[match.end() :])]


def _local(pattern: str) -> list[Path]:
    """The files that a pattern means: all that a star matches, every one that braces write out."""
    names = braces(pattern)
    if "*" in pattern:
        return [path for name in names for path in map(Path, sorted(glob(name))) if path.is_file()]
    paths = [path for path in map(Path, names) if path.is_file()]
    if paths and len(paths) < len(names):
        missing = [name for name in names if not Path(name).is_file()]
        what = f"{len(missing)} of the {len(names)} shards of '{pattern}' are missing (first: {missing[0]})"
        raise UserError(what, hint="name those that are there, or use a star", code=DATA)
    return paths


def find_tars(patterns: list[str]) -> list[Path]:
    """The tars that names, globs and brace patterns mean. Raises UserError where one matches nothing or is no local
    file."""
    tars: dict[Path, None] = {}
    for pattern in patterns:
        if ADDRESS.match(pattern):
            raise UserError(f"{pattern}: only local files are read", hint="download the tars first", code=USAGE)
        paths = _local(pattern)
        if not paths:
            raise UserError(f"no shards match '{pattern}'", hint="quote brace and star patterns", code=DATA)
        tars.update(dict.fromkeys(paths))
    return list(tars)


def find_source(arguments: argparse.Namespace) -> Source:
    """The source that the words after `pack` name."""
    names: list[str] = arguments.source
    if names == ["fashion-mnist"]:
        return FashionMnist(arguments.root)
    if names == ["emoji"] and arguments.root is not None:
        return Emoji(arguments.root)
    if arguments.root is not None:
        raise UserError(
            "--root goes with fashion-mnist and emoji; a folder is named in its place",
            hint="make_shards.py pack FOLDER",
            code=USAGE,
        )
    if names == ["shapes"]:
        held = max(round(arguments.samples * arguments.val_fraction), 1) if arguments.val_fraction else 0
        return Shapes(arguments.samples, held, arguments.seed, arguments.resolution)
    if len(names) == 1 and Path(names[0]).is_dir():
        return Folder(Path(names[0]))
    if all(name.endswith((".tar", "}")) or "*" in name or ADDRESS.match(name) for name in names):
        return Tars(find_tars(names))
    hint = "SOURCE is a folder of pictures, tars (braces, stars), fashion-mnist, shapes, or emoji with --root"
    raise UserError(f"{names[0]}: no such folder", hint=hint, code=DATA)


def build_parser() -> Parser:
    """The verbs and their flags."""
    parser = Parser("Captioned pictures to shards.", epilog=EXAMPLES)
    verbs = parser.add_subparsers(dest="verb", required=True)
    add = verbs.add_parser("pack", help="write shards from a source").add_argument
    add("source", nargs="+", metavar="SOURCE", help="a folder, tars, fashion-mnist, emoji or shapes")
    add("--output", type=Path, required=True, metavar="DIR")
    text = "fashion-mnist: where its idx files are, or may be downloaded to; emoji: emoji-datasource-google, unpacked"
    add("--root", type=Path, metavar="DIR", help=text)
    add("--samples", type=int, default=60_000, help="shapes: training pictures")
    add("--resolution", type=int, help="side of the packed pictures (shapes and fashion-mnist: 32, others: 64)")
    add("--crop", choices=get_args(Crop), default="center", help="what is kept of oblong pictures")
    add("--flip", action="store_true", help="also store each training picture mirrored")
    add("--val-fraction", type=float, default=0.02, help="share held out, by hash of the key; existing splits are kept")
    add("--seed", type=int, default=0, help="of shapes and random crops")
    add("--format", choices=("png", "jpg"), default="png")
    add("--missing-caption", choices=("error", "empty", "filename"), default="error")
    add("--on-bad-data", choices=("error", "skip"), default="error")
    add("--background", default="white", help="laid under transparent pictures")
    add("--upscale", action="store_true", help="take pictures smaller than --resolution")
    add("--limit", type=int, help="stop after so many pictures")
    add("--samples-per-shard", type=int, default=2000)
    text = "mixed: by hash of the key, so that every shard holds all kinds; source: as the source gives them"
    add("--order", choices=("mixed", "source"), default="mixed", help=text)
    text = "processes that decode and encode pictures, 0: this one; they do not change what is written"
    add("--num-workers", type=int, default=0, metavar="N", help=text)
    add("--animated", choices=("first", "reject"), default="first", help="take the first frame, or treat as bad data")
    add("--max-pixels", type=int, default=MAX_PIXELS, help="largest picture that is decoded")
    for verb, text in (("index", "index tars in place"), ("verify", "check every byte against the index")):
        add = verbs.add_parser(verb, help=text).add_argument
        add("directory", type=Path, metavar="DIR")
        left = "leave bad tars and members out" if verb == "index" else "name what is bad and exit with 0"
        add("--on-bad-data", choices=("error", "skip"), default="error", help=f"skip: {left}")
    return parser


def _pack(arguments: argparse.Namespace) -> None:
    if arguments.resolution is None:
        arguments.resolution = 32 if arguments.source in (["shapes"], ["fashion-mnist"]) else 64
    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
    if arguments.num_workers < 0:
        raise UserError(f"--num-workers: must be >= 0 (got {arguments.num_workers})")
    pack(find_source(arguments), arguments.output, settings, arguments.num_workers)


def main(argv: list[str] | None = None) -> None:
    """Runs one verb. Raises UserError."""
    arguments = build_parser().read(argv)
    if arguments.verb == "pack":
        _pack(arguments)
    elif arguments.verb == "index":
        infos = index_folder(arguments.directory, skip=arguments.on_bad_data == "skip")
        answer(f"{arguments.directory}: indexed {len(infos)} shards, {sum(info.samples for info in infos):,} samples")
        ledger = Ledger()
        ledger.merge(read_index(arguments.directory)[0]["summary"]["ledger"])
        _tell(ledger)
    else:
        _verify(arguments.directory, arguments.on_bad_data)


def _verify(directory: Path, on_bad_data: str) -> None:
    report = verify(directory)
    summary = f"{directory}: {report.shards} shards, {report.samples:,} samples, {report.bytes:,} bytes"
    if not report.problems:
        answer(f"{summary}: all sound")
        _tell(report.ledger)
        return
    problems = "\n  ".join(report.problems)
    what = f"{len(report.problems)} problems in {directory}:\n  {problems}"
    if on_bad_data == "error":
        hint = f"fetch or pack them again; if they were changed on purpose: scripts/make_shards.py index {directory}"
        raise UserError(what, hint=hint, code=DATA)
    answer(summary)
    warn(what)
    _tell(report.ledger)


def _tell(ledger: Ledger) -> None:
    for line in ledger.lines():
        answer(line)
