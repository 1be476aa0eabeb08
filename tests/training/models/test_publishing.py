"""A model published on a hub of our own: what is sent, and all that is refused before anything is."""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
import threading
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from training import load_autoencoder, load_pipeline
from training.settings import embedded
from training.tensors import content_hash, load_tensors, save_tensors

TOKEN = "hf_" + "t" * 34
REPO, COMMIT = "me/shapes", "0" * 40


class Hub(ThreadingHTTPServer):
    """What of the hub's interface a commit needs: repositories, branches, and files sent within the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str]] = []
        self.repos: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.commit: dict[str, Any] = {}
        self.fetched: list[str] = []
        self.refuses = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_HEAD(self) -> None:
        self._file(self.path.partition(f"/{REPO}/resolve/")[2].partition("/")[2], body=False)

    def do_GET(self) -> None:
        if name := self.path.partition(f"/{REPO}/resolve/")[2].partition("/")[2]:
            return self._file(name)
        if "/tree/" in self.path:
            files = self.server.files.items()
            return self._answer([{"type": "file", "path": name, "size": len(data), "oid": sha1(data).hexdigest()}
                                 for name, data in files])  # fmt: skip
        private = self.server.repos.get(REPO, {}).get("visibility") == "private"
        self._answer({"id": REPO, "sha": COMMIT, "private": private, "siblings": [], "tags": []})

    def do_POST(self) -> None:
        body, hub = self._body(), self.server
        hub.asked.append((self.path, self.headers.get("authorization", "")))
        if hub.refuses:
            self._answer({"error": "no"}, hub.refuses)
        elif self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            there = name in hub.repos
            hub.repos.setdefault(name, wanted)
            self._answer({"url": f"{hub.address}/{name}", "id": name}, 409 if there else 200)
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    hub.commit = line["value"]
                else:
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{hub.address}/{REPO}/commit/{COMMIT}"
            self._answer({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        else:
            self._answer({})

    def _file(self, name: str, *, body: bool = True) -> None:
        self.server.fetched.append(name)
        self._send(self.server.files[name], 200, {"ETag": sha1(self.server.files[name]).hexdigest(),
                                                  "X-Repo-Commit": COMMIT}, body=body)  # fmt: skip

    def _answer(self, value: Any, code: int = 200) -> None:
        self._send(json.dumps(value).encode(), code, {"Content-Type": "application/json"})

    def _send(self, data: bytes, code: int, headers: dict[str, str], *, body: bool = True) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    embedded._downloaded.cache_clear()
    yield server
    server.shutdown()
    server.server_close()


def publish(model: object, *words: object) -> int:
    return tiny.call("publish", model, "--repo", REPO, *words)


@pytest.fixture
def final(denoiser: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(denoiser / "final", tmp_path / "final"))


def test_what_is_sent_is_the_model(
    hub: Hub, denoiser: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every file as it lies there, under the token, which is told nowhere; what came over draws the same."""
    assert publish(denoiser, "--message", "the first", "--private", "--revision", "trial") == 0
    paths = [path for path in (denoiser / "final").rglob("*") if path.is_file()]
    own = {path.relative_to(denoiser / "final").as_posix(): path.read_bytes() for path in paths}
    assert hub.files == own and len(own) == 12
    assert hub.commit["summary"] == "the first" and hub.repos[REPO]["visibility"] == "private"
    called = [path for path, _ in hub.asked]
    assert f"/api/models/{REPO}/branch/trial" in called and f"/api/models/{REPO}/commit/trial" in called
    assert all(token == f"Bearer {TOKEN}" for _, token in hub.asked)
    out, err = capfd.readouterr()
    assert f"published: {hub.address}/{REPO}/commit/{COMMIT}" in out and TOKEN not in out + err
    for name, content in own.items():
        assert f"{len(content):>14,}  {name}\n" in out
    for name, content in hub.files.items():
        (tmp_path / "came" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "came" / name).write_bytes(content)
    ours, theirs = (load_pipeline(path, "cpu") for path in (denoiser, tmp_path / "came"))
    assert ours.hashes == theirs.hashes


def test_a_dry_run_asks_nobody(hub: Hub, autoencoder: Path, capfd: pytest.CaptureFixture[str],
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Not even for a token; of an autoencoder it says what its sheet shows."""
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert publish(autoencoder / "final", "--dry-run") == 0
    out, err = capfd.readouterr()
    names = sorted(path.name for path in (autoencoder / "final").iterdir())
    assert re.findall(r"^ *[\d,]+  (\S+)$", out, re.M) == names
    assert "samples.png shows held-out pictures of the data" in err and err.endswith("nothing was sent\n")
    assert hub.asked == []


@pytest.mark.parametrize("name", ["optimizer.safetensors", "pytorch_model.bin", "autoencoder/notes.txt", ".env",
                                  "text_encoder/other.safetensors", "tokenizer/a/b.json"])  # fmt: skip
def test_nothing_else_is_sent(name: str, final: Path, hub: Hub) -> None:
    (final / name).parent.mkdir(exist_ok=True)
    (final / name).write_text("{}")
    problem = tiny.refused("publish", final, "--repo", REPO)
    assert problem.code == 4 and problem.what == f"{final} holds what is no part of a model: {name}"
    assert hub.asked == []


def test_a_damaged_model_is_not_sent(final: Path, autoencoder: Path, tmp_path: Path, hub: Hub,
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Weights of another, a part that is gone, a path of this machine in a text."""
    for folder in (final, Path(shutil.copytree(autoencoder / "final", tmp_path / "ae"))):
        file = folder / "model.safetensors"
        kept, weights = file.read_bytes(), load_tensors(file)
        name = next(key for key, value in weights.items() if value.is_floating_point())
        weights[name] = weights[name] + torch.finfo(torch.float32).eps * 64 + 0.01
        hash_then = json.loads(kept[8 : 8 + int.from_bytes(kept[:8], "little")])["__metadata__"]["hash"]
        save_tensors(file, weights, {"hash": hash_then})
        problem = tiny.refused("publish", folder, "--repo", REPO)
        assert problem.code == 4 and hash_then[:12] in problem.what
        file.write_bytes(kept)
    card = (final / "README.md").read_text()
    (final / "README.md").write_text(f"{card}\nsee {Path.home()}/notes")
    assert "README.md names a folder of yours" in tiny.refused("publish", final, "--repo", REPO).what
    with monkeypatch.context() as patch:
        patch.setenv("HOME", "/")
        (final / "README.md").write_text(f"{card}\nsee https://a.b//c")
        assert publish(final, "--dry-run") == 0
    (final / "README.md").unlink()
    assert "has no README.md" in tiny.refused("publish", final, "--repo", REPO).what
    (final / "README.md").write_text(card)
    (final / "tokenizer" / "vocabulary.json").unlink()
    assert "vocabulary.json" in tiny.refused("publish", final, "--repo", REPO).what
    assert hub.asked == []


def test_what_is_told_before_anything_is_read(denoiser: Path, latents: Path, tmp_path: Path, hub: Hub,
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A name that is none, a run that is not finished, no token, no network."""
    for repo in ("shapes", "me/a/b", "me/--", "me/sh apes"):
        problem = tiny.refused("publish", denoiser, "--repo", repo)
        assert problem.what.startswith(f"--repo {repo}: is no ORG/NAME")
        assert problem.hint == "as --repo my-name/my-model"
    shutil.copytree(denoiser / "checkpoints", tmp_path / "run" / "checkpoints")
    for name in ("config.json", "run.json"):
        shutil.copy(denoiser / name, tmp_path / "run" / name)
    problem = tiny.refused("publish", tmp_path / "run", "--repo", REPO)
    assert problem.what == f"{tmp_path / 'run'} is not finished"
    assert f"export_model.py {tmp_path / 'run'} --output DIR" in problem.hint
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    problem = tiny.refused("publish", denoiser, "--repo", REPO)
    assert "HF_HUB_OFFLINE is set" in problem.what and "--dry-run" in problem.hint
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    problem = tiny.refused("publish", denoiser, "--repo", REPO)
    assert "no token" in problem.what and "hf auth login" in problem.hint
    assert hub.asked == [] and publish(denoiser, "--dry-run") == 0


@pytest.mark.parametrize(("code", "said"), [(401, "does not know this token"), (403, "may not write there")])
def test_a_refusal_of_the_hub_is_one_sentence(code: int, said: str, denoiser: Path, hub: Hub) -> None:
    hub.refuses = code
    problem = tiny.refused("publish", denoiser, "--repo", REPO)
    assert said in problem.what and problem.what.startswith(f"{REPO} was not written: ")
    assert TOKEN not in str(problem) and hub.files == {}


def test_nothing_private_goes_where_all_can_see_it(denoiser: Path, hub: Hub) -> None:
    hub.repos[REPO] = {"visibility": "public"}
    problem = tiny.refused("publish", denoiser, "--repo", REPO, "--private")
    assert problem.what == f"{REPO} is there, and public" and hub.files == {}
    assert publish(denoiser) == 0 and "config.json" in hub.files


def test_a_hub_that_is_not_there(denoiser: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    problem = tiny.refused("publish", denoiser, "--repo", REPO)
    assert "is the hub reachable from here?" in problem.what and "--dry-run" in problem.hint


def test_what_was_published_is_drawn_with_by_its_name(
    hub: Hub, final: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """hf:ORG/NAME, for either stage; of a repository nothing is fetched but what a model folder holds."""
    assert publish(final) == 0
    told = capfd.readouterr().err.splitlines()[-1]
    assert told.startswith("next: ") and f" --model hf:{REPO} --prompt " in told
    words = shlex.split(told)[3:]
    drawn = tmp_path / "drawn"
    words[words.index("--output") + 1] = str(drawn)
    assert tiny.call("generate", *words, "--steps", 2, "--device", "cpu") == 0 and (drawn / "00000.png").is_file()
    hub.files |= {"code.py": b"print()", "weights.bin": b"PK"}
    words = ("--prompt", "a red circle", "--steps", 2, "--device", "cpu", "--output")
    for model, output in ((f"hf:{REPO}", "theirs"), (final, "ours")):
        assert tiny.call("generate", "--model", model, *words, tmp_path / output) == 0
    ours, theirs = (Image.open(tmp_path / name / "00000.png") for name in ("ours", "theirs"))
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert "Model: shapes," in theirs.text["parameters"]  # type: ignore[attr-defined]
    model, own = load_autoencoder(f"hf:{REPO}"), load_autoencoder(final / "autoencoder")
    assert content_hash(model.state_dict()) == content_hash(own.state_dict())
    assert "model.safetensors" in hub.fetched and not {"code.py", "weights.bin"} & set(hub.fetched)


def test_a_model_that_the_hub_does_not_give_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    embedded._downloaded.cache_clear()
    for name in ("hf:me/none", "hf:no name"):
        problem = tiny.refused("generate", "--model", name, "--prompt", "a", "--output", tmp_path / "out")
        assert problem.code == 4 and problem.what.startswith(f"{name} could not be had from the Hugging Face hub (")
    assert not (tmp_path / "out").exists()
