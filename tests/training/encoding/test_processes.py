"""Latents encoded by several processes: the bytes of one, also after a kill, by any number of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import tiny

from training.machine.meeting import lost
from training.shards.index import read_index
from training.shards.verifying import verify

MORE = pytest.param(4, marks=pytest.mark.many)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 pictures in five shards, and 10 held-out ones in a sixth."""
    folder = tmp_path_factory.mktemp("pictures") / "shapes"
    words = f"pack shapes --samples 50 --val-fraction 0.2 --samples-per-shard 10 --output {folder}".split()
    assert tiny.call("make_shards", *words) == 0
    return folder


@pytest.fixture
def words(pictures: Path, autoencoder: Path) -> list[object]:
    flags = ["--batch-size", 4, "--num-workers", 0, "--flip", "--device", "cpu"]
    return ["encode_latents", "--autoencoder", autoencoder, "--data", pictures, *flags]


@pytest.fixture
def alone(words: list[object], tmp_path: Path) -> dict[str, bytes]:
    """All files that one process writes."""
    assert tiny.call(*words, "--output", tmp_path / "alone") == 0
    return contents(tmp_path / "alone")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, also hidden ones: none of those that an encoding works with is left."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("count", [2, MORE])
def test_several_write_what_one_writes(
    count: int, words: list[object], alone: dict[str, bytes], tmp_path: Path
) -> None:
    """Every file of the folder, index and plan among them; the first process alone tells of the whole."""
    output = tmp_path / "latents"
    assert ranks.start(count, tmp_path, *words, "--output", output) == [0] * count, ranks.said(tmp_path)
    assert contents(output) == alone and verify(output).problems == ()
    assert not [name for name in alone if name.startswith(".")]
    assert ranks.said(tmp_path).count("latents: ") == 1


@pytest.mark.parametrize("count", [1, 2, MORE])
def test_a_killed_run_goes_on_with_any_number(
    count: int, words: list[object], alone: dict[str, bytes], tmp_path: Path
) -> None:
    """What was written by then is not written again."""
    output = tmp_path / "latents"
    codes = ranks.start(2, tmp_path, *words, "--output", output, wrong={1: "shard:2=kill"})
    assert codes[0] == 1 and codes[1] == -9, ranks.said(tmp_path)
    assert "lost another process" in ranks.said(tmp_path) and not (output / "index.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    assert 2 <= len(kept) < len(read_index(words[4])[1])
    assert ranks.start(count, tmp_path, *words, "--output", output) == [0] * count, ranks.said(tmp_path)
    assert contents(output) == alone
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_one_that_is_left_alone_ends_before_its_next_shard(
    words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([None, None, lost("process 1 of 2")])

    def watch() -> None:
        if problem := next(looks):
            raise problem

    monkeypatch.setattr("training.encoding.data_set.meeting.watch", watch)
    problem = tiny.refused(*words, "--output", tmp_path / "latents")
    assert problem.code == 1 and "the same command, a training with --resume auto" in problem.hint
    assert len(list((tmp_path / "latents").glob("*.tar"))) == 2


def test_the_index_takes_the_word_of_who_wrote(
    words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard is looked for once, before it is written, and never hashed again."""
    asked: list[str] = []

    def looked_for(_folder: Path, name: str, *_split: object) -> None:
        asked.append(name)

    monkeypatch.setattr("training.encoding.data_set.sound_shard", looked_for)
    assert tiny.call(*words, "--output", tmp_path / "latents") == 0
    assert len(asked) == len(set(asked)) == len(read_index(tmp_path / "latents")[1])


@pytest.mark.many
def test_more_processes_than_shards(words: list[object], alone: dict[str, bytes], tmp_path: Path) -> None:
    assert ranks.start(8, tmp_path, *words, "--output", tmp_path / "latents") == [0] * 8, ranks.said(tmp_path)
    assert contents(tmp_path / "latents") == alone
