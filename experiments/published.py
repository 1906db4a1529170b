"""Values that papers and their code published, from published.json: for charts and tables beside measured ones.

Never a mean, a BD-rate or one curve of published and measured values together: sets, crops, colour spaces and LPIPS
networks differ. The same set, score and kind of two records is no proof of the same protocol; `note` says what is known.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
OURS = "DiffO"  # the paper's name of what the releases are
KINDS = {
    "table": "read from a file of numbers",
    "printed": "printed in a figure",
    "digitised": "read off a curve",
    "secondary": "through a third party, not checked against the paper",
}


@dataclass(frozen=True)
class Published:
    """One row of a table, or one point of a curve; what was not published is None or empty.

    Attributes:
        system: name of the codec. kind: a key of `KINDS`. source: short name of `where`, the repository and file or the
            table it is from. note: what limits it.
        variant: of an ablation. dataset: kodak, clic2020-768 (short side 768, centre crop: the paper's), clic2020-full,
            clic2020 (crop not said), div2k-full, div2k (crop not said), kodak-512, or one picture as SET/PICTURE.
        bpp: bits per pixel. scores: by the names of the project's own; `bd-rate-lpips-vgg` and `bd-rate-dists` in
            percent. parameters: how many. encode_s, decode_s: seconds, on `hardware`, of pictures of `size` pixels.
    """

    system: str
    kind: str
    source: str
    where: str
    note: str = ""
    variant: str = ""
    dataset: str = ""
    bpp: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    parameters: int | None = None
    encode_s: float | None = None
    decode_s: float | None = None
    hardware: str = ""
    size: str = ""


@cache
def records() -> tuple[Published, ...]:
    """All of the file, in its order."""
    told = json.loads(FILE.read_text())
    return tuple(Published(**told["sources"][row["source"]], **row) for row in told["records"])


def published(
    dataset: str | None = None,
    score: str | None = None,
    source: str | None = None,
    variant: str | None = None,
) -> list[Published]:
    """Records of one set, with one score and a rate, from one source, of one variant: what is asked for.

    Those of one system, set and score are points of one curve, from one source, and come by rising rate.
    """
    found = [
        record
        for record in records()
        if (dataset is None or record.dataset == dataset)
        and (score is None or (score in record.scores and record.bpp is not None))
        and (source is None or record.source == source)
        and (variant is None or record.variant == variant)
    ]
    return sorted(found, key=lambda record: (record.system, record.bpp or 0)) if score else found
