"""Runs several command lines in one process group: `torchrun several.py '[["script", "--flag", …], …]'`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tiny

for words in json.loads(sys.argv[1]):
    if code := tiny.call(*words):
        sys.exit(code)
