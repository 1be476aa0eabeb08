"""Text encoders: tokens, independence of the batch, padding, and equality with direct transformers calls."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from ldm.text import TEXT_ENCODERS, HuggingFace, Label, Scratch, TextEncoder, WordTokenizer
from ldm.text.tokenizer import split

CAPTIONS = ["a red circle", "", "a small blue square left of a red circle", "a photo of a T-shirt!"]


# --- the word tokenizer

def test_words_and_punctuation() -> None:
    assert split("A T-shirt,\tété — 2 don't!") == ["a", "t", "-", "shirt", ",", "été", "—", "2", "don", "'", "t", "!"]
    assert split("红色的圆 red") == ["红", "色", "的", "圆", "red"]
    assert split(" \n") == []
    assert all(split(text) == split(text, 1) for text in (*CAPTIONS, "A T-shirt,\tété — 2 don't!", "红色的圆 red"))


def test_a_caption_in_ascii_is_split_as_beside_other_letters() -> None:
    """Such captions take a way of their own, every character of them."""
    characters = [chr(code) for code in range(128)]
    for first in characters:
        text = "".join(f"{first}{second}A{second}1 " for second in characters)
        assert [*split(text), "é"] == split(f"{text} é")


# what rule 2 reads as the same words, and those words
SAME = {
    "an accent in two characters": (["cafe\u0301", "café", "CAFÉ"], ["café"]),
    "full width and ligatures": (["Ｒｅｄ ﬁsh", "red fish"], ["red", "fish"]),
    "no width": (["re\u200bd", "r\u200ced", "red\ufeff", "r\u00aded", "red\u2060", "red"], ["red"]),
    "snake case": (["red_car", "red car", "_red__car"], ["red", "car"]),
    "sharp s and final sigma": (["STRASSE ΣΑΣ", "straße σας"], ["strasse", "σασ"]),
    "a heart with its variation": (["❤\ufe0f", "❤"], ["❤"]),
    "halfwidth katakana": (["ｶﾞ", "ガ"], ["ガ"]),
    "compatibility ideographs": (["\uf9d1", "六"], ["六"]),
}


@pytest.mark.parametrize("case", SAME)
def test_what_reads_the_same_is_the_same_words(case: str) -> None:
    captions, words = SAME[case]
    assert [split(caption) for caption in captions] == [words] * len(captions)
    assert len({tuple(split(caption, 1)) for caption in captions}) > 1


def test_vowel_signs_stay_with_their_letters() -> None:
    for text in ("हिन्दी कार", "காரை ஒரு", "รถ สีแดง", "বাংলা গাড়ি", "שָׁלוֹם עולם"):
        assert len(split(text)) == 2 and len(split(text, 1)) > 2, text


def test_the_rule_is_stored_and_old_vocabularies_keep_theirs() -> None:
    new, old = (WordTokenizer.build(["red_car café"], 6, 10, rule) for rule in (2, 1))
    assert new.vocabulary[4:] == ("café", "car", "red") and old.vocabulary[4:] == ("café", "red_car")
    stored = '{\n"length": 6,\n"vocabulary": [\n"<pad>",\n"<unk>",\n"<start>",\n"<end>",\n"café",\n"red_car"\n]\n}'
    assert old.to_json() == stored and WordTokenizer.from_json(stored) == old
    assert json.loads(new.to_json())["rule"] == 2 and WordTokenizer.from_json(new.to_json()) == new
    encoder = Scratch(width=16, heads=2, length=6).build(stored)
    assert encoder.tokenizer.rule == 1 and encoder.tokenizer.unknown("red_car Red_Car red") == ["red"]
    assert old.truncated(["a_b c d e f"]) == 1 and old(["red_car"])[0][0, 1] == 5
    with pytest.raises(ValueError, match="rule 1 or 2"):
        WordTokenizer.from_json(stored.replace("6", '6, "rule": 3'))
    for rule in (0, 3):
        with pytest.raises(ValueError, match="rule"):
            Scratch(rule=rule)


def test_vocabulary_by_frequency_then_alphabet() -> None:
    tokenizer = WordTokenizer.build(["b a", "a c", "A d"], length=6, max_words=3)
    assert tokenizer.vocabulary == ("<pad>", "<unk>", "<start>", "<end>", "a", "b", "c")
    assert WordTokenizer.build(["A d", "a c", "b a"], length=6, max_words=3) == tokenizer


def test_numbers_mask_and_truncation() -> None:
    tokenizer = WordTokenizer.build(["a b c"], length=5, max_words=10)
    numbers, mask = tokenizer(["a zebra", "", "c b a a a a"])
    assert numbers.tolist() == [[2, 4, 1, 3, 0], [2, 3, 0, 0, 0], [2, 6, 5, 4, 3]]
    assert mask.sum(1).tolist() == [4, 2, 5]
    assert tokenizer.truncated(["a b c", "a b c a", ""]) == 1
    assert tokenizer.unknown("a zebra, A") == ["zebra", ","]
    assert tokenizer([])[0].shape == (0, 5)


def test_json_round_trip_and_refusals() -> None:
    tokenizer = WordTokenizer.build(["été \" \\ 圆"], length=5, max_words=10)
    assert WordTokenizer.from_json(tokenizer.to_json()) == tokenizer
    for wrong in ("{}", "[1]", "not json", '{"length": 5, "vocabulary": ["a"]}', tokenizer.to_json().replace("5", "1")):
        with pytest.raises(ValueError, match=r"vocabulary|Expecting|length"):
            WordTokenizer.from_json(wrong)


# --- tiny Hugging Face models, built on the spot

WORDS = ["a", "red", "blue", "circle", "square", "small", "photo", "of", "t", "-", "shirt", "!", "left"]


def fast_tokenizer(start: str | None, end: str, pad: str) -> Any:
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    specials = list(dict.fromkeys(t for t in (pad, start, end, "<unk>") if t))
    vocabulary = {word: i for i, word in enumerate([*specials, *WORDS])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    single = f"{start}:0 $A:0 {end}:0" if start else f"$A:0 {end}:0"
    named = [(token, vocabulary[token]) for token in dict.fromkeys((start, end)) if token]
    core.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=named)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, eos_token=end, bos_token=start, unk_token="<unk>"
    )


def clip(projected: bool) -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    tokenizer = fast_tokenizer("<start>", "<end>", "<end>")  # CLIP pads with its end token
    config = transformers.CLIPTextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        projection_dim=12, max_position_embeddings=12, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config), tokenizer


def t5() -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return transformers.T5EncoderModel(config), fast_tokenizer(None, "</s>", "<pad>")


def bert() -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=12,
    )  # fmt: skip
    return transformers.BertModel(config), fast_tokenizer("[CLS]", "[SEP]", "[PAD]")


MODELS = {"clip": lambda: clip(False), "clip-projected": lambda: clip(True), "t5": t5, "bert": bert}


LEARNED: dict[str, Any] = {kind.kind: kind for kind in TEXT_ENCODERS if hasattr(kind, "vocabulary")}


def make(name: str) -> TextEncoder:
    torch.manual_seed(0)
    if name in LEARNED:
        config = LEARNED[name](width=16, length=12, heads=2) if name == "scratch" else LEARNED[name](width=16)
        return config.build(config.vocabulary(CAPTIONS))
    return HuggingFace(length=12).build(*MODELS[name]())


# --- what all encoders promise

@pytest.fixture(params=[*LEARNED, *MODELS])
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    return make(request.param)


def test_every_kind_is_listed() -> None:
    assert [config.kind for config in (family() for family in TEXT_ENCODERS)] == ["scratch", "label", "huggingface"]


def test_shapes_and_declared_widths(encoder: TextEncoder) -> None:
    cond = encoder(CAPTIONS)
    assert cond.context.shape == (*cond.mask.shape, encoder.context_dim)
    assert cond.mask.dtype == torch.bool
    assert cond.mask.any(1).all()
    assert cond.pooled is not None
    assert cond.pooled.shape == (4, encoder.pooled_dim)
    assert cond.context.dtype == cond.pooled.dtype == torch.float32


def test_a_caption_does_not_depend_on_its_batch(encoder: TextEncoder) -> None:
    batch = [CAPTIONS[i] for i in (2, 0, 2, 1, 3, 0)]
    together = encoder(batch)
    for i, caption in enumerate(batch):
        alone = encoder([caption])
        assert torch.equal(alone.mask[0], together.mask[i])
        torch.testing.assert_close(alone.context[0], together.context[i], rtol=0, atol=1e-6)
        torch.testing.assert_close(alone.pooled[0], together.pooled[i], rtol=0, atol=1e-6)


def test_only_trainable_encoders_learn(encoder: TextEncoder) -> None:
    encoder.train()
    cond = encoder(["a red circle", "a red circle", ""])
    assert cond.context.requires_grad == encoder.trainable
    assert all(p.requires_grad == encoder.trainable for p in encoder.parameters())
    if encoder.trainable:
        (cond.context.square().sum() + cond.pooled.square().sum()).backward()
        assert all(p.grad is not None for p in encoder.parameters())


# --- from scratch

def test_scratch_ignores_what_padding_holds() -> None:
    encoder = make("scratch")
    before = encoder(["a red circle"])
    with torch.no_grad():
        encoder.words.weight[0] += 100.0
        encoder.positions[6:] += 100.0
    after = encoder(["a red circle"])
    assert torch.equal(before.context[before.mask], after.context[after.mask])
    assert torch.equal(before.pooled, after.pooled)


def test_heads_begin_on_neighbouring_words() -> None:
    """Next, previous, second next, ...: with the word's own vector as value, the output is mostly that neighbour's."""
    config = Scratch(width=64, heads=4, depth=1, length=12)
    layer = config.build(config.vocabulary(CAPTIONS)).layers[0]
    with torch.no_grad():
        layer.attention.qkv.weight[:128].zero_()
        layer.attention.qkv.weight[128:].copy_(torch.eye(64))
        layer.attention.out.weight.copy_(torch.eye(64))
        words = torch.nn.functional.layer_norm(torch.randn(1, 12, 64), (64,))
        words = words - words.mean(-1, keepdim=True)
        heard = (layer(words, torch.ones(1, 1, 1, 12, dtype=torch.bool)) - words)[0].unflatten(1, (4, 16))
    for head, neighbour in enumerate((1, -1, 2, -2)):
        at = 5 + neighbour
        wanted = layer.norm_1(words)[0, :, 16 * head : 16 * (head + 1)]
        assert torch.nn.functional.cosine_similarity(heard[5, head], wanted[at], dim=0) > 0.8
        assert torch.nn.functional.cosine_similarity(heard[5, head], wanted, dim=1).argmax() == at


def test_scratch_reads_order_and_rebuilds_from_its_vocabulary() -> None:
    config = Scratch(width=16, heads=2, length=12)
    encoder = config.build(config.vocabulary(CAPTIONS))
    assert not torch.allclose(encoder(["red circle"]).pooled, encoder(["circle red"]).pooled)
    again = config.build(encoder.tokenizer.to_json())
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(CAPTIONS).context, encoder(CAPTIONS).context)
    with pytest.raises(ValueError, match="12 tokens, the config asks for 8"):
        Scratch(width=16, heads=2, length=8).build(encoder.tokenizer.to_json())


# --- labels

def test_label_rows() -> None:
    encoder = make("label")
    cond = encoder(["a red circle", ""])
    assert len(encoder.embedding.weight) == 4  # three captions and the null class
    assert torch.equal(cond.pooled[1], encoder.embedding.weight[0])
    assert torch.equal(cond.context[:, 0], cond.pooled)
    with pytest.raises(ValueError, match="'a cat' is not one of the 3 captions trained on: 'a photo"):
        encoder(["a cat"])
    with pytest.raises(ValueError, match="max_classes"):
        Label(max_classes=2).vocabulary(CAPTIONS)
    with pytest.raises(ValueError, match="not a set of labels"):
        Label().build("[]")


# --- Hugging Face

def direct(model: nn.Module, tokenizer: Any, captions: list[str], **options: Any) -> tuple[Any, torch.Tensor]:
    """The model called by hand, one caption at a time and without padding: what masks must give."""
    model.eval()
    tokens = [tokenizer(caption, return_tensors="pt") for caption in captions]
    with torch.no_grad():
        return [model(input_ids=t["input_ids"], **options) for t in tokens], [t["input_ids"].shape[1] for t in tokens]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer", [-1, -2])
def test_context_equals_transformers(name: str, layer: int) -> None:
    model, tokenizer = MODELS[name]()
    outputs, lengths = direct(model, tokenizer, CAPTIONS, output_hidden_states=True)
    cond = HuggingFace(length=12, layer=layer).build(model, tokenizer)(CAPTIONS)
    assert cond.context.shape == (4, 12, 16)
    for i, (output, length) in enumerate(zip(outputs, lengths, strict=True)):
        assert cond.mask[i].tolist() == [True] * length + [False] * (12 - length)
        wanted = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        torch.testing.assert_close(cond.context[i, :length], wanted[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pooling", ["auto", "mean", "eos", "none"])
def test_pooling(name: str, pooling: str) -> None:
    model, tokenizer = MODELS[name]()
    encoder = HuggingFace(length=12, pooling=pooling).build(model, tokenizer)
    pooled = encoder(CAPTIONS).pooled
    if pooling == "none":
        assert pooled is None
        assert encoder.pooled_dim is None
        return
    for i, output in enumerate(direct(model, tokenizer, CAPTIONS)[0]):
        own = {"clip": "pooler_output", "clip-projected": "text_embeds"}.get(name) if pooling == "auto" else None
        states = output.last_hidden_state[0]
        wanted = output[own][0] if own else states[-1] if pooling == "eos" else states.mean(0)
        torch.testing.assert_close(pooled[i], wanted, rtol=0, atol=1e-5)


def test_truncation_lower_case_and_masked() -> None:
    model, tokenizer = t5()
    encoder = HuggingFace(length=4, lower=True, masked=False).build(model, tokenizer)
    assert encoder.truncated(["a red circle", "a red circle !"]) == 1
    assert torch.equal(encoder(["  A Red "]).context, encoder(["a red"]).context)
    assert encoder(["a", ""]).mask.all()
    assert encoder(["a red circle of a photo"]).context.shape == (1, 4, 16)


def test_dropout_never_runs() -> None:
    model, tokenizer = t5()  # T5's dropout is 0.1
    encoder = HuggingFace(length=12).build(model, tokenizer).train()
    assert torch.equal(encoder(CAPTIONS).context, encoder(CAPTIONS).context)


def test_half_precision_models_give_float32() -> None:
    model, tokenizer = bert()
    cond = HuggingFace(length=12).build(model.bfloat16(), tokenizer)(CAPTIONS)
    assert cond.context.dtype == cond.pooled.dtype == torch.float32


def test_misfits_are_refused() -> None:
    model, tokenizer = bert()
    with pytest.raises(ValueError, match="length 13 is more than the text encoder's 12 positions"):
        HuggingFace(length=13).build(model, tokenizer)
    with pytest.raises(ValueError, match="pooling must be one of auto, mean, eos, none"):
        HuggingFace(pooling="max")
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        HuggingFace(length=12).build(model, tokenizer)
    with pytest.raises(ValueError, match="divisible by heads"):
        Scratch(width=30, heads=4)
    with pytest.raises(ValueError, match=r"length must be in \[2, inf\)"):
        Scratch(length=1)
    with pytest.raises(ValueError, match="huggingface length must be positive"):
        HuggingFace(length=0)
    for family, name in ((Scratch, "width"), (Scratch, "depth"), (Scratch, "heads"), (Scratch, "max_words"),
                         (Label, "width"), (Label, "max_classes")):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            family(**{name: 0})  # type: ignore[operator]
