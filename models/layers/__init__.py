"""What networks are made of: attention, normalisation, and what layers keep or share between calls."""
