"""Tars read as a stream: what comes, in whose order, and what is said of streams that break."""

from __future__ import annotations

import io
import tarfile
from itertools import islice
from pathlib import Path

import pytest

from training.errors import UserError
from training.shards import streaming
from training.shards.streaming import UNREAD, TarStream, front, hold_out, streamed_tars


def tar_of(path: Path, keys: range, mode: str = "w", **fields: bytes) -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for number in keys:
            for name, data in (fields or {"txt": b"one", "json": b"{}"}).items():
                member = tarfile.TarInfo(f"{number:04d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def tars(tmp_path: Path) -> tuple[str, ...]:
    return tuple(str(tar_of(tmp_path / f"{n}.tar", range(10 * n, 10 * n + 10))) for n in range(4))


def keys(records: object) -> list[str]:
    return [record["__key__"] for record in records]  # type: ignore[attr-defined]


def test_one_reader_sees_every_record_once_a_round_mixed_and_differently_each_round(tars: tuple[str, ...]) -> None:
    stream = TarStream(tars, seed=3, buffer=8)
    plain = keys(islice(stream.shared(0, 1), 80))
    assert sorted(plain[:40]) == sorted(plain[40:]) == [f"{n:04d}" for n in range(40)] and plain[:40] != plain[40:]
    mixed = keys(islice(stream.shuffled(0, 1), 40))
    assert mixed != plain[:40] and mixed == keys(islice(stream.shuffled(0, 1), 40))
    assert mixed != keys(islice(TarStream(tars, seed=3, start=5, buffer=8).shuffled(0, 1), 40))  # resumed elsewhere


@pytest.mark.parametrize("readers", [2, 4, 7])
def test_readers_share_a_round(tars: tuple[str, ...], readers: int) -> None:
    stream = TarStream(tars, buffer=1)
    seen = []
    for reader in range(readers):
        share = len(range(reader, 4, readers)) * 10 if readers <= 4 else len(range(reader, 40, readers))
        seen += keys(islice(stream.shared(reader, readers), share))
    assert sorted(seen) == [f"{n:04d}" for n in range(40)]


def test_pipes_compressed_and_joined_tars(tars: tuple[str, ...], tmp_path: Path) -> None:
    joined = f"pipe:cat {tars[0]} {tars[1]}"
    for command in (joined, f"{joined} | gzip -c"):
        assert keys(front(TarStream((command,)), [command], 100)) == [f"{n:04d}" for n in range(20)]
    assert len(front(TarStream((joined,)), [joined], 3)) == 3  # the rest of the pipe is left
    packed = str(tar_of(tmp_path / "z.tar.gz", range(3), "w:gz"))
    assert keys(front(TarStream((packed,)), [packed], 9)) == ["0000", "0001", "0002"]


def test_neighbours_of_one_key_in_two_tars_stay_two(tmp_path: Path) -> None:
    first = tar_of(tmp_path / "a.tar", range(1), txt=b"first")
    second = tar_of(tmp_path / "b.tar", range(1), json=b"{}")
    for names in ([str(first), str(second)], [f"pipe:cat {first} {second}"]):
        found = front(TarStream(tuple(names)), names, 9)
        assert [set(record) - {"__key__", "__url__"} for record in found] == [{"txt"}, {"json"}]


def test_huge_and_sparse_members_and_links_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LARGEST_MEMBER", 100)
    path = tar_of(tmp_path / "a.tar", range(2), txt=b"one", png=b"0" * 101)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("0001.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    stream = TarStream((str(path),))
    assert [set(r) - {"__key__", "__url__"} for r in front(stream, [str(path)], 9)] == [{"txt"}] * 2
    told = [record[UNREAD] for record in islice(stream.shared(0, 1), 3) if UNREAD in record]
    assert told == ["3 links, sparse or huge members passed over (first: 0000.png)"]


def test_streams_that_break(tars: tuple[str, ...], tmp_path: Path) -> None:
    for command, said in (
        (f"pipe:head -c 300 {tars[0]}", "truncated header"),
        ("pipe:false", "exit 1"),
        (str(tmp_path / "0.html"), "cannot be read"),
    ):
        (tmp_path / "0.html").write_text("<html>")
        with pytest.raises(UserError) as caught:
            front(TarStream((command,)), [command], 100)
        assert caught.value.code == 3 and said in caught.value.what
    with pytest.raises(UserError, match="holds no samples"):
        list(islice(TarStream(("pipe:false",)).shared(0, 1), 2))  # the first says why
    cut = f"pipe:head -c 3000 {tars[0]}"
    records = list(islice(TarStream((cut,)).shared(0, 1), 2))
    assert len(front(TarStream((cut,)), [cut], 9)) >= 1 and "unexpected end of data" in records[-1].get(UNREAD, "")
    good = TarStream((tars[0], "pipe:false"))  # one that breaks does not end the others, and is told
    rounds = list(islice(good.shared(0, 1), 33))
    assert sum(UNREAD not in record for record in rounds) == 30
    assert {record[UNREAD][:36] for record in rounds if UNREAD in record} == {"cannot be read to its end ((('false'"}
    few = TarStream((tars[0],))
    with pytest.raises(UserError, match="no samples for reader 12 of 12") as caught:
        next(few.shared(11, 12))
    assert "fewer --num-workers" in caught.value.hint and next(few.shared(0, 1))["__key__"] == "0000"
    with pytest.raises(UserError, match="8 shards of the stream in a row"):
        list(TarStream(("pipe:false",) * 9).shared(0, 1))


def test_what_names_mean(tars: tuple[str, ...], tmp_path: Path) -> None:
    assert streamed_tars(f"{tmp_path}/{{0..3}}.tar") == list(tars) == streamed_tars(f"{tmp_path}/*.tar")
    assert streamed_tars("pipe:cat a{1,2}") == ["pipe:cat a{1,2}"]
    assert streamed_tars("s3://a/{0..1}.tar") == ["s3://a/0.tar", "s3://a/1.tar"]
    odd = tmp_path / "of [2020] {x}"
    odd.mkdir()
    inside = str(tar_of(odd / "0.tar", range(2)))
    assert streamed_tars(inside) == [inside]
    (tmp_path / "of [2020]").mkdir()
    starred = str(tar_of(tmp_path / "of [2020]" / "0.tar", range(2)))
    assert streamed_tars(f"{tmp_path}/of [2020]/*.tar") == [starred]
    for names in (f"{tmp_path}/none-*.tar", f"{tmp_path}/{{0..4}}.tar"):
        with pytest.raises(UserError) as caught:
            streamed_tars(names)
        assert caught.value.code == 3 and caught.value.hint


def test_held_out_records_are_not_trained_on(tars: tuple[str, ...], tmp_path: Path) -> None:
    stream, kept, held = hold_out(list(tars), 6, seed=0, buffer=1)
    assert keys(held) == [f"{n:04d}" for n in range(6)] and not set(keys(kept)) & set(keys(held))
    assert set(keys(islice(stream.shared(0, 1), 34))) == {f"{n:04d}" for n in range(6, 40)}
    named = str(tar_of(tmp_path / "photos-validation-0.tar", range(90, 95)))
    stream, kept, held = hold_out([*tars, named], 3, seed=0, buffer=1)
    assert keys(held) == ["0090", "0091", "0092"] and named not in stream.tars and not stream.skip
    with pytest.raises(UserError, match="every tar of the stream is a validation"):
        hold_out([named], 3, seed=0, buffer=1)
