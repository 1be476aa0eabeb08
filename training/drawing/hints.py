"""What a drawing is shown as a hint: a file, or made of a picture, at the size of the drawing; and what of it is told.

Free of torch, NumPy and Pillow at import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from training.drawing.given import Given, Size
from training.errors import DATA, UserError

if TYPE_CHECKING:
    from training.ledger import Ledger
    from training.models.adapters import Chosen
    from training.models.hints import HintRead
    from training.pictures.hints import Bytes, Hint


@dataclass(frozen=True)
class Shown:
    """A run that is shown a hint, and the file that gives that of each request; `chosen`: the control and its weight,
    None where it is the model itself; `reads`: what its hints are; `made`: of the picture in that file, not what it
    holds."""

    run: str
    chosen: Chosen | None
    reads: HintRead
    flag: str
    of: Callable[[Given], Given]
    made: bool

    def values(self, given: Given, size: Size, ledger: Ledger) -> Bytes:
        """The hint (height, width, C) of a file for a drawing of `size` (height, width), told where it was resized.

        Raises UserError for what is no such hint, and where nothing says how it may be resized.
        """
        from training.pictures.hints import BLANK

        values, height_width = self._read(given, size, ledger), f"{size[1]}x{size[0]}"
        across, down = values.shape[1], values.shape[0]
        if values.min() == values.max():
            ledger.add("ignored", BLANK, given.name)
        if (down, across) == size:
            return values
        if self.reads.kind is None:
            what = f"{self.flag} {given.name}: {across}x{down} for drawings of {height_width}, and {self.run} "
            hint = "give it in that size: lines are resized otherwise than depths"
            raise UserError(f"{what}does not say what its hints are", hint=hint, code=DATA)
        self._tell_size("hint", given.name, (across, down), size, ledger)
        scale = min(down / size[0], across / size[1])
        half = (across - size[1] * scale) / 2, (down - size[0] * scale) / 2
        return self.hint.resized(values, size, (half[0], half[1], across - half[0], down - half[1]))

    @cached_property
    def hint(self) -> Hint:
        """The member of the family that reads it."""
        from training.pictures.hints import hint_of

        return hint_of(self.reads.kind or ("depth" if self.reads.channels == 1 else "picture"))

    def _tell_size(self, what: str, name: str, given: Size, size: Size, ledger: Ledger) -> None:
        """That what is `given`, (width, height), is brought to `size`, (height, width), whatever of it is outside."""
        (across, down), wanted = given, f"resized to {size[1]}x{size[0]}"
        cut = abs(across * size[0] - down * size[1]) > max(size)
        effect = f"its middle {wanted}" if cut else wanted
        ledger.add("cut" if cut else "replaced", f"{what} of {self.flag}, {effect}", f"{name} {across}x{down}")

    def _read(self, given: Given, size: Size, ledger: Ledger) -> Bytes:
        kind = self.reads.kind
        try:
            if self.made:
                return self._made(given, size, ledger)
            values, notes, deep = self.hint.decoded(given.data, limits=self.reads.range)
        except UserError as problem:
            hint = f"this control reads hints of {kind or 'its own kind'}, of {self.reads.channels} channels"
            hint += "" if self.reads.range else ", of 8 or 16 bits"
            raise UserError(f"{self.flag} {given.name}: {problem.what}", hint=hint, code=DATA) from None
        for effect, why in notes:
            ledger.add(effect, why, given.name)
        if deep:
            low, high = self.reads.range or (0, 65535)
            why = "that of the hints it learned from" if self.reads.range else "that of 16 bits, for it says no other"
            effect = "replaced" if self.reads.range else "guessed"
            ledger.add(effect, f"hint of more than 8 bits, read from {low:g} to {high:g}, {why}", given.name)
        return values

    def _made(self, given: Given, size: Size, ledger: Ledger) -> Bytes:
        """The hint of a picture, whose middle is brought to the size of the drawing first."""
        import numpy as np
        from PIL import Image, ImageOps

        from training.pictures.hints import RULES

        def fitted(picture: Image.Image) -> Any:
            return np.asarray(ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS))

        clear = self.hint.kind == "mask"  # which transparency says; elsewhere it is laid on the background
        picture, alpha = given.decoded(4 if clear else 3, ledger), None
        if clear and picture.getchannel("A").getextrema()[0] < 255:
            alpha = fitted(picture.getchannel("A"))
        if picture.size != size[::-1]:
            self._tell_size("picture", given.name, picture.size, size, ledger)
        values, rule = self.hint.made(fitted(picture.convert("RGB")), alpha)
        if rule in RULES:
            ledger.add(*RULES[rule], given.name)
        return values
