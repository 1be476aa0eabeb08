"""What --on-bad-data error tells of a packing: not the first sample alone that cannot be used."""

from __future__ import annotations

from training.errors import DATA, UserError

MOST_PROBLEMS = 10  # told at once where --on-bad-data is error
LOOKED_ON = 10_000  # samples looked at for more problems after the first one: a later one costs another packing


class Problems:
    """The samples that cannot be used where none may be left out: several are told at once, for each that is told alone
    costs a packing."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.hints, self.looked = dict[str, None](), 0  # each once, in the order of their samples

    def add(self, name: str, reason: str, hint: str) -> None:
        """One more."""
        self.hints |= {hint: None} if hint else {}
        self.found.append(f"{name}: {reason}")

    def enough(self) -> bool:
        """Whether to stop looking; asked once a sample."""
        self.looked += bool(self.found)
        return len(self.found) >= MOST_PROBLEMS or self.looked > LOOKED_ON

    def refuse(self) -> None:
        """Raises UserError(code 3) where there are any."""
        others = "".join(f"{hint}; or " for hint in self.hints)
        hint = f"{others}--on-bad-data skip leaves such samples out and counts them"
        if len(self.found) == 1:
            raise UserError(self.found[0], hint=hint, code=DATA)
        if self.found:
            least = "at least " if len(self.found) >= MOST_PROBLEMS or self.looked > LOOKED_ON else ""
            shown = "\n  ".join(self.found)
            raise UserError(f"{least}{len(self.found)} samples cannot be used:\n  {shown}", hint=hint, code=DATA)
