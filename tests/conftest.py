"""Shared by all tests: a fixed number of threads, and nothing that would look for the network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
