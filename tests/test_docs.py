"""README and docs are true: their commands are ones the doors take, their flags, files and links are there."""

from __future__ import annotations

import base64
import io
import re
import shlex
from pathlib import Path
from typing import Any

import hints
import numpy as np
import pytest
import tiny
from PIL import Image

from training.settings.decoding import STAGES, sections
from training.settings.flags import canonical_word
from training.settings.reading import names

PAGES = [tiny.ROOT / "README.md", tiny.ROOT / "CONTRIBUTING.md", *sorted((tiny.ROOT / "docs").glob("*.md"))]
KEYS = {
    f"--{section}.{key}" for stage in (*STAGES, "editing") for section, members in sections(stage).items()
    for member in members for key in member.__dataclass_fields__
}  # fmt: skip
# Of bash, pip, pytest, torchrun, accelerate, and names with a part to be filled in.
OF_TORCHRUN = {"--nnodes", "--rdzv-id", "--rdzv-backend", "--rdzv-endpoint", "--local-addr"}
OF_SLURM = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time", "--requeue", "--open-mode"}
OF_RAY = {"--head", "--address"}
OF_OTHERS = hints.OF_LAUNCHERS | OF_TORCHRUN | OF_SLURM | OF_RAY | {"--help"}
PLACEHOLDERS = {"--flags", "--section.key", "--backbone"}
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*(?:\.[a-z_]\w*)?")


class Understood(Exception):
    """Raised where a door has read its command line."""


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def commands(path: Path) -> list[list[str]]:
    """Every command of a door in fenced blocks and in code within a line: the door and its words. `$NAME` stands for
    what NAME="…" said."""
    found = []
    for block in [*blocks(path, "bash"), *re.findall(r"`(python scripts/[^`\n]*)`", path.read_text("utf-8"))]:
        named = dict(re.findall(r'^(\w+)="(.*)"$', block, re.MULTILINE))
        for line in re.sub(r"\\\n", " ", block).splitlines():
            for name, text in named.items():
                line = line.replace(f"${name} ", f"{text} ")
            if "…" in line:  # goes on as the reader likes
                continue
            words = shlex.split(line, comments=True)
            for place, word in enumerate(words):
                if match := re.fullmatch(r"(?:scripts/(\w+)\.py|latent-diffusion-([\w-]+))", word):
                    found.append([(match[1] or match[2]).replace("-", "_"), *words[place + 1 :]])
                    break
    return found


ALL = [(path.name, words) for path in PAGES for words in commands(path)]


@pytest.mark.parametrize(("page", "words"), ALL, ids=[f"{page}: {' '.join(words)[:80]}" for page, words in ALL])
def test_a_command_is_one_that_its_door_takes(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def understood(*_: Any) -> None:
        raise Understood

    monkeypatch.setattr("training.settings.flags.check_inputs", understood)
    monkeypatch.setattr("training.drills.verify_resume.verify", understood)
    with pytest.raises(Understood):
        tiny.call(*words)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_flag_is_one_of_ours(path: Path) -> None:
    known = set().union(*(hints.options(script.stem) for script in tiny.SCRIPTS.glob("*.py"))) | KEYS | OF_OTHERS
    named = {flag for flag in FLAG.findall(path.read_text("utf-8")) if not flag.endswith("-")}
    assert {flag for flag in named - known - PLACEHOLDERS if canonical_word(flag) == flag} == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_link_leads_somewhere(path: Path) -> None:
    text = path.read_text("utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert file.startswith(("http://", "https://")) or target.exists(), link
        if anchor and target.suffix == ".md":
            heads = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, link


def test_every_page_is_linked_from_the_readme_or_a_page_it_links() -> None:
    text = PAGES[0].read_text("utf-8") + "".join(path.read_text("utf-8") for path in PAGES[2:])
    assert [path.name for path in PAGES[2:] if f"({path.name})" not in text and f"docs/{path.name}" not in text] == []


def pictures(notebook: Any) -> list[np.ndarray[Any, Any]]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))), dtype=float) for text in texts]


@pytest.mark.docs
def test_the_tour_gives_its_pictures() -> None:
    """Run anew, it shows what is stored in it: to some grey levels, for other machines round differently."""
    import nbformat
    from nbclient import NotebookClient

    path = tiny.ROOT / "docs" / "tour.ipynb"
    stored = pictures(nbformat.read(path, 4))
    fresh = nbformat.read(path, 4)
    NotebookClient(fresh, timeout=300, resources={"metadata": {"path": str(tiny.ROOT)}}).execute()
    made = pictures(fresh)
    assert len(made) == len(stored) == 5
    for ours, theirs in zip(made, stored, strict=True):
        assert ours.shape == theirs.shape and np.abs(ours - theirs).mean() < 4


@pytest.mark.docs
def test_the_reference_is_built(tmp_path: Path) -> None:
    """The command of CONTRIBUTING: every module of the model packages has its page, and what loads a model."""
    (command,) = [line for line in blocks(tiny.ROOT / "CONTRIBUTING.md", "bash")[0].splitlines() if "pdoc" in line]
    words = shlex.split(command, comments=True)[1:]
    done = tiny.spawn(*[tmp_path if word == "site" else word for word in words])
    assert done.returncode == 0, done.stderr
    for path in (path for package in ("autoencoder", "ldm") for path in sorted((tiny.ROOT / package).rglob("*.py"))):
        module = path.relative_to(tiny.ROOT).with_suffix("")
        offered = (path.parent / "__init__.py").read_text("utf-8").partition("__all__ = ")[2]
        page = module.parent if offered or path.name == "__init__.py" else module
        text = (tmp_path / page.with_suffix(".html")).read_text("utf-8")
        assert [name for name in re.findall(r'"(\w+)"', offered) if f'id="{name}"' not in text] == [], page
    assert "load_pipeline" in (tmp_path / "training" / "models" / "assembly.html").read_text("utf-8")


def test_the_readme_is_a_page_or_two_and_its_pairs_are_there() -> None:
    text = PAGES[0].read_text("utf-8")
    assert len(text.splitlines()) <= 200
    pairs = set(re.findall(r"`((?:laptop|gpus?)-\d+)`", text))
    assert len(pairs) == 7 and pairs <= set(names("autoencoder")) & set(names("denoiser"))
