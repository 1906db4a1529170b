"""Released weights: `load_codec` gives a codec that writes and reads files; `python -m release` makes a release."""

from models.released import load_codec

__all__ = ["load_codec"]
