"""What is alive after each operation, and the peak at any micro-batch from two: exact on tensors of known sizes."""

from __future__ import annotations

import torch
from torch import nn

from training.planning.memory import Observed, Peak, Seen, Timeline, born, predicted, sizes
from training.planning.trial import steady


def test_only_what_is_new_and_still_there_is_alive() -> None:
    old = torch.ones(8)
    with Timeline("cpu") as timeline:
        first = old + 1  # 32 bytes
        view = first.view(2, 4)
        old.mul_(2)
        old.view(4, 2)
        second = torch.cat([first, first])  # 64 more
        del first, view
        third = second.sum()
    assert timeline.line == [32, 32, 32, 32, 96, 68]
    del second, third
    assert timeline.held == 0


def test_another_device_is_not_counted() -> None:
    with Timeline("cuda") as timeline:
        torch.ones(8) + 1
    assert timeline.line == [0, 0]


def test_what_the_backward_pass_keeps_is_alive_until_it_has_been_there() -> None:
    """The square of the first product's output needs that output; its gradient is the weight's by the end."""
    layer = nn.Linear(16, 16, bias=False)
    with Timeline("cpu") as timeline:
        loss = layer(torch.ones(4, 16)).square().sum()
        kept = timeline.held
        loss.backward()
        stage = type("Stage", (), {"networks": {"layer": layer}})
        ((since, size),) = born(stage, timeline)  # type: ignore[arg-type]
    assert kept == 2 * 4 * 16 * 4 + 4  # input, output, loss; the square is gone
    assert size == 16 * 16 * 4 and timeline.line[since] - timeline.line[since - 1] >= 0
    del loss
    assert timeline.held == size


SMALL, LARGE = Seen(2, [102, 100], [(0, 30)], 105), Seen(4, [104, 200], [(0, 30), (1, 5)], 207)


def test_the_peak_is_the_largest_of_all_lines_wherever_it_lies() -> None:
    """After the first operation 100 + m bytes are alive, after the second 50 m; kernels take m + 1 ... beyond that."""
    assert predicted(SMALL, LARGE, 1) == Peak(gradients=30, activations=71, kernels=1)
    assert predicted(SMALL, LARGE, 10) == Peak(gradients=35, activations=465, kernels=19)
    assert predicted(SMALL, LARGE, 10).total == 519


def test_of_other_operations_the_peaks_alone_count() -> None:
    longer = LARGE._replace(line=[104, 200, 150])
    assert predicted(SMALL, longer, 10) == Peak(gradients=35, activations=102 + 4 * 98 - 35, kernels=19)


def test_kernels_never_take_less_than_nothing() -> None:
    assert predicted(SMALL, LARGE._replace(highest=200), 10).kernels == 0


def test_passes_after_another_have_their_own_steps() -> None:
    again = SMALL._replace(line=[142, 140]), LARGE._replace(line=[144, 240])
    seen = Observed(False, (SMALL, LARGE), again, 1000)
    assert seen.total(10, 1) == 1519
    assert seen.peak(10, 2).activations == seen.peak(10, 3).activations == 505


def test_micro_batches_divide_what_a_process_has() -> None:
    assert sizes(24, 1, 24) == [1, 2, 4, 8, 24]
    assert sizes(24, 3, 24) == [3, 6, 12, 24]
    assert sizes(24, 1, 6) == [1, 2, 4, 6, 8, 24]
    assert sizes(1, 1, 1) == [1]


def test_the_first_steps_do_not_count() -> None:
    assert steady([0.0, 9.0, 10.0, 12.0]) == [1.0, 2.0]
    assert steady([0.0, 9.0]) == [9.0]
    assert steady([float(n * n) for n in range(11)]) == [9.0, 11.0, 13.0, 15.0, 17.0, 19.0]
