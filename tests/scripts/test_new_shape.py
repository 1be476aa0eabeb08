"""The recipe's own shape is read back by the rules, and the rules of everyone else stay as they are."""

from __future__ import annotations

import json
import subprocess
import sys

import tiny

READ = """
import sys
sys.path.insert(0, 'scripts/recipes')
import bars, json
from training.shapes import rendering, scenes, wording
own = [bars.bar(c, n, e, g) for c in scenes.COLOURS for n in range(9) for e, g in ((9.7, 'white'), (13.3, 'black'))]
four = [scenes.scene(i) for i in range(150)]
obeyed = lambda found: [bars.check(rendering.render(s), wording.captions(s)[0])['obeyed'] for s in found]
shapes = sorted({item.shape for scene in four for item in scene.objects})
unread = [wording.parse(text) is None for text in bars.NEW]
print(json.dumps([obeyed(own), obeyed(four), shapes, len(bars.NEW), unread]))
"""


def test_bars_are_read_and_the_four_shapes_as_before() -> None:
    done = subprocess.run([sys.executable, "-c", READ], cwd=tiny.ROOT, env={**tiny.ENVIRONMENT, "PYTHONPATH": "."},
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    own, four, shapes, count, unread = json.loads(done.stdout)
    assert own == [True] * 144 and four == [True] * 150
    assert shapes == ["circle", "cross", "square", "triangle"]
    assert count == 72 and not any(unread)
