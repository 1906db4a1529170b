"""Released weights: `load_codec` gives a codec for pictures and bytes; `python -m release` makes a release."""

from coding.api import load_codec

__all__ = ["load_codec"]
