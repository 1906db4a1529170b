"""Where trained weights are kept: three checkpoints that belong together, and the releases that ship."""
