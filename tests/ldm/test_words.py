"""New words upon a text encoder that stays as it is, to the bit: textual inversion."""

from __future__ import annotations

import json
from typing import Any

import pytest
import test_text as models
import torch
from torch import Tensor

from ldm.adapters import Adapter, NoAdapter
from ldm.adapters.joined import Joined, build
from ldm.adapters.low_rank import LoRA
from ldm.adapters.words import TextualInversion, Words
from ldm.text import HuggingFace, Label, Scratch, TextEncoder
from ldm.text.encoders import ScratchTextEncoder

OLD = ["a red circle", "", "a blue square left of a red circle", "red"]
NEW = ["a blicket", "blicket dax circle"]
BACKBONE: Any = None  # no adapter of words touches it


def base(seed: int = 0) -> ScratchTextEncoder:
    torch.manual_seed(seed)
    config = Scratch(width=16, heads=2, length=12, depth=1)
    text = config.build(config.vocabulary(OLD))
    with torch.no_grad():
        for parameter in text.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # no layer is the identity
    return text.requires_grad_(False)


def built(text: TextEncoder, *words: str, kin: tuple[str, ...] = ()) -> Words:
    return TextualInversion(words=words, kin=kin).build(BACKBONE, text)


def taught(text: TextEncoder, *words: str, kin: tuple[str, ...] = ()) -> Words:
    adapter = built(text, *words, kin=kin)
    assert adapter.attach(BACKBONE, text) == (BACKBONE, text)
    return adapter


def told(text: TextEncoder, captions: list[str]) -> Tensor:
    cond = text(captions)
    return torch.cat([cond.context.flatten(1), cond.pooled], 1)


def row(text: ScratchTextEncoder, word: str) -> Tensor:
    return text.table()[text.tokenizer.vocabulary.index(word)]


def test_a_new_word_begins_as_its_kin() -> None:
    text = base()
    taught(text, "blicket", "dax", kin=("square", "red"))
    assert torch.equal(row(text, "blicket"), row(text, "square")) and torch.equal(row(text, "dax"), row(text, "red"))
    same = ["a square left of a red circle", "a blicket left of a dax circle"]
    assert torch.equal(*told(text, same))
    taught(text, "wug", "toma", kin=("dax",))  # a word that was taught before is known as any other
    assert torch.equal(row(text, "wug"), row(text, "red")) and torch.equal(row(text, "toma"), row(text, "red"))


def test_without_kin_a_word_begins_as_every_word_does() -> None:
    words = tuple(f"w{number}" for number in range(400))
    torch.manual_seed(3)
    rows = taught(base(), *words).rows
    torch.manual_seed(0)
    text = base()
    torch.manual_seed(3)
    assert not torch.equal(taught(text, "blicket", "dax").rows[0], rows[1])
    assert abs(rows.mean()) < 0.05 and abs(rows.std() - 1) < 0.05


def test_training_moves_the_new_rows_alone() -> None:
    """100 steps of AdamW with weight decay, which moves rows that have no gradient: every bit of the base stays."""
    text = base()
    before, captions = {name: tensor.clone() for name, tensor in text.state_dict().items()}, told(text, OLD)
    adapter = taught(text, "blicket", "dax", kin=("square",))
    first, target = adapter.rows.detach().clone(), told(base(1), OLD[:1])
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=5e-3, weight_decay=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        (told(text, NEW[:1]) - target).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in text.state_dict().items())
    assert torch.equal(told(text, OLD), captions)
    moved = (adapter.rows.detach() - first).abs().amax(1)
    assert moved[0] > 0.1
    assert torch.allclose(adapter.rows[1], first[1] * (1 - 5e-3 * 0.5) ** 100)  # by the decay, which is its own


def test_new_words_follow_their_encoder() -> None:
    """To another dtype or device: the encoder of a stage of a cascade is moved, and does not hold its words."""
    text = base()
    adapter = taught(text, "dax", "blicket")
    wanted = told(text, NEW)
    torch.testing.assert_close(told(text.bfloat16(), NEW).float(), wanted, rtol=0.1, atol=0.1)
    assert adapter.rows.dtype == torch.float32 and text.table().dtype == torch.bfloat16
    assert text.to("meta").table().is_meta and not adapter.rows.is_meta


def test_a_caption_gives_gradient_to_the_new_words_that_it_has() -> None:
    text = base()
    text.requires_grad_(True)
    adapter = taught(text, "blicket", "dax")
    told(text, ["a blicket"]).square().sum().backward()
    assert adapter.rows.grad is not None and text.words.weight.grad is not None
    assert adapter.rows.grad[0].abs().min() > 0 and not adapter.rows.grad[1].any()
    assert [name for name, _ in adapter.named_parameters()] == ["rows"]
    assert "rows" not in " ".join(text.state_dict())


def test_at_strength_0_the_words_are_unknown_again() -> None:
    text = base()
    alone = told(text, NEW + OLD)
    first, second = taught(text, "blicket"), taught(text, "dax")
    known = told(text, NEW + OLD)
    assert (known[:2] - alone[:2]).abs().min(1).values.max() > 0 and torch.equal(known[2:], alone[2:])
    for adapter in (first, second):
        adapter.strength = 0.3  # no row is made smaller
    assert torch.equal(told(text, NEW + OLD), known)
    dax = row(text, "dax")
    first.strength = 0
    assert [list(reading.unknown) for reading in text.readings(NEW)] == [["blicket"], ["blicket"]]
    assert torch.equal(row(text, "dax"), dax)  # though it has another number
    second.strength = 0
    assert torch.equal(told(text, NEW + OLD), alone)


def test_what_is_taught_is_told_as_known() -> None:
    text = base()
    adapter = taught(text, "blicket")
    assert [list(reading.unknown) for reading in text.readings([*NEW, "zeb"])] == [[], ["dax"], ["zeb"]]
    assert [reading.blank for reading in text.readings(["blicket", "dax"])] == [False, True]
    assert text.truncated(["blicket " * 10, "blicket " * 11]) == 1
    assert text.tokenizer.vocabulary == (*text.own.vocabulary, "blicket")
    with pytest.raises(ValueError, match="words: 'blicket' is known to the text encoder already"):
        Words(("blicket",), torch.zeros(1, 16)).attach(BACKBONE, text)
    adapter.strength = 0  # another would be in its place as soon as it is put to work again
    with pytest.raises(ValueError, match="'blicket' is known"):
        taught(text, "dax", "blicket")
    assert text.tokenizer == text.own


@pytest.mark.parametrize(("words", "kin", "reason"), [
    ((), (), "words: name the new words"),
    (("red",), (), "words: 'red' is known to the text encoder already"),
    (("blicket-2",), (), "words: 'blicket-2' is not one word as captions are read, but 'blicket' '-' '2'"),
    (("Blicket",), (), "'Blicket' is not one word as captions are read, but 'blicket'"),
    (("<sks>",), (), "'<sks>' is not one word"),
    ((" ",), (), "is not one word as captions are read, but nothing"),
    (("blicket",), ("zebra",), "kin: the text encoder does not know 'zebra' itself"),
    (("blicket",), ("<unk>",), "kin: '<unk>' is not one word"),
], ids=str)
def test_words_that_cannot_be_learned(words: tuple[str, ...], kin: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ValueError) as refused:
        built(base(), *words, kin=kin)
    assert reason in str(refused.value)


def test_kin_are_one_for_all_or_one_for_each() -> None:
    with pytest.raises(ValueError, match="kin: one for all or one for each of 3 words, not 2"):
        TextualInversion(words=("a", "b", "c"), kin=("red", "blue"))
    with pytest.raises(ValueError, match="words: one is named twice"):
        LoRA(words=("a", "a"))
    with pytest.raises(ValueError, match="words: are learned by an adapter"):
        NoAdapter(words=("a",))


def test_text_encoders_that_learn_no_words_say_why() -> None:
    config, learned = TextualInversion(words=("blicket",)), Label(width=4).build(json.dumps({"classes": ["dog"]}))
    with pytest.raises(ValueError, match="which is one of labels, each a whole caption"):
        config.build(BACKBONE, learned)
    model, tokenizer = models.MODELS["clip"]()
    with pytest.raises(ValueError, match="which is frozen, its embeddings stored beside latents or not"):
        config.build(BACKBONE, HuggingFace(length=5).build(model, tokenizer))


def test_several_adapters_as_one() -> None:
    text = base()
    alone = told(text, NEW)
    parts: dict[str, Adapter] = {word: built(text, word) for word in ("blicket", "dax")}
    joined = Joined(parts)
    assert set(joined.state_dict()) == {"parts.blicket.rows", "parts.dax.rows"}
    assert joined.attach(BACKBONE, text) == (BACKBONE, text)
    assert text.tokenizer.vocabulary[-2:] == ("blicket", "dax") and not torch.equal(told(text, NEW), alone)
    joined.strength = 0
    assert torch.equal(told(text, NEW), alone)
    assert joined.strength == parts["blicket"].strength == parts["dax"].strength == 0
    parts["dax"].hint = "image"
    joined.hint = "image-2"
    assert (joined.hint, parts["blicket"].hint, parts["dax"].hint) == ("image-2", "", "image-2")


def test_words_beside_an_adapter_of_another_kind() -> None:
    text = base()
    backbone: Any = torch.nn.ModuleDict({"attention": torch.nn.ModuleDict({"out": torch.nn.Linear(4, 4)})})
    config = LoRA(rank=2, words=("blicket",), kin=("red",), targets=("*.out",))
    joined = build(config, backbone, text)
    assert set(joined.state_dict()) == {
        "parts.words.rows", "parts.lora.backbone.attention.out.A", "parts.lora.backbone.attention.out.B"}
    assert joined.attach(backbone, text) == (backbone, text) and torch.equal(row(text, "blicket"), row(text, "red"))
    with pytest.raises(ValueError, match="kin: the text encoder does not know 'zebra'"):
        build(LoRA(words=("dax",), kin=("zebra",), targets=("*.out",)), backbone, text)
    assert not isinstance(build(LoRA(targets=("*.out",)), backbone, text), Joined)
    assert isinstance(build(TextualInversion(words=("dax",)), backbone, text), Words)
