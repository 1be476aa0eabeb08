"""Makes the oracles importable by the tests beside them, which importlib mode alone would not."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
