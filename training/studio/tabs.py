"""The tabs of the studio, in the order of the page."""

from __future__ import annotations

from training.studio.compare import Compare
from training.studio.draw import Draw
from training.studio.edit import Edit
from training.studio.facts import Facts
from training.studio.inpaint import Inpaint
from training.studio.restore import Restore
from training.studio.tab import Tab

TABS: tuple[type[Tab], ...] = (Draw, Edit, Inpaint, Restore, Compare, Facts)
