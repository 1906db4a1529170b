"""Shared by all tests: one thread, so that results do not depend on how many cores there are."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
