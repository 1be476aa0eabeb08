"""What the captions of a training lose in its text encoder: counted beside the latents where that was done, else as
they are read, in the first epoch."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING

from ldm.text import TextEncoder
from ldm.text.encoders import LabelEncoder, ScratchTextEncoder
from training.data.latents import Latents
from training.data.samples import Batch
from training.errors import DATA, UserError
from training.ledger import Ledger
from training.machine.launcher import first_process
from training.messages import warn
from training.models.vocabulary import captions, counted
from training.progress import Progress
from training.shards.streaming import StreamedShards

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CUT = "captions longer than the text encoder reads"
UNKNOWN = "words that the vocabulary has not, read as unknown"
WITH_UNKNOWN = "captions with words that the vocabulary has not"


def short(text: str) -> str:
    """The beginning of a caption, for messages."""
    return text if len(text) <= 60 else text[:59] + "…"


def few_of(words: Sequence[str]) -> str:
    """The first of them, for messages."""
    return ", ".join(repr(short(word)) for word in words[:5]) + (", ..." if words[5:] else "")


class CaptionTally:
    """`counted`: what was known at the start, the same in every process; `noted`: what this process has read since."""

    def __init__(self, text: TextEncoder, dataset: Latents) -> None:
        self.text, self.samples, self.last = text, len(dataset), -1
        self.counted, self.noted = Ledger(), Ledger()
        self.waiting = not self._count(dataset)
        for line in self.counted.lines() if first_process() else ():
            warn(line)

    def _count(self, dataset: Latents) -> bool:
        """Take over what was counted with the latents; whether that says all."""
        if dataset.text and not self.text.trainable:  # whoever stored the embeddings cut the captions
            told = dataset.shards.summary.get("ledger", {})
            cut = told.get("cut", {}) if isinstance(told, dict) else {}
            self.counted.merge({"cut": {kind: entry for kind, entry in cut.items() if "caption" in kind}})
            return True
        if not isinstance(self.text, ScratchTextEncoder):
            return isinstance(self.text, LabelEncoder)
        counts, tokenizer = counted(dataset), self.text.tokenizer
        if "lengths" not in counts or counts.get("rule", 1) != tokenizer.rule:
            return False
        self.counted.add("cut", CUT, count=sum(counts["lengths"][tokenizer.length - 1 :]))
        known = set(tokenizer.vocabulary)
        for word in counts["words"]:
            if word not in known:
                self.counted.add("replaced", UNKNOWN, short(word))
        return True

    def note(self, batch: Batch) -> None:
        """Look at the captions of a micro-batch, each sample's once: a micro-batch taken again counts no more."""
        if not self.waiting:
            return
        slots = batch.slots.tolist()
        new = [c for slot, c in zip(slots, batch.captions, strict=True) if self.last < slot < self.samples]
        self.last = max(self.last, *slots)
        self.waiting = self.last < self.samples
        for caption, reading in zip(new, self.text.readings(new), strict=True):
            if reading.cut:
                if not self.noted.count("cut") and first_process():
                    read = f"only the first {reading.read} of {reading.tokens} tokens of {short(caption)!r} are read"
                    warn(f"{read}; captions cut so are counted during the first epoch")
                self.noted.add("cut", CUT, short(caption))
            if reading.unknown:
                self.noted.add("replaced", WITH_UNKNOWN, short(caption))


def tell_unknown(text: TextEncoder, dataset: Latents, donor: str, hint: str) -> None:
    """Say which words of the captions a vocabulary that was taken over has not, how many captions have them, and as
    `hint` what adds them; of a stream this is told as they are read."""
    if not isinstance(text, ScratchTextEncoder) or not first_process():
        return
    counts, tokenizer = counted(dataset), text.tokenizer
    few = counts.get("captions")
    complete = counts.get("all_words") and counts.get("rule", 1) == tokenizer.rule
    if complete and set(tokenizer.vocabulary).issuperset(counts["words"]):
        return
    if few is None and isinstance(dataset.shards, StreamedShards):
        return
    every = Progress("reading captions", thing="caption").each(_distinct(dataset), lambda caption: 1)
    unknown = [words for caption in every if (words := set(tokenizer.unknown(caption)))]
    if unknown:
        names = [word for word, _ in Counter(word for words in unknown for word in sorted(words)).most_common()]
        of = "captions" if few is None else "different captions"
        warn(f"{donor} has no row for {len(names)} words of the captions ({few_of(names)}): {len(unknown)} {of} have "
             f"one, read as unknown; {hint}")


def refuse_unheard(words: Sequence[str], text: TextEncoder, dataset: Latents) -> None:
    """Say which of the words that are to be learned no caption has, so that nothing teaches them. Raises UserError
    (code 3) where no caption has any; of a stream whose captions were not counted it cannot be known."""
    if not words or not isinstance(text, ScratchTextEncoder):
        return
    counts, left = counted(dataset), dict.fromkeys(words)
    same_rule = counts.get("rule", 1) == text.tokenizer.rule
    heard: Iterable[Sequence[str]] = [counts["words"]] if same_rule and "words" in counts else []
    if not (heard and counts["all_words"]):
        if counts.get("captions") is None and isinstance(dataset.shards, StreamedShards):
            return
        heard = chain(heard, map(text.tokenizer.words, _distinct(dataset)))
    for some in heard:
        left = {word: None for word in left if word not in some}
        if not left:
            return
    if len(left) == len(words):
        what = f"no caption has a word that is to be learned ({few_of(words)})"
        hint = "name words that the captions have with --adapter.words, or leave it out and give --new-words"
        raise UserError(what, hint=hint, code=DATA)
    if first_process():
        names = few_of(list(left))
        warn(f"no caption has {len(left)} of the {len(words)} words of adapter.words ({names}): nothing teaches them")


def refuse_unread(text: TextEncoder, dataset: Latents) -> None:
    """Raises UserError (code 3) where captions have words, and the text encoder knows no word of any."""
    if isinstance(text, LabelEncoder) or (dataset.text and not text.trainable):
        return
    some = ""
    for caption in _distinct(dataset):
        (reading,) = text.readings([caption])
        if reading.blank:
            some = some or caption
        elif reading.tokens and reading.known:
            return
    if some:
        what = f"no caption has a word that the text encoder knows (the first: {short(some)!r})"
        hint = "its vocabulary is of other captions: give --new-words, which adds to it"
        raise UserError(what, hint=hint, code=DATA)


def _distinct(dataset: Latents) -> Iterable[str]:
    few = counted(dataset).get("captions")
    return captions(dataset) if few is None else few
