"""The page as a file: whose it may replace, what a training writes, and that it never ends one."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from pathlib import Path

import pytest
import tiny
from run_folders import run_folder

from training.pages.writing import Renewed, is_ours


def test_a_run_s_own_page_is_renewed_and_no_other_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "run")
    for _ in range(2):
        assert tiny.call("report", folder) == 0
    assert f"{folder / 'report.html'}: 0.0 MB" in capsys.readouterr().out and is_ours(folder / "report.html")
    (folder / "report.html").write_text("<p>mine</p>")
    assert "already exists" in tiny.refused("report", folder).what
    assert (folder / "report.html").read_text() == "<p>mine</p>"
    assert tiny.call("report", folder, "--overwrite") == 0
    (tmp_path / "page.html").write_bytes((folder / "report.html").read_bytes())
    assert "already exists" in tiny.refused("report", folder, "--output", tmp_path / "page.html").what


def test_the_demo_has_no_run() -> None:
    assert "without the run that trained it" in tiny.refused("report", "demo").what


def test_several_runs_need_a_place(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / name) for name in "ab"]
    assert tiny.refused("report", *folders).hint == "say where: --output FILE"
    assert tiny.call("report", *folders, "--output", tmp_path / "both.html") == 0
    assert "2 runs: a, b" in (tmp_path / "both.html").read_text()


def test_the_page_may_run_its_own_script_and_load_nothing(tmp_path: Path) -> None:
    tiny.call("report", run_folder(tmp_path / "run"))
    page = (tmp_path / "run" / "report.html").read_text()
    script = page.rpartition("<script>")[2].rpartition("</script>")[0]
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page) and "http" not in page.replace("http-equiv", "").replace(
        "http://www.w3.org/2000/svg", ""
    )


def test_a_training_leaves_its_page(denoiser: Path, autoencoder: Path) -> None:
    for folder, title in ((denoiser, "Samples over time"), (autoencoder, "Reconstructions over time")):
        page = (folder / "report.html").read_text()
        assert "run: finished at step 6 of 6" in page and title in page
        assert all(f"step {step}" in page for step in (0, 4, 6)) and str(folder.parent) not in page
    assert "captions of these pictures, row by row" in (denoiser / "report.html").read_text()


def test_the_data_are_told_of_although_they_lie_elsewhere(denoiser: Path, autoencoder: Path, shapes: Path) -> None:
    """A training knows where they are; afterwards they are found beside the run, or given."""
    page = (autoencoder / "report.html").read_text()
    assert "<td>train samples</td><td>96</td>" in page and 'alt="contact sheet"' in page
    assert "<td>latent shape</td>" in (denoiser / "report.html").read_text()
    assert tiny.call("report", autoencoder, "--output", autoencoder / "other.html") == 0
    assert "The data themselves were not found" in (autoencoder / "other.html").read_text()
    words = ("--data", shapes, "--overwrite")
    assert tiny.call("report", autoencoder, "--output", autoencoder / "other.html", *words) == 0
    assert 'alt="contact sheet"' in (autoencoder / "other.html").read_text()
    (autoencoder / "other.html").unlink()


def test_data_that_are_not_the_run_s_are_said_to_be_so(
    denoiser: Path, shapes: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for data, theirs in ((shapes, False), (latents, True)):
        assert tiny.call("report", denoiser, "--data", data, "--output", tmp_path / "page.html", "--overwrite") == 0
        assert (f"warning: {data} is not what" in capsys.readouterr().err) is not theirs
        assert ("<td>latent shape</td>" in (tmp_path / "page.html").read_text()) is theirs
    assert tiny.call("report", denoiser, denoiser, "--data", latents, "--output", tmp_path / "both.html") == 0
    assert f"note: {latents} is not used" in capsys.readouterr().err


def test_a_training_says_once_where_its_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, renewed = run_folder(tmp_path / "run"), Renewed(None)
    for _ in range(2):
        renewed(folder)
    page = folder / "report.html"
    assert capsys.readouterr().err == f"to look at in a browser: {page}, renewed at every validation\n"


def test_a_page_that_cannot_be_written_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "report.html").write_text("mine")
    renewed = Renewed(None)
    for _ in range(3):
        renewed(folder)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("warning: no more report.html from here on") and "goes on" in told[0]
    assert (folder / "report.html").read_text() == "mine"


def test_a_broken_record_ends_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "config.json").write_text("{")
    Renewed(tmp_path)(folder)
    assert "no more report.html" in capsys.readouterr().err and not (folder / "report.html").exists()
