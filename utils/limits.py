"""Sizes of the pictures that files hold. Without torch, so that a wrong command line is answered at once."""

MIN_SIDE = 16  # pixels: a file holds at least one latent position
MAX_PIXELS = 100_000_000  # of a picture or file that is opened without asking
