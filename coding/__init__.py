"""The parts of the command `inference.py`: options, which file becomes which, and the table of what came out."""
