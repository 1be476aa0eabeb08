"""Tables of captions as people write them, and names as they spell them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from packs import pack, png, refused, write

ROWS = [{"file_name": f"{name}.png", "text": f"words, of {name}"} for name in "ab"]
WORDS = {name: [f"words, of {name}"] for name in "ab"}
PICTURES = {f"{name}.png": png(seed) for seed, name in enumerate("ab")}
COCO = {
    "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}, {"id": 9, "file_name": "c.png"}],
    "annotations": [{"image_id": i, "caption": f"words, of {'ab?'[i - 7]}", "id": i} for i in (7, 8, 9)],
}


def quoted(mark: str, header: str = "file_name{}text") -> str:
    rows = [f'{row["file_name"]}{mark}"{row["text"]}"' for row in ROWS]
    return "\n".join([header.format(mark), *rows])


FORMS = {
    "comma": ("metadata.csv", quoted(",")),
    "semicolons, mark, CRLF": ("metadata.csv", "\ufeff" + quoted(";").replace("\n", "\r\n")),
    "tabs": ("metadata.csv", quoted("\t").replace('"', "")),
    "bar": ("metadata.csv", quoted("|")),
    "tsv": ("Metadata.TSV", quoted("\t")),
    "quotes in tabs": ("metadata.tsv", quoted("\t").replace('"', "") + '\nb.png\t"words" of b'),
    "a spreadsheet's note": ("metadata.csv", "sep=;\n" + quoted(";")),
    "old lines": ("metadata.csv", quoted(",").replace("\n", "\r")),
    "spaces": ("metadata.csv", quoted(",", "file_name{} text").replace(',"', ', "')),
    "capitals": ("metadata.csv", quoted(",", "File Name{}TEXT")),
    "no header": ("metadata.csv", quoted(",").partition("\n")[2]),
    "no header, turned": ("metadata.csv", '"words, of a",a.png\n"words, of b",b.png'),
    "other names": ("metadata.csv", quoted(",", "image_path{}caption")),
    "lines": ("metadata.jsonl", "\n".join(map(json.dumps, ROWS))),
    "capital name": ("METADATA.JSONL", "\n".join(map(json.dumps, ROWS))),
    "pretty": ("metadata.jsonl", "\n".join(json.dumps(row, indent=2) for row in ROWS)),
    "a list": ("metadata.jsonl", json.dumps(ROWS)),
    "a pretty list": ("metadata.jsonl", json.dumps(ROWS, indent=1)),
    "json": ("metadata.json", json.dumps(ROWS)),
    "json by name": ("metadata.json", json.dumps({row["file_name"]: row["text"] for row in ROWS})),
    "json of records": ("metadata.json", json.dumps({row["file_name"]: {"caption": row["text"]} for row in ROWS})),
    "another name": ("captions.csv", quoted(",")),
    "another name, lines": ("train.jsonl", "\n".join(map(json.dumps, ROWS))),
    "a listing": ("captions.txt", quoted(",", "image{}caption")),
    "COCO": ("annotations/captions_train2017.json", json.dumps(COCO)),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path: Path, form: str) -> None:
    name, text = FORMS[form]
    packed = pack(write(tmp_path / "in", {**PICTURES, name: text}), tmp_path / "out")
    expected = {**WORDS, "b": [*WORDS["b"], '"words" of b']} if form == "quotes in tabs" else WORDS
    assert packed.captions == expected and not packed.counts("left out")
    said = packed.counts("guessed").get("table of another name than metadata, read", 0)
    assert said == ("metadata" not in name.lower())


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_several_rows_a_picture_keep_all_captions_in_file_order(tmp_path: Path, form: str) -> None:
    rows = [{"file_name": "a.png", "text": f"{word} one", "by": word} for word in ("third", "first", "second")]
    text = "\n".join(map(json.dumps, rows))
    if form == "csv":
        text = "file_name,text,by\n" + "".join(f"a.png,{row['text']},{row['by']}\n" for row in rows)
    packed = pack(write(tmp_path / "in", {"a.png": png(0), f"metadata.{form}": text}), tmp_path / "out")
    assert packed.captions == {"a": ["third one", "first one", "second one"]}
    assert packed.meta == {"a": {"by": ["third", "first", "second"]}}


def test_a_caption_is_never_cut_by_what_parts_the_cells(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a.png": png(0), "metadata.csv": "file_name,text\na.png,one, two\n"})
    error = refused(tmp_path / "in", tmp_path / "no")
    assert "row 1 has 3 cells, the header 2" in error.what and "quotes" in error.hint
    write(tmp_path / "in", {"metadata.csv": 'file_name,text\na.png,"one, two"\n'})  # as it says
    assert pack(tmp_path / "in", tmp_path / "out").captions == {"a": ["one, two"]}
    write(tmp_path / "in", {"metadata.csv": 'file_name,text\na.png,"one\nb.png,two\n'})  # swallows all that follows
    assert "not readable as CSV" in refused(tmp_path / "in", tmp_path / "no").what


@pytest.mark.parametrize(
    ("disk", "row", "guessed"),
    [
        ("sub/a.png", "sub\\a.png", 0),
        ("sub/a.png", "./sub/a.png", 0),
        ("sub/a.png", "sub/../sub/a.png", 0),
        ("sub/a.png", "{root}/sub/a.png", 0),
        ("sub/a.png", "/elsewhere/once/sub/a.png", 1),
        ("sub/a.png", "C:\\data\\sub\\a.png", 1),
        ("sub/a.png", "a.png", 1),
        ("IMG.PNG", "img.png", 1),
        ("a.png", "a", 1),
        ("caf\u00e9.png", "cafe\u0301.png", 1),
        ("a.png", " a.png ", 0),
    ],
)
def test_names_spelled_otherwise(tmp_path: Path, disk: str, row: str, guessed: int) -> None:
    text = json.dumps({"file_name": row.format(root=tmp_path / "in"), "text": "words"})
    packed = pack(write(tmp_path / "in", {disk: png(0), "metadata.jsonl": text}), tmp_path / "out")
    assert list(packed.captions.values()) == [["words"]]
    assert packed.counts("guessed").get("name spelled otherwise", 0) == guessed


@pytest.mark.parametrize("row", ["../b.png", "../a.png", "{root}/../b.png", "{root}/b.png", "x/y.png", "/etc/passwd"])
def test_names_that_are_not_there(tmp_path: Path, row: str) -> None:
    text = json.dumps({"file_name": row.format(root=tmp_path / "in"), "text": "words"})
    write(tmp_path, {"in/a.png": png(0), "b.png": png(1), "in/a.txt": "a", "in/metadata.jsonl": text})
    error = refused(tmp_path / "in", tmp_path / "no")
    assert error.code == 3 and "listed in metadata.jsonl but not there" in error.what
    packed = pack(tmp_path / "in", tmp_path / "out", "--on-bad-data", "skip")
    assert packed.captions == {"a": ["a"]} and packed.counts("left out")


def test_a_name_that_may_have_been_meant(tmp_path: Path) -> None:
    text = '{"file_name": "pictuer.png", "text": "words"}'
    write(tmp_path / "in", {"picture.png": png(0), "picture.txt": "a", "metadata.jsonl": text})
    assert "(did you mean picture.png?)" in refused(tmp_path / "in", tmp_path / "no").what


def test_a_name_of_two_pictures_is_guessed_at_by_nobody(tmp_path: Path) -> None:
    files = {"x/a.png": png(0), "y/a.png": png(1), "metadata.jsonl": '{"file_name": "a.png", "text": "words"}'}
    assert "not there" in refused(write(tmp_path / "in", files), tmp_path / "no").what


@pytest.mark.parametrize("column", ["prompt", "additional feature"])
def test_another_column_is_named_and_the_hint_works(tmp_path: Path, column: str) -> None:
    rows = [{"file_name": row["file_name"], column: row["text"], "text": ""} for row in ROWS]
    write(tmp_path / "in", {**PICTURES, "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    hint = refused(tmp_path / "in", tmp_path / "no").hint
    flag = f"--caption-column '{column}'" if " " in column else f"--caption-column {column}"
    assert flag in hint
    assert pack(tmp_path / "in", tmp_path / "out", "--caption-column", column).captions == WORDS
    error = refused(tmp_path / "in", tmp_path / "no", "--caption-column", "wrong")
    assert "no such column" in error.what and column in error.hint


def test_a_chosen_column_stands_before_caption_files(tmp_path: Path) -> None:
    files = {**PICTURES, "a.txt": "not this", "metadata.csv": "file_name,text,better\na.png,x,one\nb.png,y,two\n"}
    packed = pack(write(tmp_path / "in", files), tmp_path / "out", "--caption-column", "Better")
    assert packed.captions == {"a": ["one"], "b": ["two"]}


def test_tables_that_were_not_read_are_named(tmp_path: Path) -> None:
    files = {"labels.csv": "id,label\n1,cat\n", "stats.json": "{}", "broken.json": "{", "metadata.json": '{"a": 1}'}
    error = refused(write(tmp_path / "in", {**PICTURES, **files}), tmp_path / "no")
    assert "a: no caption\n  b: no caption" in error.what and "labels.csv" in error.hint
    assert "metadata.csv with file_name,text" in error.hint
    packed = pack(tmp_path / "in", tmp_path / "out", "--missing-caption", "empty")
    assert packed.counts("ignored") == {"table that was not read": 4}
    write(tmp_path / "in", {"metadata.csv": FORMS["comma"][1]})  # as the hint says
    assert pack(tmp_path / "in", tmp_path / "read").captions == WORDS


def test_a_table_of_another_name_may_speak_of_more(tmp_path: Path) -> None:
    table = "image,caption\na.png,one\ngone.png,two\n,three\n"
    packed = pack(write(tmp_path / "in", {"a.png": png(0), "captions.csv": table}), tmp_path / "out")
    assert packed.captions == {"a": ["one"]}
    assert packed.counts("ignored") == {"listed in captions.csv but not there": 2}


def test_bad_tables(tmp_path: Path) -> None:
    write(tmp_path / "in", {**PICTURES, "metadata.csv": "x.png,one,two\n"})
    error = refused(tmp_path / "in", tmp_path / "no")
    assert "has no header, and 3 columns" in error.what and "file_name,text" in error.hint
    write(tmp_path / "in", {"metadata.csv": "name,words\nx,y\n"})
    error = refused(tmp_path / "in", tmp_path / "no")
    assert "row 1 has no 'file_name'" in error.what and "name, words" in error.hint
