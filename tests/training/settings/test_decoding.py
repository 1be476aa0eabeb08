"""Configs: what comes with the package builds; every mistake is told at once, with its place."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
import torch

from ldm.diffusion import Diffusion
from training.errors import UserError
from training.machine import faults
from training.settings import decoding, reading, sections
from training.settings.flags import KEYS, TrainParser

ALL = [(stage, name) for stage in decoding.STAGES for name in decoding.names(stage)]


@pytest.mark.parametrize(("stage", "name"), ALL)
def test_every_packaged_config_builds(stage: str, name: str) -> None:
    config = decoding.load(stage, name)
    assert decoding.decode(stage, decoding.to_values(config)) == config
    with torch.device("meta"):
        if isinstance(config, decoding.AutoencoderConfig):
            assert config.model.build().factor == config.model.factor
            config.discriminator.build()
        else:
            learned = config.backbone.learned_variance
            Diffusion(schedule=config.schedule, prediction=config.prediction, learned_variance=learned)
            width = getattr(config.text, "width", 64)
            backbone = config.backbone.build(channels=4, context_dim=width, pooled_dim=width)
            assert sum(p.numel() for p in backbone.parameters()) > 0


PUBLISHED = {  # parameters, and the width of the text where an encoder of others gives it
    "dit-s-2-label": (32_963_360, None),
    "dit-b-2-label": (130_512_416, None),
    "dit-l-2-label": (458_102_816, None),
    "dit-xl-2-label": (675_129_632, None),
    "pixart-xl-2": (610_856_096, 4096),
    "unet-sd15": (859_520_964, 768),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_their_published_size(name: str) -> None:
    """DiT's own count includes the table of 1001 labels, here the text encoder's, and the frozen one of 16x16 places,
    which we compute."""
    config = decoding.load("denoiser", name)
    assert isinstance(config, decoding.DenoiserConfig)
    count, context = PUBLISHED[name]
    with torch.device("meta"):
        if context is None:
            text = config.text.build(json.dumps({"classes": [str(i) for i in range(1000)]}))
            parts = [text, config.backbone.build(channels=4, context_dim=text.context_dim, pooled_dim=text.pooled_dim)]
            count -= 16 * 16 * config.backbone.width
        else:
            parts = [config.backbone.build(channels=4, context_dim=context)]
    assert sum(p.numel() for part in parts for p in part.parameters()) == count


def told(stage: str, source: object, overrides: dict[str, str] | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        decoding.load(stage, str(source), overrides)
    assert caught.value.code == 2 and caught.value.hint
    return caught.value


def write(folder: Path, text: str | bytes, name: str = "my.toml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_all_mistakes_at_once_with_their_places(tmp_path: Path) -> None:
    text = """
[model]
chanels = [8, 8]
blocks = "two"

[optimizer]
lrate = 1e-4
lr = "no"
warmup = -1

[trian]
x = 1

[train]
ema = 1.5
"""
    path = write(tmp_path, text)
    what = told("autoencoder", path).what
    for line, expected in [
        (3, "unknown key 'model.chanels'; did you mean 'model.channels'?"),
        (4, 'model.blocks: expected a whole number, got "two"'),
        (7, "unknown key 'optimizer.lrate'; did you mean 'optimizer.lr'?"),
        (8, 'optimizer.lr: expected a number, got "no"'),
        (11, "unknown section [trian]; did you mean 'train'?"),
        (15, "train.ema: must lie in [0, 1) (got 1.5)"),
    ]:
        assert f"{path}:{line}: {expected}" in what, what
    assert "Traceback" not in what and "Value error" not in what


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("optimizer.lr", "-1", "command line: optimizer.lr: must be > 0 (got -1"),
        ("optimizer.lr", "nan", "a finite number"),
        ("optimizer.lr", "1e999", "a finite number"),
        ("optimizer.betas", "0.9", "expected a list"),
        ("train.max_steps", "2.5", "expected a whole number, got 2.5"),
        ("train.flip", "1", "expected true or false, got 1"),
        ("train.keep_last", "1", "keep at least 2 checkpoints (got 1)"),
        ("train.seed", "-3", "seed: must lie in"),
        ("train.mixed_precision", "fp8", "'no', 'bf16' or 'fp16'"),
        ("schedule.kind", "flwo", "unknown kind \"flwo\"; did you mean 'flow'?"),
        ("backbone.heads", "7", "width"),
        ("nonsense", "1", "unknown section [nonsense]"),
    ],
)
def test_wrong_values(key: str, text: str, expected: str) -> None:
    assert expected in told("denoiser", "smoke", {key: text}).what


def test_spellings_of_numbers_and_lists() -> None:
    for text, value in [("1e-4", 1e-4), ("1E-4", 1e-4), (".5", 0.5), ("3", 3.0)]:
        config = decoding.load("denoiser", "smoke", {"optimizer.lr": text})
        assert config.optimizer.lr == value
    for text in ("0.8,0.95", "[0.8, 0.95]"):
        assert decoding.load("denoiser", "smoke", {"optimizer.betas": text}).optimizer.betas == (0.8, 0.95)
    assert decoding.load("denoiser", "smoke", {"train.flip": "true"}).train.flip is True
    for text, some in [("colour", ["colour"]), ("colour, cutout", ["colour", "cutout"]), ("", []), ("[]", [])]:
        assert decoding.load("autoencoder", "smoke", {"loss.augment": text}).loss.augment == tuple(some)
    words = {"adapter.kind": "textual-inversion", "adapter.words": "blicket"}
    assert decoding.load("denoiser", "smoke", words).adapter.words == ("blicket",)


def test_json_repeats_the_run(tmp_path: Path) -> None:
    for stage, name in ALL:
        config = decoding.load(stage, name, {"train.seed": "5"})
        text = json.dumps(decoding.to_values(config), indent=1)
        assert decoding.load(stage, str(write(tmp_path, text, "config.json"))) == config
        assert decoding.load(stage, str(tmp_path)) == config  # a run folder stands for its config
    path = write(tmp_path, '{\n "optimizer": {\n  "lr": 0.1,\n  "lrate": 1\n }\n}', "config.json")
    assert f"{path}:4: unknown key 'optimizer.lrate'" in told("denoiser", path).what


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.toml", b"\xff\xfe[train]", "not UTF-8 (byte 0)"),
        ("a.toml", b"#" * (reading.LARGEST + 1), "too large"),
        ("a.toml", "[train\n", "a.toml: "),
        ("a.toml", "[optimizer]\nlr = 1.0\nwarmup = 1\nlr = 2.0\n", "a.toml:4: 'lr' is given twice"),
        ("a.toml", "[train]\n[optimizer]\n[train]\n", "a.toml:3: '[train]' is given twice"),
        ("a.toml", "train = 3\n", "a.toml:1: train: expected a section [train], got 3"),
        ("a.toml", "[optimizer]\nlr = 2020-01-01\n", "a.toml:2: optimizer.lr: expected a number"),
        ("a.toml", "[optimizer]\nlr = nan\n", "a finite number"),
        ("a.toml", "[optimizer.lr]\nx = 1\n", "optimizer.lr"),
        ("a.toml", "[schedule]\nkind = ['flow']\n", "schedule.kind: unknown kind"),
        ("a.json", "[1, 2]", "expected sections of keys, got a list"),
        ("a.json", '{"train": {"seed": 1, "seed": 2}}', "'seed' is given twice"),
        ("a.json", '{"train": {"seed": 1}', "a.json: "),
        ("a.json", "[" * 100_000, "a.json: "),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_files(tmp_path: Path, name: str, text: str | bytes, expected: str) -> None:
    assert expected in told("denoiser", write(tmp_path, text, name)).what


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert decoding.load("autoencoder", str(write(tmp_path, ""))) == decoding.decode("autoencoder", {})
    named = write(tmp_path, "[format]\nversion = 3\n")
    assert decoding.load("denoiser", str(named)) == decoding.decode("denoiser", {})


def test_unknown_name() -> None:
    problem = told("autoencoder", "smok")
    assert "no config named 'smok'; did you mean 'smoke'?" in problem.what and "fashion" in problem.hint


def test_an_override_on_a_broken_section(tmp_path: Path) -> None:
    assert "expected a section [train]" in told("denoiser", write(tmp_path, "train = 3"), {"train.seed": "1"}).what


def test_diff() -> None:
    old = decoding.to_values(decoding.load("denoiser", "smoke"))
    new = decoding.to_values(decoding.load("denoiser", "smoke", {"optimizer.lr": "0.5"}))
    assert decoding.diff(old, old) == [] and decoding.diff(old, new) == ["optimizer.lr: 0.001 -> 0.5"]


def overrides(*argv: str) -> dict[str, str]:
    parser = TrainParser("", "denoiser")
    return dict(parser.read_training(["--print-config", *argv]).overrides)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--train-batch-size 4", {"train.micro_batch_size": "4"}),
        ("--train_batch_size=4", {"train.micro_batch_size": "4"}),
        ("--learning_rate 1e-3", {"optimizer.lr": "1e-3"}),
        ("--max-train-steps 9", {"train.max_steps": "9"}),
        ("--max_steps 9", {"train.max_steps": "9"}),
        ("--checkpointing_steps 7", {"train.save_every": "7"}),
        ("--dataloader_num_workers 2", {"train.num_workers": "2"}),
        ("--train.max-steps 9", {"train.max_steps": "9"}),
        ("--train.max_steps=9 --model.kind kl", {"train.max_steps": "9", "model.kind": "kl"}),
        ("--optimizer.lr -1", {"optimizer.lr": "-1"}),
        ("--lr 1 --optimizer.lr 2", {"optimizer.lr": "2"}),
        ("--lr_warmup_steps 500 --lr_scheduler cosine", {"optimizer.warmup": "500", "optimizer.decay": "cosine"}),
        ("--max_grad_norm 1 --adam_weight_decay .01", {"optimizer.clip": "1", "optimizer.weight_decay": ".01"}),
    ],
)
def test_flags(argv: str, expected: dict[str, str]) -> None:
    assert overrides(*argv.split()) == expected


def test_every_alias_sets_its_key() -> None:
    for flag, (key, _, aliases) in KEYS.items():
        for name in (flag, *aliases):
            for spelled in (name, name.replace("-", "_")):
                assert overrides(f"--{spelled}", "1") == {key: "1"}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--max-stps 5", "unrecognized argument: --max-stps; did you mean '--max-steps'?"),
        ("stray", "unrecognized argument: stray"),
        ("--train.seed", "--train.seed: expected a value"),
        ("--gradient-accumulation-steps two", "invalid int value"),
    ],
)
def test_bad_flags(argv: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        overrides(*argv.split())
    assert expected in caught.value.what and caught.value.code == 2 and "--help" in caught.value.hint


@pytest.mark.parametrize(
    ("stage", "overrides", "expected"),
    [
        ("autoencoder", {"model.codes": "512"}, "'model.codes' belongs to kind vq; kind kl takes channels, "),
        ("denoiser", {"sampler.kind": "heun", "sampler.eta": ".5"}, "'sampler.eta' belongs to kind ddim; kind heun "),
        ("denoiser", {"sampler.kind": "euler", "sampler.eta": ".5"}, "; kind euler takes "),
        ("autoencoder", {"model.kind": "kl", "model.levels": "[8]"}, "'model.levels' belongs to kind fsq; kind kl"),
    ],
)
def test_a_key_of_another_kind_is_said_to_be_its(stage: str, overrides: dict[str, str], expected: str) -> None:
    problem = told(stage, "smoke", overrides)
    assert expected in problem.what
    assert "did you mean" not in problem.what
    takes = problem.what.rpartition(" takes ")[2].split(", ")
    (section,) = {key.partition(".")[0] for key in overrides}
    kind = overrides.get(f"{section}.kind", "kl")
    (member,) = [m for m in decoding.sections(stage)[section] if decoding.kinds((m,)) == [kind]]
    assert takes == ([f.name for f in dataclasses.fields(member) if f.name != "kind"] or ["no keys"])


def test_an_unknown_preset_lists_the_presets() -> None:
    for stage in decoding.STAGES:
        problem = told(stage, "xyzzy")
        assert problem.what == "no config named 'xyzzy'"
        assert f"known names: {', '.join(decoding.names(stage))};" in problem.hint


def test_the_micro_batch_is_a_number_or_auto() -> None:
    for text, value in [("auto", "auto"), ("0", 0), ("4", 4)]:
        config = decoding.load("denoiser", "smoke", {"train.micro_batch_size": text})
        assert config.train.micro_batch_size == value
        assert decoding.decode("denoiser", decoding.to_values(config)) == config
    for text, expected in [("-1", "must be >= 0"), ("2.5", "expected a whole number, got 2.5"), ("atuo", "'auto'")]:
        assert expected in told("denoiser", "smoke", {"train.micro_batch_size": text}).what


@pytest.mark.parametrize(
    ("device", "expected"), [("cpu", "torch.compile does not work here (No working C++ compiler"), ("cuda", "no CUDA")]
)
def test_what_the_machine_lacks_is_told_before_the_start(
    device: str, expected: str, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def absent() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", absent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ("--data", shapes, *tiny.AUTOENCODER, "--device", device, "--train.compile", "true", "--dry-run")
    problem = tiny.refused("train_autoencoder", *words)
    assert problem.code == 2 and expected in problem.what and problem.hint
    half = ("--data", shapes, *tiny.AUTOENCODER, "--mixed-precision", "fp16", "--dry-run")
    assert "fp16 needs a GPU" in tiny.refused("train_autoencoder", *half).what


def test_fewer_steps_than_were_trained_are_explained(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults.visits.clear()
    words = ("train_autoencoder", "--data", shapes, "--output", tmp_path / "run", *tiny.AUTOENCODER)
    monkeypatch.setenv("LDM_FAULT", "step:3=term")
    assert tiny.call(*words) == 143
    monkeypatch.delenv("LDM_FAULT")
    problem = tiny.refused(*words, "--resume", "auto", "--max-steps", "2", "--loss.adversarial_start", "3")
    assert problem.code == 2 and problem.what == "the run is at step 3, past train.max_steps 2"
    assert "--max-steps 3 or more" in problem.hint


@pytest.mark.parametrize(("overrides", "said"), [
    ({"grid.kind": "karras", "grid.sigma_min": "20", "schedule.kind": "ddpm-linear", "grid.sigma_max": "40",
      "schedule.beta_max": "0.002"}, "choose one that meets it"),
    ({"grid.kind": "leading", "grid.offset": "1", "sample.steps": "1000"}, "ask for fewer, or for offset 0"),
])
def test_a_grid_that_the_schedule_cannot_have_is_refused_with_the_config(overrides: dict[str, str], said: str) -> None:
    problem = str(told("denoiser", "smoke", overrides))
    assert "command line: grid: " in problem and said in problem


def test_another_kind_starts_from_its_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what the file says for its own kind, a network keeps what both kinds have, a sampler nothing; both is said."""
    given = tmp_path / "a.toml"
    given.write_text(
        f'[format]\nversion = {sections.VERSION}\n[text]\nwidth = 16\ndepth = 1\nheads = 2\n'
        '[sampler]\nkind = "euler-maruyama"\ndiffusion = "sigma"\n[grid]\nkind = "exponential"\nrho = 2.0\n'
    )
    same = decoding.load("denoiser", str(given), {"text.kind": "scratch", "sampler.kind": "euler-maruyama"})
    assert same == decoding.load("denoiser", str(given)) and not capsys.readouterr().err
    kinds = {"text.kind": "label", "sampler.kind": "heun", "grid.kind": "karras"}
    other = decoding.load("denoiser", str(given), kinds)
    assert isinstance(other, decoding.DenoiserConfig) and other.text == type(other.text)(width=16)
    assert (other.sampler.kind, other.grid) == ("heun", type(other.grid)())
    dropped = "text.depth, text.heads, sampler.diffusion, grid.rho"
    said = capsys.readouterr().err
    assert said.startswith(f"note: {given}: not used with another kind: ") and said.count("\n") == 1
    assert set(said.strip().partition("kind: ")[2].split(", ")) == set(dropped.split(", "))
    decoding.load("denoiser", str(given), {"text.kind": "label", "text.width": "32"})
    assert "text.width" not in capsys.readouterr().err  # it was given
