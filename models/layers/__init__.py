"""What networks are made of, below any of them: attention, normalisation, and what layers keep or share between calls."""
