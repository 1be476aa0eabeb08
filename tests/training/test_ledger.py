"""The ledger: counts by effect and kind, first names, merged over processes, the same lines and report each time."""

from training.ledger import SHOWN, Ledger


def test_counts_names_and_order() -> None:
    ledger = Ledger()
    for number in range(7):
        ledger.add("left out", f"truncated image ({number} bytes)", f"{number}.png")
    ledger.add("ignored", "blank lines", count=3)
    ledger.add("cut", "captions", "a")
    ledger.add("cut", "nothing", count=0)
    assert ledger.lines() == [
        "left out 7: truncated image (0.png, 1.png, 2.png, 3.png, 4.png …)",
        "cut 1: captions (a)",
        "ignored 3: blank lines",
    ]
    assert ledger.count("left out") == 7 and ledger.count() == 11 and ledger.count("guessed") == 0
    assert list(ledger.report()) == ["left out", "cut", "ignored"]


def test_merging_reports_gives_the_ledger_of_all() -> None:
    whole, halves = Ledger(), (Ledger(), Ledger())
    for number in range(9):
        for ledger in (whole, halves[number // 5]):
            ledger.add("replaced", "sample", f"{number}")
    merged = Ledger()
    for half in halves:
        merged.merge(half.report())
    assert merged.report() == whole.report()
    assert merged.report()["replaced"]["sample"] == {"count": 9, "first": [str(n) for n in range(SHOWN)]}
