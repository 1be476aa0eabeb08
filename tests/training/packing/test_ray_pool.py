"""Pictures made by other machines: the bytes of one process, or a sentence that says which machine is another."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import packs
import pytest

from training.doors.make_shards import main
from training.errors import UserError
from training.packing import ray_pool
from training.packing.workers import make_picture

COUNT = 40  # pictures: two tasks and a half


class Cluster(ModuleType):
    """Ray as far as it is used, of one machine that starts in another folder: what is sent to it travels as bytes, and
    is made when it is asked for."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self, folder: Path) -> None:
        super().__init__("ray")
        self.folder, self.started, self.tasks = folder, False, list[int]()

    def is_initialized(self) -> bool:
        return self.started

    def init(self, **_flags: object) -> None:
        self.started = True

    def shutdown(self) -> None:
        self.started = False

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 1.0}

    def remote(self, work: Callable[..., Any]) -> Any:
        self.work = work
        return self

    def options(self, *, num_cpus: int) -> Any:
        assert num_cpus == 1
        return type("Remote", (), {"remote": staticmethod(lambda *words: pickle.dumps((self.work, words)))})

    def get(self, sent: bytes) -> Any:
        work, words = pickle.loads(sent)
        self.tasks.append(len(words[0]))
        home = os.getcwd()
        os.chdir(self.folder)
        try:
            return pickle.loads(pickle.dumps(work(*words)))
        finally:
            os.chdir(home)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    found = Cluster(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", found)
    yield found
    assert not found.started  # also where a packing was refused


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder named from where it lies, with one picture that is none."""
    files: dict[str, bytes | str] = {f"{i:02d}.png": packs.png(i) for i in range(COUNT)}
    files |= {f"{i:02d}.txt": f"number {i}" for i in range(COUNT)}
    packs.write(tmp_path / "home" / "in", {**files, "17.png": b"no picture"})
    monkeypatch.chdir(tmp_path / "home")
    return Path("in")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


FLAGS = ["--on-bad-data", "skip", "--samples-per-shard", "10", "--flip", "--crop", "random"]


@pytest.mark.parametrize("kind", ["folder", "tar", "tgz"])
def test_a_cluster_packs_what_one_process_packs(
    kind: str, cluster: Cluster, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files that lie somewhere are read there, those of a compressed tar sent."""
    if kind != "folder":
        members: dict[str, bytes | str] = {path.name: path.read_bytes() for path in sorted(source.iterdir())}
        source = packs.tar(Path(f"a.{kind}"), members, "w:gz" if kind == "tgz" else "w")
    packs.pack(source, tmp_path / "one", *FLAGS)
    assert cluster.tasks == []
    packs.pack(source, tmp_path / "many", *FLAGS, "--engine", "ray")
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert cluster.tasks == [16, 16, 8]
    packs.pack(source, tmp_path / "two", *FLAGS, "--num-workers", "2")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert capsys.readouterr().out.count("left out 1: not an image") == 3


def test_hints_beside_pictures_are_read_there_too(cluster: Cluster, source: Path, tmp_path: Path) -> None:
    packs.write(Path("hints"), {f"{i:02d}.png": packs.png(100 + i) for i in range(COUNT)})
    for name, flags in (("one", []), ("many", ["--engine", "ray"])):
        packs.pack(source, tmp_path / name, *FLAGS, "--hint", "picture", "--hint-files", "hints", *flags)
    assert contents(tmp_path / "many") == contents(tmp_path / "one") and cluster.tasks == [16, 16, 8]


def test_a_task_that_is_not_full_is_sent_when_it_is_waited_for(cluster: Cluster, source: Path, tmp_path: Path) -> None:
    """Between two parts of pictures lie samples without one, so many that the first of three pictures is waited for
    when the fourth comes: 64 may be on their way."""
    members: dict[str, bytes | str] = {}
    for i in range(70):
        members |= {f"{i:02d}.txt": f"number {i}"} | ({} if 3 <= i < 65 else {f"{i:02d}.png": packs.png(i)})
    tars = packs.tar(tmp_path / "in.tar", members)
    for name, flags in (("one", []), ("many", ["--engine", "ray"])):
        packs.pack(tars, tmp_path / name, *FLAGS, *flags)
    assert contents(tmp_path / "many") == contents(tmp_path / "one") and cluster.tasks == [3, 5]


def refused(source: Path, output: Path) -> UserError:
    return packs.refused(source, output, "--on-bad-data", "skip", "--engine", "ray")


def test_a_machine_that_does_not_see_the_source(
    cluster: Cluster, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it cannot read is not left out: only what this machine cannot use is."""
    blind = UserError("unreadable file (No such file or directory)", code=3)

    def make_there(task: Any, settings: Any) -> Any:
        return blind if os.getcwd() == str(tmp_path) and task.key == "20" else make_picture(task, settings)

    monkeypatch.setattr(ray_pool, "make_picture", make_there)
    problem = refused(source, tmp_path / "out")
    assert problem.code == 2 and "cannot make 20 (unreadable file (No such file or directory)), which" in problem.what
    assert problem.hint == "have every machine see the source at the same path"


def test_a_machine_of_other_versions(
    cluster: Cluster, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ray_pool.made_by
    by = kept()
    assert by["pil"] != "None" and by["jpg"] != "None" and len(by["code"]) == 12
    monkeypatch.setattr(ray_pool, "made_by", lambda: by | ({"pil": "9"} if os.getcwd() == str(tmp_path) else {}))
    problem = refused(source, tmp_path / "out")
    assert problem.code == 2 and problem.what.endswith(f"would pack other bytes (pil 9, here {by['pil']})")


def test_a_cluster_that_loses_its_tasks(cluster: Cluster, source: Path, tmp_path: Path) -> None:
    def get(_sent: bytes) -> Any:
        raise cluster.exceptions.RayError("The task failed.\n\nModuleNotFoundError: No module named 'training'\n")

    cluster.get = get  # type: ignore[method-assign]
    problem = refused(source, tmp_path / "out")
    assert problem.code == 1 and "(ModuleNotFoundError: No module named 'training')" in problem.what


@pytest.mark.parametrize("kind", [ConnectionError, Exception])
def test_a_cluster_that_is_not_there(
    kind: type[Exception], cluster: Cluster, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or that does not come up, for which Ray raises a bare Exception."""
    def init(**_flags: object) -> None:
        raise kind("Could not find any running Ray instance.")

    monkeypatch.setattr(cluster, "init", init)
    problem = refused(source, tmp_path / "out")
    assert problem.code == 1 and "Ray does not start (Could not find any running Ray instance.)" in problem.what
    assert "leave --engine out" in problem.hint
    packs.pack(source, tmp_path / "out", "--on-bad-data", "skip")


def test_without_ray(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is written; then the same without the flag."""
    monkeypatch.setitem(sys.modules, "ray", None)
    problem = refused(source, tmp_path / "out")
    assert problem.code == 3 and problem.what == "--engine ray: the package ray is not installed"
    assert problem.hint.startswith("pip install ray, or leave --engine out") and not (tmp_path / "out").exists()
    packs.pack(source, tmp_path / "out", "--on-bad-data", "skip", "--num-workers", "1")


@pytest.mark.many
def test_a_cluster_of_two_nodes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself, on this machine: the node that a task runs on makes no difference."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster as Nodes

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]), prepend=os.pathsep)
    packs.pack(source, tmp_path / "one", *FLAGS)
    nodes = Nodes()
    try:
        try:
            nodes.add_node(num_cpus=1)
            nodes.add_node(num_cpus=1)
        except Exception as failure:  # Ray waits 30 s for a node, which a busy machine may take
            pytest.skip(f"Ray does not start here: {failure}")
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        main(packs.words(source, tmp_path / "many", (*FLAGS, "--engine", "ray")))
    finally:
        nodes.shutdown()
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
