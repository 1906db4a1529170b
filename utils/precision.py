"""Switches for exact float32 (no TF32, whose rounding files must not depend on) and for deterministic CUDA."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from utils.errors import ConfigError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_DETERMINISTIC = (":4096:8", ":16:8")


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Inside it, operations on a device compute in the precision of their inputs."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


@contextmanager
def full_precision() -> Iterator[None]:
    """TF32 off, deterministic cuDNN; restored afterwards. Also a decorator."""
    saved = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(saved)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """On CUDA, only algorithms that give the same bits every time; restored afterwards. Nothing unless `wanted`.

    cuBLAS takes its part from the environment variable CUBLAS_WORKSPACE_CONFIG when it starts, so this comes before
    any work on the device; an unset variable is set to :4096:8.

    Raises:
        ConfigError: the variable has a value that is not deterministic.
    """
    if not wanted:
        yield
        return
    if os.environ.setdefault(CUBLAS, CUBLAS_DETERMINISTIC[0]) not in CUBLAS_DETERMINISTIC:
        raise ConfigError(
            f"deterministic: the environment sets {CUBLAS}={os.environ[CUBLAS]}; unset it, or use one of "
            f"{', '.join(CUBLAS_DETERMINISTIC)}"
        )
    saved = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    cudnn = torch.backends.cudnn
    try:
        with cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=cudnn.allow_tf32):
            yield
    finally:
        torch.use_deterministic_algorithms(saved[0], warn_only=saved[1])
