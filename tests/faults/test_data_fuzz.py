"""Random damage to everything that is read from disk: what comes is data or one clear sentence, never anything else.

FUZZ_EXAMPLES sets how many inputs each test draws (40 here and in CI; the more the better overnight).
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile
from argparse import Namespace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from training.drawing import replay
from training.drawing.flags import add_flags
from training.drawing.prompts import prompts
from training.drawing.requests import ask, parse_also, parse_size
from training.errors import UserError
from training.ledger import Ledger
from training.packing.folder import Folder
from training.packing.sources import Sample
from training.pictures import grids
from training.pictures.decoding import encode_png, load_image
from training.settings import decoding
from training.settings.flags import Parser
from training.shards.captions import clean_captions, decode_text
from training.shards.index import write_index
from training.shards.offset_index import open_index
from training.shards.reading import ShardSet
from training.shards.tars import BLOCK, index_tar
from training.shards.verifying import verify
from training.shards.writing import ShardWriter
from training.tensors import load_tensors, save_tensors

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
EDITS = st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=12)), max_size=6)
CUT = st.one_of(st.just(0), st.integers(0, 4000))
PLACES = [m for stage in decoding.STAGES for family in decoding.sections(stage).values() for m in family]
KEYS = sorted({field.name for member in PLACES for field in dataclasses.fields(member)})
NAMES = st.sampled_from(sorted(decoding.kinds(tuple(PLACES))))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=9), inner, max_size=4)),
    max_leaves=12,
)


def damaged(data: bytes, edits: list[tuple[int, bytes]], cut: int) -> bytes:
    """`data` overwritten here and there, then cut short."""
    out = bytearray(data)
    for place, value in edits:
        at = place % len(out)
        out[at : at + len(value)] = value
    return bytes(out[: len(out) - cut % len(out)])


def mended(tar: bytes) -> bytes:
    """The same with every header's checksum put right, as a forger would: else few get past it."""
    out = bytearray(tar)
    for at in range(0, len(out) - BLOCK + 1, BLOCK):
        if out[at + 257 : at + 262] == b"ustar":
            total = sum(out[at : at + BLOCK]) - sum(out[at + 148 : at + 156]) + 256
            out[at + 148 : at + 156] = b"%06o\0 " % (total % 8**6)
    return bytes(out)


def small_tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.png", "k" * 150 + ".txt", "folder/é.json", "./b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 30
            tar.addfile(info, io.BytesIO(bytes(30)))
    return out.getvalue()


TAR = small_tar()


@fuzz
@given(edits=EDITS, cut=CUT, mend=st.booleans())
def test_fuzzed_tars(tmp_path: Path, edits: list[tuple[int, bytes]], cut: int, mend: bool) -> None:
    data = damaged(TAR, edits, cut)
    path = tmp_path / "x.tar"
    path.write_bytes(mended(data) if mend else data)
    for left_out in (None, []):
        try:
            index = index_tar(path, left_out)
        except UserError as error:
            assert error.code == 3 and "x.tar" in error.what and error.what.isprintable()
        else:
            for field in (index.dtype.names or ())[1:]:
                ends = index[field]["offset"].astype(int) + index[field]["size"]
                assert (ends <= len(data)).all()


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    writer = ShardWriter(folder, "train", 3)
    for i in range(5):
        writer.add(f"{i}", {"png": encode_png(np.full((8, 8, 3), i, np.uint8)), "txt": b"words"})
    write_index(folder, writer.finish(), {})
    return folder


def read_everything(folder: Path) -> None:
    """Opens a folder of shards and reads every sample; a UserError of code 3 is all that may come of it."""
    try:
        shards = ShardSet(folder)
    except UserError as error:
        assert error.code == 3
        return
    for i in range(len(shards)):
        try:
            shards.read(i)
        except UserError as error:
            assert error.code == 3


@fuzz
@given(edits=EDITS, cut=CUT)
def test_fuzzed_offset_indices(shard: Path, edits: list[tuple[int, bytes]], cut: int) -> None:
    path = shard / "train-000000.index.npy"
    whole = path.read_bytes()
    try:
        path.write_bytes(damaged(whole, edits, cut))
        read_everything(shard)
        verify(shard)
        try:
            open_index(shard / "train-000000.tar")
        except UserError as error:
            assert error.code == 3
    finally:
        path.write_bytes(whole)


@fuzz
@given(
    place=st.sampled_from(["", "format", "kind", "fields", "shards", "summary", "name", "samples", "bytes"]), value=JSON
)
def test_fuzzed_index_json(shard: Path, place: str, value: Any) -> None:
    path = shard / "index.json"
    whole = path.read_bytes()
    index: Any = json.loads(whole)
    if not place:
        index = value
    elif place in index:
        index[place] = value
    else:
        index["shards"][0][place] = value
    try:
        path.write_text(json.dumps(index))
        read_everything(shard)
    finally:
        path.write_bytes(whole)


@fuzz
@given(edits=EDITS, cut=CUT)
def test_fuzzed_bytes_of_index_json(shard: Path, edits: list[tuple[int, bytes]], cut: int) -> None:
    path = shard / "index.json"
    whole = path.read_bytes()
    try:
        path.write_bytes(damaged(whole, edits, cut))
        read_everything(shard)
    finally:
        path.write_bytes(whole)


@fuzz
@given(edits=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=12)), max_size=6), cut=CUT)
def test_fuzzed_safetensors(tmp_path: Path, edits: list[tuple[int, bytes]], cut: int) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(3, 4), "b.c": torch.ones(2, dtype=torch.int64), "d": torch.ones(5).half()})
    path.write_bytes(damaged(path.read_bytes(), edits, cut))
    tensors_or_refusal(path)


def tensors_or_refusal(path: Path) -> None:
    try:
        tensors = load_tensors(path)
    except UserError as error:
        assert error.code == 4 and path.name in error.what
    else:
        assert sum(tensor.nbytes for tensor in tensors.values()) <= path.stat().st_size


NUMBER = st.one_of(st.integers(-(2**70), 2**70), st.integers(0, 64))
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F64", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "F4", "X", ""]),
        "shape": st.lists(NUMBER, max_size=3),
        "data_offsets": st.lists(NUMBER, min_size=1, max_size=3),
    }
)


@fuzz
@given(header=st.dictionaries(st.text(max_size=5), st.one_of(ENTRY, JSON), max_size=4), size=st.integers(0, 200))
def test_forged_safetensors_headers(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    tensors_or_refusal(path)


@fuzz
@given(data=st.one_of(st.binary(max_size=300), st.text(max_size=80).map(lambda text: text.encode("utf-16"))))
def test_fuzzed_captions(data: bytes) -> None:
    try:
        captions = clean_captions(decode_text(data).splitlines())
    except UserError as error:
        assert error.code == 3
        return
    for caption in captions:
        assert caption == caption.strip() != "" and "\n" not in caption and "\0" not in caption
        caption.encode()
    assert clean_captions(captions) == captions


@fuzz
@given(rows=st.lists(st.one_of(JSON, st.fixed_dictionaries({"file_name": st.just("a.png"), "text": JSON})), max_size=4))
def test_fuzzed_metadata(tmp_path: Path, rows: list[Any]) -> None:
    (tmp_path / "a.png").write_bytes(b"?")
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    try:
        for item in Folder(tmp_path).samples():
            if isinstance(item, Sample):
                "".join(item.captions).encode()
    except UserError as error:
        assert error.code == 3


def config_or_refusal(stage: str, path: Path) -> None:
    try:
        config = decoding.load(stage, str(path))
    except UserError as error:
        assert error.code == 2 and error.what and error.hint
    else:
        assert decoding.decode(stage, decoding.to_values(config)) == config


TOML = (resources.files("configs") / "denoiser" / "dit-s.toml").read_bytes()


@fuzz
@given(edits=EDITS, cut=CUT)
def test_fuzzed_toml(tmp_path: Path, edits: list[tuple[int, bytes]], cut: int) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(damaged(TOML, edits, cut))
    config_or_refusal("denoiser", path)


STAGE_AND_VALUES = st.sampled_from(sorted(decoding.STAGES)).flatmap(
    lambda stage: st.tuples(
        st.just(stage),
        st.dictionaries(
            st.one_of(st.sampled_from(sorted(decoding.sections(stage))), st.text(max_size=5)),
            st.one_of(JSON, st.dictionaries(st.sampled_from(KEYS), st.one_of(JSON, NAMES), max_size=4)),
            max_size=5,
        ),
    )
)


@fuzz
@given(found=STAGE_AND_VALUES)
def test_fuzzed_config_values(tmp_path: Path, found: tuple[str, dict[str, Any]]) -> None:
    """Sections and keys that there are, with values of every kind."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps(found[1]))
    config_or_refusal(found[0], path)


HASHES = {"autoencoder": "a" * 64, "denoiser": "b" * 64, "text_encoder": "c" * 64}
FACTS = {"prompt": "a circle", "negative_prompt": "", "seed": 3, "settings": {}, "size": [32, 32], "hashes": HASHES,
         "also": [["a square", 0.5]], "invert": None, "tile": 0, "batch": 1, "precision": "no",
         "image": {"sha256": "d", "strength": 0.5, "start_time": None, "windows": 0}, "inpaint": None,
         "outpaint": None, "style": None, "restore": None, "adapters": [["run", 0.5]],
         "coupling": {"prompt": "a square", "settings": {"kind": "masactrl"}}, "versions": {"torch": "2"}}  # fmt: skip
GIVEN = dict.fromkeys(("image", "mask", "invert", "style", "measurement"), "picture.png")
add_flags(parser := Parser())
PLAIN = vars(parser.parse_args(["--model", "model", "--output", "output"]))


def told(image: Image.Image, path: Path, facts: Any) -> None:
    """A picture that says whatever is given, without a seal."""
    info = grids.PngInfo()
    info.add_itxt(grids.KEY, json.dumps(facts, ensure_ascii=False))
    image.save(path, pnginfo=info)


def recalled(path: Path) -> None:
    """What `generate --like` takes from a picture, each part where it goes; refusals have one of three codes."""
    args = Namespace(**PLAIN | dict.fromkeys(replay.TAKEN) | GIVEN | {"like": str(path), "adapter": ["run"]})
    try:
        original = replay.recall(args)
        assert [request.prompt for request in ask(prompts(args, Ledger()), 1, args.seed)] == args.prompt
        assert all(len(pair) == 2 for pair in parse_also(args.also))
        assert parse_size(args.size) and 0 < original.facts.get("batch", 1) <= replay.LARGEST_BATCH
        replay.compare(original, {"hashes": HASHES, "image": {"sha256": "d"}})
    except UserError as error:
        assert error.code in (2, 3, 4) and error.what
    else:
        assert replay.verdict(original, path)


@fuzz
@example(facts=dict.fromkeys(("also", "batch", "invert", "tile", "versions")))  # None where a number was read
@given(facts=st.one_of(JSON, st.fixed_dictionaries({}, optional=dict.fromkeys(FACTS, JSON))))
def test_fuzzed_facts_in_a_picture(tmp_path: Path, facts: Any) -> None:
    path = tmp_path / "x.png"
    told(Image.new("RGB", (8, 8)), path, {**FACTS, **facts} if isinstance(facts, dict) else facts)
    recalled(path)


@fuzz
@given(edits=st.lists(st.tuples(st.integers(0, 700), st.binary(min_size=1, max_size=6)), max_size=4), cut=CUT)
def test_fuzzed_bytes_of_a_picture_with_facts(tmp_path: Path, edits: list[tuple[int, bytes]], cut: int) -> None:
    path = tmp_path / "x.png"
    told(Image.new("RGB", (8, 8)), path, FACTS)
    path.write_bytes(damaged(path.read_bytes(), edits, cut))
    recalled(path)


def originals() -> dict[str, bytes]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8))
    found = {}
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"):
        out = io.BytesIO()
        image.save(out, form)
        found[form] = out.getvalue()
    return found


ORIGINALS = originals()


@fuzz
@given(
    form=st.sampled_from(sorted(ORIGINALS)),
    edits=st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=4)), max_size=6),
    cut=CUT,
)
def test_fuzzed_pictures(form: str, edits: list[tuple[int, bytes]], cut: int) -> None:
    """Damage among the first bytes, where the headers are."""
    try:
        image = load_image(damaged(ORIGINALS[form], edits, cut), max_pixels=1_000_000)
    except UserError as error:
        assert error.code == 3 and error.what
    else:
        assert image.mode == "RGB" and image.width * image.height <= 1_000_000


def test_the_fuzzers_inputs_are_sound_before_they_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(TAR)
    assert len(index_tar(tmp_path / "x.tar")) == 4 and mended(TAR) == TAR
    assert all(load_image(data).size == (9, 12) for data in ORIGINALS.values())
    told(Image.new("RGB", (8, 8)), tmp_path / "x.png", FACTS)
    recalled(tmp_path / "x.png")
