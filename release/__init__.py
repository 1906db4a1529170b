"""Released weights: `load_codec` gives a codec that writes and reads files; `python -m release` makes a release."""

from store.triple import load_codec

__all__ = ["load_codec"]
