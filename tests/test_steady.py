"""The measurement of memory over a long run, rehearsed with a few pictures."""

import re

from benchmarks import steady


def test_it_tells_memory_as_pictures_are_done(capsys, monkeypatch):
    """Rows of the table are not printed; an option that is wrong is told as inference.py tells it."""
    monkeypatch.setattr(steady, "SIZES", ("24x32",))
    monkeypatch.setattr(steady, "PAUSE", 0.01)
    assert steady.bench(steady.parse(["--count", "9", "--every", "1", "--", "--batch", "1", "--device", "cpu"])) == 0
    lines = capsys.readouterr().out.splitlines()
    done = [re.fullmatch(r" *(\d) pictures +(\d+) MB", line) for line in lines[:-1]]
    counts = [int(match[1]) for match in done]
    assert 2 <= len(counts) and counts == sorted(set(counts)) and counts[-1] <= 9
    assert all(100 < int(match[2]) < 10_000 for match in done) and lines[-1].startswith("        at the end")
