"""The suite: sides take turns, unequal ones are not timed, targets are judged, and pages say what was measured."""

from __future__ import annotations

import json
import multiprocessing
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from training.benchmarks import lanes, meters, results, suite
from training.benchmarks.case import OURS, PEAK_GPU, SAME, STOCK, Case, Contest, Lane, Number, Place, Target
from training.benchmarks.cases import CASES
from training.benchmarks.cases.denoisers import CASES as DENOISERS
from training.benchmarks.cases.light import Light
from training.errors import UserError
from training.messages import SAID

FAST = Target(name="speed", over=STOCK.name, under=OURS.name, least=2.0)
CHEAP = Target(name="cost", over=OURS.name, under=SAME.name, most=1.0, checked=False)


class Fake(Case):
    """Two sides whose turns are read from a list."""

    kind, title = "fake", "a case that takes no time"
    lanes, targets = (OURS, STOCK, SAME), (FAST, CHEAP)
    gpu_lanes, gpu_targets = (OURS,), (Target(name="MFU", over="989 TFLOP/s", under=OURS.name, share=True),)

    def __init__(self, equal: bool = True) -> None:
        self.equal = equal

    def build(self, place: Place) -> Contest:
        def agree() -> None:
            if not self.equal:
                raise AssertionError("1.0 and\n2.0")

        return Contest({"ours": lambda: 1.0, "peer": lambda: 2.0}, agree, alone=True, facts={"waits": lambda: 3.0})


class Script:
    """In place of processes: what each turn takes, and the order in which they were asked."""

    def __init__(self, *seconds: float, flops: float = 0.0) -> None:
        self.seconds, self.asked, self.opened = iter(seconds), list[str](), 0
        self.told = {"items": 4, "unit": "images", "flops": flops}

    def __call__(self, case: Case, own: Any, place: Place) -> Script:
        self.opened += 1
        return self

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_: object) -> None: ...

    def turn(self, lane: Lane) -> float:
        self.asked.append(lane.name)
        return next(self.seconds)

    def facts(self) -> dict[str, float]:
        return {"waits": 0.5}


@pytest.fixture(autouse=True)
def speech(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process of a lane is silent; this one is as before."""
    monkeypatch.setattr(SAID, "quiet", SAID.quiet)
    yield


def measured(script: Script, rounds: int, check: bool = False, device: str = "cpu") -> dict[str, Any]:
    return suite.measured([Fake()], Place(device), rounds, check=check, crew=script)


def test_sides_take_turns_in_alternating_order() -> None:
    script = Script(*range(1, 10))
    found = measured(script, 3)["fake"]
    there = [OURS.name, STOCK.name, SAME.name]
    assert script.asked == there + there[::-1] + there
    assert found["lanes"] == {OURS.name: [1, 6, 7], STOCK.name: [2, 5, 8], SAME.name: [3, 4, 9]}
    assert found["facts"] == {"waits": 0.5} and found["items"] == 4


def test_a_number_is_the_median_of_the_rounds_quotients_and_the_round_that_speaks_least_for_us() -> None:
    rounds = {OURS.name: [1.0, 1.0, 2.0], STOCK.name: [3.0, 1.5, 3.8], SAME.name: [1.0, 2.0, 2.5]}
    assert Number.of(FAST, rounds) == (FAST, 1.9, 1.5)
    assert Number.of(CHEAP, rounds) == (CHEAP, 0.8, 1.0)
    difference = Target(name="start-up", over=STOCK.name, under=OURS.name, most=1.0, minus=True)
    assert Number.of(difference, rounds) == pytest.approx((difference, 1.8, 2.0))


def test_targets_are_met_or_not_and_missed_by_a_fifth() -> None:
    assert [FAST.met(value) for value in (2.0, 1.99)] == [True, False]
    assert [FAST.met(value, 0.8) for value in (1.6, 1.59)] == [True, False]
    assert [CHEAP.met(value) for value in (1.0, 1.01)] == [True, False]
    assert [CHEAP.met(value, 0.8) for value in (1.25, 1.26)] == [True, False]
    assert Target(name="told", over="a", under="b").met(0.0) is None
    assert (FAST.told(), CHEAP.told()) == (">= 2x", "<= 1x")
    assert Target(name="a share", over="a", under="b", least=0.65, share=True).told() == ">= 65%"


def test_a_case_below_its_target_is_measured_once_more_and_the_better_counts() -> None:
    met = Script(1, 2, 2)
    measured(met, 1, check=True)
    assert met.opened == 1
    again = Script(1, 1.5, 2, 1, 1.7, 2)
    found = measured(again, 1, check=True)
    assert again.opened == 2 and results.missed([Fake()], found, "cpu", 0.8) == []
    twice = Script(1, 1.5, 2, 1, 1.4, 2)
    found = measured(twice, 1, check=True)
    assert found["fake"]["lanes"][STOCK.name] == [1.5]
    assert results.missed([Fake()], found, "cpu", 0.8) == ["fake: speed 1.50x (target >= 2x)"]
    only_told = Script(1, 1.5, 2)
    measured(only_told, 1)
    assert only_told.opened == 1


def test_a_gpu_is_set_against_its_data_sheet() -> None:
    found = measured(Script(2.0, flops=PEAK_GPU), 1, device="cuda")
    (number,) = results.numbers(Fake(), found, "cuda")
    assert number.value == 0.5 and results.shown(number, number.value) == "50.0%"


def test_a_table_says_what_was_measured_and_what_was_not() -> None:
    found = measured(Script(1, 1.9, 2), 1)
    assert results.table([Fake()], found, "cpu")[2:] == [
        "| a case that takes no time | speed | >= 2x | 1.90x | 1.90x | not met |",
        "| a case that takes no time | cost | <= 1x | 0.50x | 0.50x | met |"]
    nothing = "| a case that takes no time | speed | >= 2x | not yet measured | | |"
    assert results.table([Fake()], {}, "cpu")[2] == nothing
    told = results.below({"torch": "2"}, found)
    assert told[0] == "torch 2." and "ours 1 s (4 images/s)" in told[2] and "waits 0.5" in told[2]
    record = json.loads(json.dumps(results.record({"torch": "2"}, [Fake()], found, "cpu")))
    assert [number["met"] for number in record["cases"]["fake"]["numbers"]] == [False, True]


def test_a_page_keeps_what_another_device_was_measured_to_do() -> None:
    page = "# Top\n<!-- measured: cpu -->\nold\n<!-- end -->\nbetween\n<!-- measured: cuda -->\nGPU\n<!-- end -->\n"
    new = results.renewed(page, [Fake()], measured(Script(1, 2, 3), 1), {"torch": "2"}, "cpu")
    assert "old" not in new and "| 2.00x |" in new and new.endswith(page.partition("old\n")[2])
    assert results.renewed(new, [Fake()], measured(Script(1, 2, 3), 1), {"torch": "2"}, "cpu") == new
    with pytest.raises(ValueError, match="no section"):
        results.renewed("# Top\n", [Fake()], {}, {}, "cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
def test_every_case_times_what_its_targets_name_and_stands_on_the_page(case: Case, device: str) -> None:
    own, targets = case.at(device)
    assert {name for target in targets for name in (target.over, target.under)} <= {
        *(lane.name for lane in own), *(["989 TFLOP/s"] if device == "cuda" else [])}
    page = (tiny.ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    section = page.partition(f"<!-- measured: {device} -->")[2].partition("<!-- end -->")[0]
    for target in targets:
        assert f"| {case.title} | {target.name} | {target.told()} |" in section


def served(case: Case, *asked: str) -> list[Any]:
    """What a lane's process says, here without the process."""
    own, other = multiprocessing.Pipe()
    for side in asked:
        own.send(side)
    place = Place(size="smoke", setting="installed")
    with own:
        work = threading.Thread(target=lanes.serve, args=(other, case, place))
        work.start()
        said = [own.recv() for _ in range(len(asked) + 1)]
    work.join()
    return said


def test_a_process_takes_turns_and_tells_facts() -> None:
    begun, ours, peer, facts = served(Fake(), "ours", "peer", "")
    assert (begun["items"], ours, peer, facts) == (1, 1.0, 2.0, {"waits": 3.0})


def test_sides_that_differ_are_not_timed() -> None:
    (problem,) = served(Fake(equal=False))
    assert isinstance(problem, UserError) and problem.code == 4
    assert problem.what == "fake: the sides do not give the same, so they are not timed: 1.0 and 2.0"


def test_a_process_that_was_ended_is_one_sentence() -> None:
    own, other = multiprocessing.Pipe()
    other.close()
    crew = object.__new__(lanes.Crew)
    crew.case = Fake()
    with pytest.raises(UserError, match="its process ended") as caught:
        crew._heard(own)
    assert caught.value.code == 6 and "--cases" in caught.value.hint and "--smoke" in caught.value.hint


def test_a_turn_is_as_many_calls_as_last_and_gives_the_seconds_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "seconds", lambda call, *_, **__: (call(), 0.01 * len(calls))[1])
    calls = list[int]()
    bench = object.__new__(lanes.Bench)
    bench.case, bench.place, bench.calls = Fake(), Place(size="smoke"), {}
    bench.contest = Contest({"ours": lambda: calls.append(1)}, lambda: None)
    bench.turn("ours")
    assert bench.calls == {"ours": 2} and len(calls) == lanes.WARM["smoke"] + 2  # the warm call took 0.02 s of 0.05
    monkeypatch.setattr(meters, "seconds", lambda *_, **__: 0.05)
    bench.contest.calls["product"], bench.contest.flops = lambda: None, 3 * 2.0 * lanes.SIDE["smoke"] ** 3
    assert bench.turn("product") == pytest.approx(3 * 0.05)  # as long as a call's FLOPs would take


def test_the_allocator_is_left_alone_where_the_peer_is_as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = list[str]()
    monkeypatch.setattr("training.machine.memory.keep_memory", lambda: kept.append("kept"))
    lanes.set_up(Place(setting="installed"))
    assert kept == []
    lanes.set_up(Place(setting="launched"))
    assert kept == ["kept"]
    torch.set_flush_denormal(False)


def test_flops_are_two_for_each_multiply_add() -> None:
    layer, x = torch.nn.Linear(8, 16, device="meta"), torch.zeros(4, 8, device="meta")
    assert meters.flops(lambda: layer(x)) == 2 * 4 * 8 * 16
    assert meters.flops(lambda: layer(x).sum().backward()) == 2 * (2 * 4 * 8 * 16)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_of_attention_are_counted_on_a_cpu_too(device: str) -> None:
    """Two products forward, 2 B H N N d each; backward four, and the first once more where its result was not kept."""
    q = torch.randn(2, 3, 16, 8, device=device, requires_grad=True)
    product = 2 * 2 * 3 * 16 * 16 * 8

    def step() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()

    assert meters.flops(step) == {"cpu": 7, "meta": 6}[device] * product


def test_flops_are_counted_where_a_step_asks_for_a_gradient_within_it() -> None:
    layer, x = torch.nn.Linear(8, 16, bias=False), torch.ones(4, 8)
    assert meters.flops(lambda: torch.autograd.grad(layer(x).sum(), list(layer.parameters()))) == 2 * (2 * 4 * 8 * 16)


@pytest.fixture
def even(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lane of every case takes a second."""
    monkeypatch.setattr(suite, "one", lambda case, *_: {"lanes": {lane.name: [1.0] for lane in case.lanes}, "facts": {},
                                                        "items": 1, "unit": "images", "flops": 0.0})  # fmt: skip


def test_what_is_refused_goes_as_the_hint_says(even: None, tmp_path: Path) -> None:
    words = ("benchmark", "suite", "--smoke", "--cases", "dit")
    refused = tiny.refused(*words, "--gpu")
    assert "no CUDA device" in refused.what and "leave --gpu out" in refused.hint
    assert "at least 0" in str(tiny.refused(*words, "--rounds", -1))
    assert tiny.call(*words, "--rounds", 1, "--threads", 0) == 0
    assert "unknown name 'dot'" in str(tiny.refused(*words[:-1], "dot"))
    assert "no such page" in str(tiny.refused(*words, "--renew", tmp_path / "x.md"))


def test_a_check_that_fails_exits_with_1(even: None, tmp_path: Path) -> None:
    words = ("suite", "--smoke", "--busy", "--cases", "dit", "--json", tmp_path / "x.json")
    assert tiny.call("benchmark", *words) == 0
    assert json.loads((tmp_path / "x.json").read_text())["about"]["clock"] == "processor time"
    assert tiny.call("benchmark", *words, "--overwrite", "--check") == 1


def test_a_page_is_renewed_by_what_was_measured(even: None, tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text((tiny.ROOT / "docs" / "benchmarks.md").read_text("utf-8"), "utf-8")
    assert tiny.call("benchmark", "suite", "--smoke", "--cases", "dit", "--renew", page) == 0
    cpu, _, gpu = page.read_text("utf-8").partition("## On a GPU")
    assert cpu.count("| 1.00x | 1.00x | not met |") == 2 and "size smoke" in cpu and "not yet measured" in cpu + gpu


PAIRED = ("dit", "pixart", "unet", "autoencoder", "encode", "decode", "light", "sampling")


@pytest.mark.parametrize("case", [case for case in CASES if case.kind in PAIRED], ids=lambda case: case.kind)
def test_peers_of_the_same_weights_give_the_same(case: Case) -> None:
    pytest.importorskip("diffusers")
    contest = case.build(Place(size="smoke", setting="installed"))
    contest.agree()
    for call in contest.calls.values():
        call()
    timed = {lane.side for device in ("cpu", "cuda") for lane in case.at(device)[0]}
    assert timed <= {*contest.calls, *(["product"] if contest.flops else [])}


def test_the_light_decoder_takes_an_eighth_of_the_multiply_adds() -> None:
    """The peer's at a quarter of its widths and 64 px are counted by hand: blocks, resizing, ends, attention."""
    pytest.importorskip("diffusers")
    ours, theirs = (fact() for fact in Light().build(Place(size="smoke")).facts.values())
    up = 9 * 128**2 / 64  # a convolution of 128 channels at an eighth of the side
    level = [9 * width**2 / cells for width, cells in ((128, 64), (128, 16), (64, 4), (32, 1))]
    wider = [9 * (128 * 64) / 4 + 128 * 64 / 4 + 5 * level[2], 9 * (64 * 32) + 64 * 32 + 5 * level[3]]
    resized = 9 * 128**2 / 16 + 9 * 128**2 / 4 + 9 * 64**2
    ends = (16 + 9 * 4 * 128) / 64 + 9 * 32 * 3
    attention = (4 * 128**2 + 2 * 64 * 128) / 64
    assert theirs == 10 * up + 6 * level[1] + sum(wider) + resized + ends + attention
    assert 8 * ours <= theirs


def test_a_network_that_was_changed_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    case = DENOISERS[0]
    right = case.ours
    monkeypatch.setattr(type(case), "ours", lambda self, *given: right(*given) + 3e-4)
    with pytest.raises(AssertionError, match="not close"):
        case.build(Place(size="smoke", setting="installed")).agree()


@pytest.mark.many
def test_processes_of_both_settings_measure_what_both_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.call("benchmark", "suite", "--smoke", "--busy", "--rounds", 1, "--cases", "latents,loop") == 0
    told = capsys.readouterr().out
    assert len(re.findall(r"\| (?:not )?met \|", told)) == 2 and "waiting for data" in told
