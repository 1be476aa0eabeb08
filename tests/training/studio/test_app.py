"""From flags to a page, and what keeps it to its machine; without Gradio."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from training.studio import app, guard


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Studios whose pages would have been served; the environment and the answers to signals as they were."""
    seen: list[Any] = []
    kept = signal.getsignal(signal.SIGHUP)
    monkeypatch.setattr(app, "find_spec", lambda name: True)
    monkeypatch.setattr(app.os, "environ", dict(os.environ))
    monkeypatch.setattr(app, "page", lambda studio: seen.append(studio))
    monkeypatch.setattr(app, "run", lambda guarded, place: seen.extend([guarded, Path(os.environ["GRADIO_TEMP_DIR"])]))
    yield seen
    signal.signal(signal.SIGHUP, kept)


def test_without_gradio_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    problem = tiny.refused("studio", "--model", "demo")
    assert problem.what == "the studio's page needs gradio, which is not installed"
    assert problem.hint == "pip install 'latent-diffusion-from-scratch[studio]'"


def test_drawings_go_with_the_studio(served: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.call("studio", "--model", "demo", "--port", 0, "--device", "cpu") == 0
    studio, guarded, uploads = served
    out, err = capsys.readouterr()
    assert out.startswith("http://127.0.0.1:") and "warning" not in err and "what was drawn is removed" in err
    assert guarded.hosts == {"localhost", "127.0.0.1", "::1"} and studio.keep is None
    assert studio.output.parent == uploads.parent and not uploads.parent.exists()
    assert app.os.environ["GRADIO_ANALYTICS_ENABLED"] == "False" and app.os.environ["HF_HUB_OFFLINE"] == "1"


def test_drawings_stay_where_output_says(served: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.call("studio", "--model", "demo", "--port", 0, "--device", "cpu", "--output", tmp_path / "kept") == 0
    assert served[0].keep == tmp_path / "kept" and (tmp_path / "kept").is_dir()
    assert "removed" not in capsys.readouterr().err
    assert app.described(served[0]).endswith(f"Drawings are kept in {tmp_path}/kept.")


def test_another_host_is_warned_of(served: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.call("studio", "--model", "demo", "--host", "0.0.0.0", "--port", 0, "--device", "cpu") == 0
    assert "warning: --host 0.0.0.0: whoever reaches this address can draw here" in capsys.readouterr().err
    assert served[1].hosts is None


def test_a_port_in_use(served: list[Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        problem = tiny.refused("studio", "--model", "demo", "--port", taken.getsockname()[1])
    assert "Address already in use" in problem.what and "choose another --port" in problem.hint
    assert served == []
    assert "cannot be listened at" in tiny.refused("studio", "--model", "demo", "--port", 70000).what


def test_what_is_this_machine_alone() -> None:
    assert all(map(guard.is_loopback, ("127.0.0.1", "localhost", "::1", "127.9.9.9")))
    assert not any(map(guard.is_loopback, ("0.0.0.0", "::", "192.168.1.5", "a.b", "")))


def answered(
    path: str, host: str, hosts: frozenset[str] | None = frozenset(guard.LOCAL), body: bytes = b"", kind: bytes = b""
) -> tuple[int, dict[str, str]]:
    """Status and headers of a guarded application that answers all with 200, having read the `body`."""
    sent: list[dict[str, Any]] = []
    parts = [{"type": "http.request", "body": body[a : a + 10], "more_body": a + 10 < len(body)}
             for a in range(0, len(body), 10)]  # fmt: skip

    async def receive() -> dict[str, Any]:
        return parts.pop(0)

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        read = b""
        while len(read) < len(body):
            read += (await receive())["body"]
        assert read == body
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", host.encode()), (b"content-type", kind)]
    scope = {"type": "http", "method": "POST" if body else "GET", "path": path, "headers": headers}
    asyncio.run(guard.Guard(inner, hosts)(scope, receive, send))
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


def test_other_names_and_addresses_to_fetch_are_refused() -> None:
    for host in ("127.0.0.1:7860", "localhost", "LOCALHOST:1", "[::1]:7860"):
        assert answered("/", host)[0] == 200
    for host in ("evil.example:7860", "", "127.0.0.1.evil.example"):
        assert answered("/", host)[0] == 403
    assert answered("/", "anything", None)[0] == 200
    for path in ("/gradio_api/file=http://127.0.0.1:1/x", "/file=HTTPS://a.b/", "/gradio_api/proxy=https://a.hf.space/"):
        assert answered(path, "localhost")[0] == 403
    assert answered("/gradio_api/file=/tmp/x.png", "localhost")[0] == 200
    policy = answered("/", "localhost")[1]["content-security-policy"]
    assert "default-src 'self'" in policy and "connect-src 'self'" in policy and "http" not in policy


def test_a_file_named_by_an_address_is_refused() -> None:
    """Gradio would fetch it; however the address is spelled. A caption may hold one, and so may an upload."""
    for path in ("http://a.b/x.png", "HTTPS://a.b", " https://a.b", "\\u0068ttp://a.b"):
        body = f'{{"data": [[{{"path": "{path}", "meta": {{"_type": "gradio.FileData"}}}}]]}}'.encode()
        assert answered("/gradio_api/queue/join", "localhost", body=body)[0] == 403
        assert answered("/gradio_api/upload", "localhost", body=body, kind=b"multipart/form-data; boundary=x")[0] == 200
    for body in (b'{"data": ["see http://a.b", {"path": "/tmp/x.png"}]}', b"no JSON: http://a.b"):
        assert answered("/gradio_api/queue/join", "localhost", body=body)[0] == 200


def test_a_page_that_leaves_amid_an_upload_is_no_fault_of_the_studio() -> None:
    """As when a tab is closed while its picture is on its way; a fault of a whole request is still raised."""

    def failing(*messages: dict[str, Any], kind: bytes = b"multipart/form-data; boundary=x") -> list[Any]:
        sent, given = list[Any](), list(messages)

        async def receive() -> dict[str, Any]:
            return given.pop(0)

        async def inner(scope: Any, receive: Any, send: Any) -> None:
            sent.extend([await receive(), await receive()])
            raise ValueError("read two messages")

        scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", kind)]}
        asyncio.run(guard.Guard(inner, None)(scope, receive, None))
        return sent

    part = {"type": "http.request", "body": b"", "more_body": True}
    gone = {"type": "http.disconnect"}
    assert failing(part, gone) == [part, gone]
    for whole in ((part | {"more_body": False}, gone), (part, part)):
        with pytest.raises(ValueError, match="two messages"):
            failing(*whole)
    with pytest.raises(ValueError, match="two messages"):
        failing(part | {"more_body": False}, gone, kind=b"application/json")
