"""The field's words for what a pipeline is asked: each is exactly one of our settings, and no two are taken at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ldm.arguments import Sampling, Settings, translated
from ldm.grids import Uniform
from ldm.guidance import ByClassifier, ClassifierFree
from ldm.samplers import Euler

GUIDANCE = ClassifierFree(scale=2.0, rescale=0.5)
PLAN = Sampling(sampler=Euler(), grid=Uniform(), guidance=GUIDANCE, steps=5)


def read(captions: Any = None, seeds: Any = None, plan: Sampling = PLAN, **words: Any) -> tuple[Any, Any, Settings]:
    return translated(captions, seeds, words, plan)  # type: ignore[arg-type]


def test_nothing_said_is_nothing_changed() -> None:
    assert read("a red circle") == (["a red circle"], 0, {})
    assert read(["a", "b"], [4, 5], negative="x", size=(8, 16), batch_size=2) == (
        ["a", "b"], [4, 5], {"negative": "x", "size": (8, 16), "batch_size": 2})  # fmt: skip
    empty = dict.fromkeys(("prompt", "negative_prompt", "seed", "height", "width", "guidance_scale"))
    assert read("a", **empty) == read("a")  # None is not given, as elsewhere


@pytest.mark.parametrize(("words", "ours"), [
    ({"negative_prompt": "x"}, {"negative": "x"}),
    ({"negative_prompt": ["x", "y"]}, {"negative": ["x", "y"]}),
    ({"height": 8, "width": 16}, {"size": (8, 16)}),
    ({"num_inference_steps": 7}, {"sampling": replace(PLAN, steps=7)}),
    ({"guidance_scale": 3}, {"sampling": replace(PLAN, guidance=replace(GUIDANCE, scale=3.0))}),
    ({"guidance_scale": 1, "num_inference_steps": 7},
     {"sampling": replace(PLAN, guidance=replace(GUIDANCE, scale=1.0), steps=7)}),
])  # fmt: skip
def test_a_word_is_one_of_our_settings(words: dict[str, Any], ours: dict[str, Any]) -> None:
    assert read(["a", "b"], **words) == (["a", "b"], 0, ours)


def test_a_seed_counts_the_pictures_of_a_caption() -> None:
    assert read(prompt=["a", "b", "a"], seed=7)[:2] == (["a", "b", "a"], [7, 7, 8])
    assert read("a", seed=7, num_images_per_prompt=3)[:2] == (["a"] * 3, [7, 8, 9])
    captions, seeds, settings = read(["a", "b"], seed=7, num_images_per_prompt=2, negative_prompt=["x", "y"])
    assert (captions, seeds) == (["a", "a", "b", "b"], [7, 8, 7, 8]) and settings == {"negative": ["x", "x", "y", "y"]}
    assert read(["a", "b"], [1, 2, 3, 4], num_images_per_prompt=2)[1] == [1, 2, 3, 4]
    assert read(["a", "b"], 5, num_images_per_prompt=2)[1] == 5  # the first of a run


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no caption": ({"captions": None}, "draws captions: give one"),
    "two captions": ({"prompt": "b"}, "prompt and captions were both given: give one of them"),
    "two seeds": ({"seed": 1, "seeds": 2}, "seed and seeds were both given"),
    "two negatives": ({"negative": "x", "negative_prompt": "y"}, "negative_prompt and negative were both"),
    "two sizes": ({"size": (8, 8), "height": 8, "width": 8}, "height and size were both"),
    "two ways to draw": ({"sampling": PLAN, "num_inference_steps": 3}, "num_inference_steps and sampling were both"),
    "two guidances": ({"sampling": PLAN, "guidance_scale": 3}, "guidance_scale and sampling were both"),
    "a height alone": ({"height": 8}, "height was given alone: give height and width"),
    "a width alone": ({"width": 8}, "width was given alone"),
    "seeds as a seed": ({"seed": [1, 2]}, r"seed is a whole number, got \[1, 2\]"),
    "half a step": ({"num_inference_steps": 2.5}, "num_inference_steps is a whole number, got 2.5"),
    "no copies": ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
    "less than no guidance": ({"guidance_scale": 0}, "guidance_scale must be at least 1, which is no guidance, got 0"),
    "no number for a scale": ({"guidance_scale": float("nan")}, "guidance_scale must be at least 1"),
    "an endless scale": ({"guidance_scale": float("inf")}, "scale must be in"),
    "a scale of a classifier": ({"guidance_scale": 2, "plan": replace(PLAN, guidance=ByClassifier())},
                                "no setting of the guidance 'classifier'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_conflict_is_refused_in_a_sentence(case: str) -> None:
    words, said = WRONG[case]
    with pytest.raises(ValueError, match=said):
        read(**{"captions": "a", **words})


def test_an_unknown_word_is_an_error_with_what_is_near() -> None:
    with pytest.raises(TypeError, match="takes no 'num_inference_step': did you mean 'num_inference_steps'?"):
        read("a", num_inference_step=3)
    with pytest.raises(TypeError, match="takes no 'xyzzy': known are also, batch_size, extras, guidance_scale, "):
        read("a", xyzzy=3)
