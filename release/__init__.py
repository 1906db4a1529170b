"""Released weights: `load_codec` gives a codec for pictures and bytes; `python -m release` makes a release."""

__all__ = ["load_codec"]


def __getattr__(name: str):
    """`load_codec`, imported when it is asked for: it brings torch, and the command answers before."""
    if name in __all__:
        from coding.api import load_codec

        return load_codec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
