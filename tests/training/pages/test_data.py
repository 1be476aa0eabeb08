"""The data of a run by their hash: those that are it, beside the run or given, and no others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from PIL import Image
from run_folders import run_folder

from training.files import file_sha256
from training.pages import data
from training.pages.record import Record, read


def packed(folder: Path, kind: str = "images", **summary: Any) -> Path:
    """A folder whose index names two shards, which are not there: pages read the index alone."""
    folder.mkdir(parents=True)
    shards = [{"name": f"{split}-000000.tar", "split": split, "samples": count, "bytes": 10**8, "sha256": kind + split}
              for split, count in (("train", 1200), ("val", 40))]  # fmt: skip
    index = {"format": 1, "kind": kind, "fields": ["png", "txt"], "shards": shards}
    index["summary"] = {"resolution": 64, **summary}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def of(folder: Path, run: Path) -> Record:
    return read(run_folder(run, data={"index_sha256": file_sha256(folder / "index.json")}))


def facts(parts: list[str]) -> dict[str, str]:
    return dict(re.findall(r"<td>([^<]*)</td><td>([^<]*)</td>", "".join(parts)))


def test_the_data_of_the_same_hash_are_found_beside_the_run(tmp_path: Path) -> None:
    packed(tmp_path / "another", order="source")
    right = packed(tmp_path / "data", order="mixed", mirrored=False, settings={"channels": 1})
    Image.new("RGB", (8, 8)).save(right / "contact-sheet.png")
    parts = data.section(of(right, tmp_path / "runs" / "ae"))
    told = facts(parts)
    assert (told["folder"], told["train samples"], told["val samples"]) == ("data", "1,200", "40")
    assert (told["shards"], told["channels"], told["resolution"]) == ("2, 0.2 GB", "1", "64")
    assert (told["order"], told["mirrored"]) == ("mixed", "no")
    assert 'alt="contact sheet"' in "".join(parts)


def test_data_elsewhere_are_named_by_hash_or_given(tmp_path: Path) -> None:
    elsewhere = packed(tmp_path / "far" / "away" / "data")
    record = of(elsewhere, tmp_path / "runs" / "ae")
    told = data.section(record)[0]
    assert "were not found" in told and file_sha256(elsewhere / "index.json") in told
    assert facts(data.section(record, elsewhere))["folder"] == "data"
    other = packed(tmp_path / "far" / "other", order="source")
    assert "were not found" in data.section(record, other)[0]


def test_latents_tell_of_the_pictures_they_were_made_from(tmp_path: Path) -> None:
    ledgers = {"data": {"cut": {"x": {"count": 2, "first": []}}}}
    latents = packed(tmp_path / "latents", "latents", latent={"shape": [8, 4, 4]}, ledgers=ledgers)
    made_of = {"data": {f"{split}-000000.tar": f"images{split}" for split in ("train", "val")}}
    (latents / "encoding.json").write_text(json.dumps(made_of))
    record = of(latents, tmp_path / "runs" / "dit")
    parts = data.section(record)
    assert facts(parts)["latent shape"] == "8 x 4 x 4" and "data: cut 2: x" in "".join(parts)
    assert "do not lie beside them" in parts[-1]
    packed(tmp_path / "far" / "away" / "pictures")
    (latents / "encoding.json").write_text(json.dumps({**made_of, "pictures": "../far/away/pictures"}))
    assert facts(data.section(record)[2:])["folder"] == "pictures"
    packed(tmp_path / "data")
    parts = data.section(record)
    assert "<h3>The pictures they were encoded from</h3>" in parts and "no contact-sheet.png" in parts[-1]


def test_what_was_left_out_of_the_data_is_told(tmp_path: Path) -> None:
    ledger = {"left out": {"no <caption>": {"count": 7, "first": ["/home/ann/pictures/a.jpg"]}}}
    told = "".join(data.section(of(packed(tmp_path / "data", ledger=ledger), tmp_path / "run")))
    assert "<li>left out 7: no &lt;caption&gt; (a.jpg …)</li>" in told


def test_a_stream_has_no_folder(tmp_path: Path) -> None:
    tars = ["/home/ann/a b.tar", "s3://b/c.tar", "pipe:curl -H 'Key: secret'"]
    record = read(run_folder(tmp_path / "run", data={"stream": tars}))
    assert "it was a stream: a b.tar, s3://b/c.tar, pipe:curl …." in data.section(record)[0]
