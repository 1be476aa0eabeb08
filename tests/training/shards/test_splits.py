"""The split that names state, whoever wrote them; and what is not one."""

from __future__ import annotations

import pytest

from training.errors import UserError
from training.shards.splits import split_of


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("train-000000",), "train"),
        (("imagenet1k-train-0000",), "train"),
        (("imagenet1k-validation-00",), "val"),
        (("train_subj01_13",), "train"),
        (("COCO.Val2017",), "val"),
        (("Training", "0001"), "train"),
        (("data", "dev", "000"), "val"),
        (("eval 3",), "val"),
        (("set/VALID/x",), "val"),
        (("testing-1",), "test"),
        (("test", "test-0"), "test"),  # said twice, the same
        (("trainer", "value", "contest", "detest", "latest"), None),  # words that only hold one
        (("000000",), None),
        ((), None),
    ],
)
def test_what_names_state(names: tuple[str, ...], split: str | None) -> None:
    assert split_of(*names) == split


@pytest.mark.parametrize("names", [("train", "val-000"), ("train_test_split",)])
def test_two_splits_are_no_split(names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="train.*(val|test)") as caught:
        split_of(*names)
    assert caught.value.code == 3 and "rename" in caught.value.hint
