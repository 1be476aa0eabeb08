"""What a tab of the studio is: a title, and what it puts on the page.

A tab that draws says which controls stand for which flags of `generate`; the page does the rest. A new one is a file
here and a line in `TABS` of `tabs.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from training.studio.model import Studio, Word, asked

if TYPE_CHECKING:
    from training.studio.page import Page


class Tab(ABC):
    """One tab. Free of Gradio at import: `build` and what it calls load it."""

    title: ClassVar[str]

    @abstractmethod
    def build(self, page: Page) -> None:
        """Put the tab's controls and results on the page, and connect them."""


class DrawingTab(Tab):
    """A tab that is one call of `generate`: controls on the left, its pictures on the right."""

    button: ClassVar[str] = "Draw"

    @abstractmethod
    def controls(self, page: Page) -> dict[str, Any]:
        """The components on the left, by the flag of `generate` that each stands for."""

    def words(self, studio: Studio, values: Mapping[str, Any]) -> list[Word]:
        """The flags and values of `generate` for what the controls hold. Raises UserError for what it cannot mean."""
        return asked(values)

    def build(self, page: Page) -> None:
        """Controls and results side by side."""
        page.drawing(self.controls, self.words, self.button)
