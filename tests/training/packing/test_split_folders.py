"""Which folders are splits and which are classes."""

from __future__ import annotations

import pytest

from training.errors import UserError
from training.packing.split_folders import split_folders


def taken(*folders: str) -> dict[str, str]:
    return {folder: split for folder, (split, _) in split_folders(folders).items()}


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        ("train val", "train val"),
        ("TRAIN/cat Validation/cat", "train val"),
        ("train2017 val2017 test2017", "train val test"),
        ("set/imagenet_train set/imagenet_dev", "train val"),
        ("trainval testing", "train test"),
        ("train/val-like valid/train", "train val"),  # the first level that divides them, not a class below
        ("tests-of-mine/train tests-of-mine/test", "train test"),  # what all share says nothing
        ("train/cat train/dog", "train train"),  # unless no other speaks
        ("train test extra", "train test -"),
        ("val images", "val -"),
        ("train car bus", "- - -"),  # a class of vehicles
        ("train_station test_tube pier", "- - -"),  # classes of places and things
        ("cat dog", "- -"),
        ("my_train/cat my_train/dog", "- -"),
        (" train", "- -"),  # pictures beside the only folder
    ],
)
def test_splits_of_folders(folders: str, splits: str) -> None:
    names = folders.split(" ")
    expected = {name: split for name, split in zip(names, splits.split(), strict=True) if split != "-"}
    assert taken(*names) == expected


def test_the_part_that_said_so_is_told() -> None:
    assert split_folders(["a/train2017/x", "a/val2017/y"])["a/val2017/y"] == ("val", "a/val2017")


def test_two_words_in_one_name() -> None:
    with pytest.raises(UserError) as caught:
        split_folders(["train-val", "test"])
    assert caught.value.code == 3 and "--splits draw" in caught.value.hint
    assert taken("train-val/a", "train-val/b") == {} == taken("train-val", "cat")  # where nothing hangs on it
