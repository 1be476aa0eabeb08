"""From the words after `pack` to a source: folders, archives, tars by pattern, tables, and what is built in."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from training.commands import door
from training.errors import DATA, USAGE, UserError
from training.packing.archives import TAR_NAMES, Zip
from training.packing.arrow import NAMES as ARROW_NAMES
from training.packing.arrow import Arrow, saved_files
from training.packing.builtin_sources import Emoji, FashionMnist, Shapes
from training.packing.folder import Folder
from training.packing.img2dataset import Img2Dataset, shards_of
from training.packing.sources import Reading, Source
from training.packing.tar_source import Tars
from training.pictures.decoding import SUFFIXES
from training.shards.patterns import braces, matching

ADDRESS = re.compile(r"pipe:|[a-z0-9]+://")
# How what is not read in place is unpacked, into the folder that is named after it.
UNPACKERS = {
    ".7z": "7z x {file} -o{folder}",
    ".rar": "unrar x {file} {folder}/",
    ".zst": "mkdir {folder} && tar --zstd -xf {file} -C {folder}",
    ".lz4": "mkdir {folder} && lz4 -dc {file} | tar -xf - -C {folder}",
    ".gz": "mkdir {folder} && gunzip -c {file} > {inside}",
}
SOURCES = "SOURCE is a folder of pictures, a zip, tars or parquet, fashion-mnist, shapes, or emoji with --root"


def _local(pattern: str) -> list[Path]:
    """The files that a pattern means: the one it names to the letter, all that a star matches, every one that braces
    write out."""
    if Path(pattern).is_file():
        return [Path(pattern)]
    starred = "*" in pattern or "?" in pattern
    if starred and (found := matching(pattern)):  # a folder's own name may have braces
        return found
    names = braces(pattern)
    if starred:
        return [path for name in names for path in matching(name)]
    paths = [path for path in map(Path, names) if path.is_file()]
    if paths and len(paths) < len(names):
        missing = [name for name in names if not Path(name).is_file()]
        what = f"{len(missing)} of the {len(names)} shards of '{pattern}' are missing (first: {missing[0]})"
        raise UserError(what, hint="name those that are there, or use a star", code=DATA)
    return paths


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that names, globs and brace patterns mean. Raises UserError where one matches nothing or is no local
    file."""
    files: dict[Path, None] = {}
    for pattern in patterns:
        if ADDRESS.match(pattern):
            raise UserError(f"{pattern}: only local files are read", hint="download the tars first", code=USAGE)
        paths = _local(pattern)
        if not paths:
            raise UserError(f"no shards match '{pattern}'", hint="quote brace and star patterns", code=DATA)
        files.update(dict.fromkeys(paths))
    return list(files)


def _unreadable(path: Path) -> UserError:
    """The error of a file that is no source, with what to do about it."""
    suffix, folder = path.suffix.lower(), path.with_name(re.sub(r"(\.tar)?\.\w+$", "", path.name))
    if suffix in UNPACKERS:
        places = {"file": path, "folder": folder, "inside": folder / folder.name}
        quoted = {name: shlex.quote(str(place)) for name, place in places.items()}
        hint = f"unpack it: {UNPACKERS[suffix].format(**quoted)}; then pack {quoted['folder']}"
        return UserError(f"{path}: archives of this kind are not read in place", hint=hint, code=DATA)
    if suffix in SUFFIXES:
        hint = f"name the folder it lies in: {door('make_shards pack', path.parent, '--output')} DIR"
        return UserError(f"{path}: is one picture; a folder of pictures is packed", hint=hint, code=DATA)
    return UserError(f"{path}: is not a folder, nor an archive or table that is read", hint=SOURCES, code=DATA)


def _of_files(names: list[str], reading: Reading) -> Source:
    """The source of files, all of one kind."""
    paths = find_files(names)
    kinds = (TAR_NAMES, ARROW_NAMES, (".zip",))
    kind = next((kind for kind in kinds if all(path.name.lower().endswith(kind) for path in paths)), None)
    if kind == TAR_NAMES:
        return Tars(paths, reading)
    if kind == ARROW_NAMES:
        return Arrow(paths, reading)
    if kind and len(paths) == 1:
        return Folder(Zip(paths[0]), reading)
    odd = [path for path in paths if not path.name.lower().endswith(tuple(name for kind in kinds for name in kind))]
    if odd:
        raise _unreadable(odd[0])
    first = shlex.quote(str(paths[0]))
    what = f"{len(paths)} files of several kinds, or several zips: one source at a time"
    raise UserError(what, hint=f"pack each into its own folder, first {first}", code=DATA)


def find_source(arguments: argparse.Namespace) -> Source:
    """The source that the words after `pack` name."""
    names: list[str] = arguments.source
    reading = Reading(**{field.name: getattr(arguments, field.name) for field in fields(Reading)})
    if names == ["fashion-mnist"]:
        return FashionMnist(arguments.root)
    if names == ["emoji"] and arguments.root is not None:
        return Emoji(arguments.root)
    if arguments.root is not None:
        raise UserError(
            "--root goes with fashion-mnist and emoji; a folder is named in its place",
            hint=door("make_shards pack FOLDER --output DIR"),
            code=USAGE,
        )
    if names == ["shapes"]:
        held = max(round(arguments.samples * arguments.val_fraction), 1) if arguments.val_fraction else 0
        return Shapes(arguments.samples, held, arguments.seed, arguments.resolution)
    if len(names) == 1 and (folder := Path(names[0])).is_dir():
        if shards := shards_of(folder):
            return Img2Dataset(folder, shards, reading)
        saved = saved_files(folder)
        return Arrow(saved, reading) if saved else Folder(folder, reading)
    if any(Path(name).is_dir() for name in names):
        hint = "make one folder of links to them and pack that: links to folders are followed"
        raise UserError("one folder at a time", hint=hint, code=USAGE)
    if all(Path(name).exists() or name.endswith("}") or set("*?{") & set(name) or ADDRESS.match(name)
           or name.lower().endswith((*TAR_NAMES, *ARROW_NAMES, ".zip")) for name in names):  # fmt: skip
        return _of_files(names, reading)
    raise UserError(f"{names[0]}: no such folder", hint=SOURCES, code=DATA)


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """How a source of the user's own is read."""
    add = parser.add_argument
    text = "column of a table, or of a sample's json, that captions come from (otherwise captions, text or caption)"
    add("--caption-column", metavar="NAME", help=text)
    text = "whether each line of a caption file is a caption, or all are one"
    add("--caption-lines", choices=("each", "join"), default="each", help=text)
    text = "the picture, of several in one sample or of one name: a suffix such as jpg; of parquet, a column"
    add("--image-field", metavar="NAME", help=text)
    text = "take splits from the names of folders and files, or draw all by hash"
    add("--splits", choices=("names", "draw"), default="names", help=text)
