"""Pack captioned pictures into shards; index tars where they lie; verify every byte."""

from __future__ import annotations

import argparse
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import get_args

from training.commands import door
from training.errors import DATA, UserError
from training.ledger import Ledger
from training.messages import answer, warn
from training.next_step import beside, tell_next
from training.packing.buckets import add_bucket_flags, asked_buckets
from training.packing.finding import add_source_flags, find_source
from training.packing.hints import hint_files
from training.packing.pack import pack
from training.packing.ray_pool import ray_pool
from training.packing.settings import Settings
from training.packing.workers import Processes, Start
from training.pictures.decoding import MAX_PIXELS, MOST_PIXELS, Crop
from training.pictures.flags import add_hint_flags, add_picture_flags
from training.settings.flags import Parser
from training.shards.index import read_index
from training.shards.indexing import index_folder
from training.shards.verifying import verify

EXAMPLES = """pack photos/ --output data/photos --resolution 64
pack 'tars/{00000..00009}.tar' --output data/web --resolution 128 --on-bad-data skip
pack photos.zip --output data/photos --caption-column prompt
pack photos/ --output data/shaped --resolution 64 --buckets
pack photos/ --output data/outlined --resolution 64 --hint edges
pack photos/ --output data/deep --resolution 64 --hint depth --hint-files depths/
pack fashion-mnist --root /usr/share/datasets/fashion-mnist --output data/fashion
pack shapes --samples 60000 --output data/shapes
pack emoji --root package --output data/emoji --resolution 64
verify data/photos
"""


def build_parser() -> Parser:
    """The verbs and their flags."""
    examples = "".join(f"  {door(f'make_shards {line}')}\n" for line in EXAMPLES.splitlines())
    parser = Parser("Captioned pictures to shards.", epilog=f"examples:\n{examples}")
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing = verbs.add_parser("pack", help="write shards from a source")
    add = packing.add_argument
    add("source", nargs="+", metavar="SOURCE", help="a folder, zip, tars, parquet, fashion-mnist, emoji or shapes")
    add("--output", type=Path, required=True, metavar="DIR")
    text = "fashion-mnist: where its idx files are, or may be downloaded to; emoji: emoji-datasource-google, unpacked"
    add("--root", type=Path, metavar="DIR", help=text)
    add("--samples", type=int, default=60_000, help="shapes: training pictures")
    add("--resolution", type=int, help="side of the packed pictures (shapes and fashion-mnist: 32, others: 64)")
    add_bucket_flags(packing)
    add("--crop", choices=get_args(Crop), default="center", help="what is kept of oblong pictures")
    add("--flip", action="store_true", help="also store each training picture mirrored")
    add("--val-fraction", type=float, default=0.02, help="share held out, by hash of the key; existing splits are kept")
    add("--seed", type=int, default=0, help="of shapes and random crops")
    add("--format", choices=("png", "jpg"), default="png")
    text = "what a picture without one gets: nothing, its file's name, or the name of its folder, as of a class"
    add("--missing-caption", choices=("error", "empty", "filename", "folder"), default="error", help=text)
    text = "pictures that cannot be used: stop and name them, or leave them out and count them"
    add("--on-bad-data", choices=("error", "skip"), default="error", help=text)
    add("--background", default="white", help="laid under transparent pictures")
    add("--upscale", action="store_true", help="take pictures smaller than --resolution")
    add("--limit", type=int, help="stop after so many pictures")
    add("--samples-per-shard", type=int, default=2000)
    text = "mixed: by hash of the key, so that every shard holds all kinds; source: as the source gives them"
    add("--order", choices=("mixed", "source"), default="mixed", help=text)
    _made_by(packing)
    add("--animated", choices=("first", "reject"), default="first", help="take the first frame, or treat as bad data")
    text = f"largest picture that is decoded (up to {MOST_PIXELS:,})"
    add("--max-pixels", type=int, default=MAX_PIXELS, help=text)
    add_source_flags(packing)
    add_picture_flags(packing)
    add_hint_flags(packing)
    packing.machine(device="")
    _of_a_folder(verbs.add_parser("index", help="index tars in place"), "leave bad tars and members out")
    _of_a_folder(verbs.add_parser("verify", help="check every byte against the index"), "name what is bad, exit with 0")
    return parser


def _made_by(packing: Parser) -> None:
    """The flags of who makes pictures."""
    text = "processes that decode and encode pictures, 0: this one; they do not change what is written"
    packing.add_argument("--num-workers", type=int, default=0, metavar="N", help=text)
    text = "whose processes: of this machine, or of a Ray cluster, with --num-workers 0 as many as it has CPUs"
    packing.add_argument("--engine", choices=("processes", "ray"), default="processes", help=text)


def _of_a_folder(parser: Parser, skip: str) -> None:
    """The flags of a verb that reads a folder of tars."""
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--on-bad-data", choices=("error", "skip"), default="error", help=f"skip: {skip}")
    parser.machine(device="")


def _pack(arguments: argparse.Namespace) -> None:
    if arguments.resolution is None:
        arguments.resolution = 32 if arguments.source in (["shapes"], ["fashion-mnist"]) else 64
    arguments.buckets = asked_buckets(arguments)
    arguments.hint_given = arguments.hint_files is not None
    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
    if arguments.num_workers < 0:
        raise UserError(f"--num-workers: must be >= 0 (got {arguments.num_workers})")
    hints = hint_files(arguments.hint_files, arguments.source) if arguments.hint_files else None
    pack(find_source(arguments), arguments.output, settings, _pool(arguments.engine, arguments.num_workers), hints)
    _tell_training(arguments.output)


def _pool(engine: str, count: int) -> Start | None:
    """Who makes pictures beside this process; None for nobody."""
    if engine == "ray":
        return ray_pool(count)
    return partial(Processes, count) if count else None


def _tell_training(folder: Path) -> None:
    """The training of an autoencoder on packed pictures, as next step."""
    index, infos = read_index(folder)
    if index["kind"] != "images" or all(info.split != "train" for info in infos):
        return
    tell_next(door("train_autoencoder", "--data", folder, "--output", beside(folder, "autoencoder")))


def main(argv: list[str] | None = None) -> None:
    """Runs one verb. Raises UserError."""
    arguments = build_parser().read(argv)
    if arguments.verb == "pack":
        _pack(arguments)
    elif arguments.verb == "index":
        infos = index_folder(arguments.directory, skip=arguments.on_bad_data == "skip")
        summary = read_index(arguments.directory)[0]["summary"]
        counts: dict[str, int] = summary["counts"]
        said = ", ".join(f"{count:,} {split}" for split, count in counts.items())
        answer(f"{arguments.directory}: indexed {len(infos)} shards, {sum(counts.values()):,} samples ({said})")
        ledger = Ledger()
        ledger.merge(summary["ledger"])
        _tell(ledger)
        _tell_training(arguments.directory)
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
        command = door("make_shards index", directory)
        hint = f"fetch or pack them again; if they were changed on purpose: {command}"
        raise UserError(what, hint=hint, code=DATA)
    answer(summary)
    warn(what)
    _tell(report.ledger)


def _tell(ledger: Ledger) -> None:
    for line in ledger.lines():
        answer(line)
