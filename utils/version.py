"""The project's version, told by every command; that of the files' format is `models.bitstream.VERSION`."""

__version__ = "0.1.0"
