"""The one evaluator: scores of a decoded picture by their names in `SCORES`. Libraries are imported when first needed."""

import contextlib
import importlib.util
import io
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from measuring.metrics import ms_ssim, ms_ssim_rgb, psnr, psnr_red, require_pair
from measuring.scores import SCORES, unavailable
from utils import checkpoints
from utils.precision import full_precision

Measure = Callable[[Tensor, Tensor], float | None]

_OURS: dict[str, Measure] = {"psnr": psnr, "psnr_red": psnr_red, "ms_ssim": ms_ssim, "ms_ssim_rgb": ms_ssim_rgb}
_STLPIPS = {"stlpips-vgg": "vgg", "stlpips-alex": "alex"}


class Evaluator:
    """Scores of pictures, one pair at a time, without TF32.

    Attributes:
        names: scores that can be computed, in the order in which they were asked for.
        left_out: the others, each with one line that says why and what to do.
    Raises:
        DiffoError: a name that is not in `SCORES`.
    """

    def __init__(self, names: Sequence[str], device: torch.device | str = "cpu"):
        reasons = {name: unavailable(name) for name in names}
        self.names = [name for name, reason in reasons.items() if reason is None]
        self.left_out = {name: reason for name, reason in reasons.items() if reason}
        self.device = torch.device(device)
        self._measures: dict[str, Measure] = {}

    @torch.no_grad()
    @full_precision()
    def __call__(self, original: Tensor, decoded: Tensor) -> dict[str, float | None]:
        """The scores of uint8 pictures (3, H, W), RGB; None where they are too small for one."""
        require_pair(original, decoded)
        side = min(original.shape[-2:])
        return {
            name: self._measure(name)(original, decoded) if side >= SCORES[name].min_side else None
            for name in self.names
        }

    def _measure(self, name: str) -> Measure:
        if name not in self._measures:
            self._measures[name] = _OURS.get(name) or (_cvvdp if name == "cvvdp" else _by_pyiqa)(name, self.device)
        return self._measures[name]


def _by_pyiqa(name: str, device: torch.device) -> Measure:
    score, network = SCORES[name], network_of(name, device)

    def measure(original: Tensor, decoded: Tensor) -> float:
        pictures = (decoded, original) if score.reference else (decoded,)
        return network(*(picture[None].to(device).float() / 255 for picture in pictures)).item()

    return measure


def network_of(name: str, device: torch.device) -> nn.Module:
    """The network inside a pyiqa metric: its wrapper switches TF32 on again for every call."""
    with _silent(), _pkg_resources():
        import pyiqa

        if name in _STLPIPS:
            return _st_lpips(name).to(device)
        # pyiqa looks for MS_SSIM in a module of that name and, finding none, imports all its networks: seconds more.
        importlib.import_module("pyiqa.archs.ssim_arch")
        return pyiqa.create_metric(SCORES[name].pyiqa, device=device).net


def _st_lpips(name: str) -> nn.Module:
    """pyiqa's network with the packaged weights, which pyiqa itself would fetch, and load with whatever code they held."""
    from pyiqa.archs.stlpips_arch import STLPIPS

    with torch.device("meta"):  # drawing 100 million weights of a classifier that it throws away takes seconds
        network = STLPIPS(net=_STLPIPS[name], pretrained=False)
    stored = checkpoints.read(SCORES[name].weights[0].path)
    stored |= {f"lins.{i}.model.1.weight": stored[f"lin{i}.model.1.weight"] for i in range(network.L)}
    network.load_state_dict(stored, assign=True)
    return network.requires_grad_(False)


def _cvvdp(name: str, device: torch.device) -> Measure:
    with _silent():
        import pycvvdp

        metric = pycvvdp.cvvdp(display_name="standard_4k", device=device, quiet=True)
    return lambda original, decoded: metric.predict(decoded, original, dim_order="CHW")[0].item()


@contextlib.contextmanager
def _pkg_resources() -> Iterator[None]:
    """Inside it, openai-clip can be imported, which takes `packaging` from a module that setuptools has dropped."""
    missing = importlib.util.find_spec("pkg_resources") is None
    if missing:
        import packaging.version

        sys.modules["pkg_resources"] = types.ModuleType("pkg_resources")
        sys.modules["pkg_resources"].packaging = packaging
    try:
        yield
    finally:
        if missing:
            del sys.modules["pkg_resources"]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Inside it, libraries tell nothing on their way."""
    logging.getLogger("pyiqa").setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no CUDA
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
