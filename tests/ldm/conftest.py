"""Lets the tests of all families import each other, which importlib mode alone would not."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
settings.register_profile("busy", deadline=None)  # a slow machine is no failure
settings.load_profile("busy")
