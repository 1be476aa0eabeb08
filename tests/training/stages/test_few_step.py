"""The gradient step of few-step models, over every member of the family: what moves, what stays, what is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import student_steps
import torch
from student_steps import TAUGHT, Case, Make, Turns, each_case, each_taught, shake, weights
from torch import Tensor
from whole_steps import skip, skipped_leaves_all_as_it_was, take

from ldm.conditioning import Cond
from ldm.objectives import Draw, Losses
from training.errors import UserError
from training.loop.loop import Loop
from training.models.folders import weights as stored
from training.models.lineage import stored_ingredients
from training.stages.captioned import Captions, Sampled, together
from training.stages.student_job import StudentJob
from training.tensors import content_hash

make, teacher = student_steps.make, student_steps.teacher
TURNS, TURNS_ALONE, PROGRESSIVE = Case("turns", "teacher"), Case("turns", "data"), Case("progressive", "teacher")


def gradients(loop: Loop) -> dict[str, Tensor]:
    networks = loop.stage.networks.items()
    return {f"{name}.{key}": p.grad.clone() for name, n in networks for key, p in n.named_parameters()
            if p.grad is not None}  # fmt: skip


@each_taught
def test_the_teacher_is_asked_and_left_alone(case: Case, make: Make) -> None:
    """It is the stored model, in no checkpoint and no optimiser, and the same afterwards; so is the text encoder, of
    which the student has no other. An export says where it is not."""
    stage, loop, job = make(case)
    assert isinstance(job, StudentJob) and all(p.requires_grad for p in stage.network.backbone.parameters())
    before = stored_ingredients(student_steps.final(job))
    assert job.taught_by == {name: before[name] for name in ("denoiser", "text_encoder")} == job.facts()["teacher"]
    backbone, text = job.teacher_parts["denoiser"], job.teacher_parts["text_encoder"]
    assert text is stage.text and not any(part.training for part in (backbone, text))
    assert not any(p.requires_grad for part in (backbone, text) for p in part.parameters())
    for step in range(3):
        take(loop, step)
    frozen = {id(p) for part in (backbone, text) for p in part.parameters()}
    learning = [id(p) for o in loop.optimizers.values() for group in o.param_groups for p in group["params"]]
    assert not frozen & set(learning) and len(set(learning)) == len(learning)
    asked = {p.data_ptr() for p in backbone.parameters()}
    names = set()
    for part in loop.snapshot(3).tensors.values():
        assert not asked & {value.data_ptr() for value in part.values()}
        names |= {key.partition("/")[2].partition(".")[0] or key.partition(".")[0] for key in part}
    assert names == set(stage.networks) == {"denoiser", *stage.companions}
    assert not [key for network in stage.companions for key in stage.networks[network].state_dict() if "text." in key]
    facts = job.facts()
    exported = job.export(loop.run, facts)
    assert exported.keys() >= backbone.state_dict().keys()  # more where it reads a number
    for weight in (next(backbone.parameters()), next(text.parameters())):
        weight.data[0] += 1
        with pytest.raises(RuntimeError, match="of the teacher was"):
            job.export(loop.run, facts)
        weight.data[0] -= 1


@each_case
def test_companions_begin_as_copies_and_are_kept(case: Case, make: Make) -> None:
    """In checkpoints and among what processes compare; those that learn, and no others, have an optimiser."""
    stage, loop, _ = make(case)
    kept = {name for name, companion in stage.companions.items() if companion.kept}
    assert set(loop.optimizers) == {"denoiser", *stage.companions} - kept
    assert set(stage.averaged) == {"denoiser"} and set(stage.networks) == {"denoiser", *stage.companions}
    given, replicated = weights(stage.network), loop.state.replicated()
    for name in stage.companions:
        own = weights(stage.networks[name])
        assert own and all(torch.equal(value, given[key]) for key, value in own.items())
        assert all(f"{name}.{key}" in replicated for key in own)
        assert {key for key in given if not key.startswith("text.")} <= own.keys()
        assert name not in kept or not any(p.requires_grad for p in stage.networks[name].parameters())


def test_companions_begin_with_weights_that_were_given_since(make: Make) -> None:
    """--init-from fills the network once the stage is there."""
    whole, _, job = make(TURNS)
    stage, _, _ = make(TURNS_ALONE, init_from=job.args.teacher)
    theirs = stored(student_steps.final(job) / "model.safetensors", "")
    for name in ("denoiser", "fake", "behind"):
        own = stage.networks[name].state_dict()
        assert all(torch.equal(own[f"backbone.{key}"], value) for key, value in theirs.items())
    assert whole.networks["fake"].text is None and stage.networks["fake"].text is not None


@each_case
def test_gradients_are_those_of_the_batch(case: Case, make: Make) -> None:
    """However it is split, and whether activations are kept or computed again; in several turns and rounds, at weights
    that stand still."""
    found: list[list[dict[str, Tensor]]] = []
    for micro, recomputed in ((8, "false"), (4, "false"), (8, "true")):
        _, loop, _ = make(case, micro=micro, backbone__gradient_checkpointing=recomputed)
        shake(loop)
        found.append([])
        for step in (0, 1, 4):
            loop.gradients(step)
            found[-1].append(gradients(loop))
            loop.step(step, 0.0)
    for whole, *others in zip(*found, strict=True):
        assert sum(float(value.abs().sum()) for value in whole.values()) > 0
        for other in others:
            assert other.keys() == whole.keys()
            for name, value in whole.items():
                scale = float(value.abs().max())
                torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5 * scale + 1e-7, msg=name)


@each_case
def test_bf16_is_of_the_passes_alone(case: Case, make: Make) -> None:
    """What is kept is float32, and a loss is that of float32 as far as bf16 tells."""
    told = []
    for precision in ("no", "bf16"):
        stage, loop, _ = make(case, precision)
        shake(loop)
        told.append([take(loop, step, 0.0) for step in range(2)])
        assert all(p.dtype == torch.float32 for network in stage.networks.values() for p in network.parameters())
    for plain, rounded in zip(*told, strict=True):
        for name in (name for name in plain if name.startswith("loss")):
            assert float(rounded[name]) == pytest.approx(float(plain[name]), rel=0.1, abs=1e-3), name


@each_case
def test_a_step_that_is_skipped_moves_nothing(case: Case, make: Make) -> None:
    """No companion either, nor its moments."""
    _, loop, _ = make(case, train__spike_factor="2")
    shake(loop)
    skipped_leaves_all_as_it_was(loop, 2)


@pytest.mark.parametrize("skipped", [(), (1,), (2,), (1, 2, 3, 4)], ids=str)
def test_each_round_learns_from_the_student_that_ended_the_one_before(skipped: tuple[int, ...], make: Make) -> None:
    """From its first step on, also where that or the one before it is skipped."""
    stage, loop, _ = make(PROGRESSIVE, train__spike_factor="2", train__max_steps="6")
    now, asked = weights(stage.network), dict[str, Tensor]()
    for step in range(6):
        if step % 2 == 0:  # three rounds of two steps
            asked = weights(stage.network) if step else now
        previous = weights(stage.networks["previous"])
        assert all(torch.equal(value, asked[key]) for key, value in previous.items()), step
        (skip if step in skipped else take)(loop, step)


def test_a_running_average_moves_once_a_step(make: Make) -> None:
    """To the weights as the step leaves them."""
    stage, loop, _ = make(TURNS)
    shake(loop)
    expected = weights(stage.networks["behind"])
    for step in range(3):
        take(loop, step, 0.1)
        expected = {key: torch.lerp(value, weights(stage.network)[key], 0.25) for key, value in expected.items()}
        for key, value in weights(stage.networks["behind"]).items():
            torch.testing.assert_close(value, expected[key])


def test_networks_that_take_turns(make: Make) -> None:
    """The average of the student moves with its own steps alone; each loss and norm is told in its own turns."""
    stage, loop, _ = make(TURNS)
    shake(loop)
    for step in range(6):
        live, average = weights(stage.network), {key: value.clone() for key, value in loop.ema.shadow.items()}
        told = take(loop, step)
        own, name = step % 2 == 0, "student" if step % 2 == 0 else "fake"
        assert told.keys() == {f"loss_{name}", f"grad_norm/{'denoiser' if own else 'fake'}"}
        assert all(torch.equal(value, live[key]) for key, value in weights(stage.network).items()) is not own
        assert all(torch.equal(value, average[key]) for key, value in loop.ema.shadow.items()) is not own
    assert loop.ema.updates == 3
    assert loop.optimizers["fake"].param_groups[0]["lr"] == 2e-3  # twice the rate of the last step


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_companion_that_breaks_stops_the_run(what: str, waits: bool, make: Make) -> None:
    """Before a weight moves: its loss, or its gradient alone, read at once or late."""
    stage, loop, _ = make(TURNS)
    loop.waits = waits
    take(loop, 0)
    name, fake = next(stage.networks["fake"].named_parameters())
    if what == "loss":
        fake.data[0] = torch.nan
    else:
        fake.register_hook(lambda gradient: gradient * torch.nan)  # type: ignore[no-untyped-call]
    before = weights(stage.networks["fake"])
    said = {"loss": "loss is not finite at step 1", "gradient": "grad_norm of the fake is not finite at step 1"}
    with pytest.raises(UserError, match=said[what]) as caught:
        take(loop, 1)
        loop.settle()
    assert caught.value.code == 5
    after = weights(stage.networks["fake"])
    assert all(torch.equal(after[key], value) for key, value in before.items() if key != name or what == "gradient")


@pytest.mark.parametrize("case", [TURNS, TURNS_ALONE], ids="-".join)
def test_who_reads_the_captions(case: Case, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a student the teacher's text encoder, once for all; one that learns is in each network, which reads them
    itself, and learns in its own turn."""
    seen: list[Any] = []
    losses = Turns.losses

    def told(self: Turns, *words: Any) -> Losses:
        seen.append(words[2])
        return losses(self, *words)

    monkeypatch.setattr(Turns, "losses", told)
    stage, loop, _ = make(case)
    shake(loop)
    learns = case is TURNS_ALONE
    for step, name in enumerate(("denoiser", "fake")):
        loop.gradients(step)
        texts = {key for key in gradients(loop) if ".text." in key}
        assert {key.partition(".")[0] for key in texts} == ({name} if learns else set())
        loop.step(step, 1e-3)
    assert all(isinstance(cond, Captions if learns else Cond) for cond in seen)
    own = {key.removeprefix("text.") for key in stage.networks["behind"].state_dict() if key.startswith("text.")}
    assert own == (set(stage.text.state_dict()) if learns else set())
    assert content_hash(stage.text.state_dict()) != content_hash(stage.networks["fake"].state_dict())


def test_processes_must_read_the_same_teacher(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loads it from a disk of its own, and no exchange of gradients would tell."""
    told: list[Mapping[str, str]] = []
    monkeypatch.setattr("training.stages.student_job.is_distributed", lambda: True)
    monkeypatch.setattr("training.stages.student_job.agree", told.append)
    _, _, job = make(TAUGHT[0])
    assert isinstance(job, StudentJob) and told == [{"teacher": job.taught_by["denoiser"]}]


def test_what_else_was_drawn_stays_with_its_samples() -> None:
    """Where prior pictures are trained on beside others."""
    one, noise = torch.ones(2), torch.ones(2, 1)
    draws = [Draw(one, noise, one, {"s": torch.full((2,), n)}) for n in (0.0, 1.0)]
    parts = [Sampled(noise, Captions(["a"] * 2, {}), draw) for draw in draws]
    assert together(parts).draw.more["s"].tolist() == [0, 0, 1, 1]

