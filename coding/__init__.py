"""What the command `inference.py` is made of: which file becomes which, and the table of what came out."""
