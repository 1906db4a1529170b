"""What benchmarks/cuda.py measures, part by part."""

import copy
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.train import OPTIONS, measured, profiled
from coding.report import Row
from datapipe.sources import demo_photographs
from experiments.stopwatch import seconds
from experiments.timing import fitted, measure
from measuring.metrics import psnr
from models.codec import Codec
from models.entropy_coding import frequency_table
from models.layers import fused_norm
from models.records import Contents
from models.released import SMALL, load_release
from models.speed.choices import CUDA_PATHS
from models.speed.fast import prepare
from models.speed.graphs import use_graphs
from release.tables import Counts
from training.config import load_config
from training.speed import Speed
from training.start import new_codec
from utils.images import to_signed, to_uint8

BRANCH = 0.3  # of a random residual branch, to its input: untrained ones are silent
QUALITIES = (0.0, 40.0)


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    config: str = "configs/config.yaml"
    small: str = "configs/small.yaml"
    picture: str = "512x768"
    large: int = 4096  # side
    photographs: int = 3
    batch: int = 16
    repeats: int = 7
    steps: int = 6  # of a round of training, of which there are three
    residual: str = "{}"  # sizes of the residual codec, other than the published ones
    overrides: tuple[str, ...] = ()


TINY = Sizes(  # for the tests: the same code
    config="tests/nano.yaml",
    small="tests/nano.yaml",
    picture="48x64",
    large=64,
    photographs=1,
    batch=2,
    repeats=1,
    steps=1,
    residual="{channels: 6, width: 8, blocks: 1, hyper_channels: 3, scale_width: 6, code_width: 4, levels: 3}",
    overrides=("gt.batch_size=1", "codec.batch_size=1"),
)


@dataclass(frozen=True)
class Mode:
    """A way to run the networks: precision of their weights, fast paths that are left out, and whether in autocast."""

    name: str
    precision: str = "bfloat16"
    without: tuple[str, ...] = ()
    autocast: bool = False

    def codec(self, codec: Codec) -> Codec:
        return prepare(copy.deepcopy(codec), self.precision, self.without)


FASTEST = Mode("bfloat16, channels_last, fused_norm, graphs")
PLAIN = Mode("float32", "float32", CUDA_PATHS)
MODES = (
    PLAIN,
    Mode("bfloat16, channels_last", without=CUDA_PATHS),
    Mode("bfloat16, channels_last, fused_norm", without=("graphs",)),
    Mode("bfloat16, channels_last, graphs", without=("fused_norm",)),
    Mode("float32, graphs", "float32", ("fused_norm",)),
    Mode("autocast to bfloat16", "float32", CUDA_PATHS, autocast=True),
)


class Bench:
    """The parts. Each gives rows as it measures them: what was run and how, the figure, its value and unit."""

    def __init__(self, sizes: Sizes, device: torch.device):
        self.sizes, self.device = sizes, device

    @cached_property
    def codec(self) -> Codec:
        """The published sizes, random weights in every branch, flat tables."""
        codec = new_codec(load_config(self.sizes.config, [f"networks.residual={self.sizes.residual}"]))
        for module in codec.modules():
            if isinstance(module, nn.Conv2d) and not module.weight.any():
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                module.weight.data.mul_(BRANCH)
        codec.base_table = frequency_table(np.ones(codec.params.vq_base.codebook_size, dtype=np.int64))
        codec.residual.freeze(Counts.none(codec).residual_tables())
        codec.fingerprint = b"test"
        return codec.to(self.device).eval()

    @cached_property
    def shipped(self) -> Codec:
        return load_release(SMALL, self.device)

    @cached_property
    def picture(self) -> Tensor:
        return fitted(demo_photographs()[0], self.sizes.picture)

    @cached_property
    def plain(self) -> tuple[bytes, Tensor]:
        """A file at the higher quality, and the picture that float32 makes of it."""
        codec = PLAIN.codec(self.codec)
        data = codec.compress(self.picture, QUALITIES[-1])
        return data, codec.decompress(data)

    def autocast(self, mode: Mode) -> torch.autocast:
        # Without the cache, every pass casts its weights, as it does for a picture coded alone.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=mode.autocast, cache_enabled=False)

    def timed(self, work, repeats: int | None = None) -> float:
        """Milliseconds, the median after three rounds of warm-up: a graph is recorded in the second."""
        found = []
        for _ in range(3 + (repeats or self.sizes.repeats)):
            began = seconds(self.device)
            work()
            found.append(seconds(self.device) - began)
        return 1e3 * median(found[3:])

    def parts(self, modes: tuple[Mode, ...] = (FASTEST,)) -> Iterator[Row]:
        """Every part of coding a picture, the device waited for after each, and the PSNR to float32."""
        data, exact = self.plain
        for mode in modes:
            codec, how = mode.codec(self.codec), {"what": f"published, {self.sizes.picture}", "way": mode.name}
            told = Namespace(
                quality=QUALITIES[-1],
                precision=mode.precision,
                without=mode.without,
                repeats=self.sizes.repeats,
            )
            with self.autocast(mode):
                rows = measure(self.codec, demo_photographs()[0], self.sizes.picture, told)
                decoded = codec.decompress(data)
            for row in rows:
                yield how | {"figure": f"{row['way']}: {row['part']}", "value": row["ms"], "unit": "ms"}
            if not torch.equal(exact, decoded):
                yield how | {"figure": "PSNR to float32", "value": psnr(exact, decoded), "unit": "dB"}

    def modes(self) -> Iterator[Row]:
        return self.parts(MODES)

    @torch.inference_mode()
    def networks(self) -> Iterator[Row]:
        """The networks alone, in the two ways that coding does not have, and the PSNR to float32 of what they decode."""
        _, k, exact = self.chain(torch.float32)
        for way, dtype in (("TF32", torch.float32), ("bfloat16 weights, NCHW", torch.bfloat16)):
            how = {"what": f"published, {self.sizes.picture}, networks alone", "way": way}
            Speed(OPTIONS["tf32" if way == "TF32" else "plain"], self.device).settle()
            try:
                works, _, decoded = self.chain(dtype, k)
                for figure, work in works.items():
                    yield how | {"figure": figure, "value": self.timed(work), "unit": "ms"}
            finally:
                Speed(OPTIONS["plain"], self.device).settle()
            if not torch.equal(exact, decoded):
                yield how | {"figure": "PSNR to float32", "value": psnr(exact, decoded), "unit": "dB"}

    def chain(self, dtype: torch.dtype, k: Tensor | None = None) -> tuple[dict[str, Callable], Tensor, Tensor]:
        """Calls of the networks in a precision, of what the one before gives; the codes, unless given, and the picture."""
        codec = PLAIN.codec(self.codec)
        for network in (codec.autoencoder, codec.vq_base, codec.unet):
            network.to(dtype)
        image = to_signed(self.picture.to(self.device))[None].to(dtype)
        x, t = codec.to_latent(image), torch.ones(1, device=self.device)
        k = codec.vq_base.indices(x) if k is None else k
        z_q = codec.vq_base.rows(k)
        y = codec.vq_base.reconstruct(z_q)
        x_hat = codec.unet(y, t, z_q)
        works = {
            "E": partial(codec.to_latent, image),
            "VQ-E": partial(codec.vq_base.indices, x),
            "VQ-D": partial(codec.vq_base.reconstruct, z_q),
            "U": partial(codec.unet, y, t, z_q),
            "D": partial(codec.autoencoder.decode, x_hat),
        }
        return works, k, to_uint8(codec.autoencoder.decode(x_hat)[0]).cpu()

    def whole(self) -> Iterator[Row]:
        """From pixels to bytes and back, in memory, the device waited for at the end alone."""
        for name, codec in (("published", self.codec), ("small", self.shipped)):
            for mode in (FASTEST, PLAIN):
                ours = mode.codec(codec)
                for quality in QUALITIES:
                    how = {"what": f"{name}, {self.sizes.picture}, quality {quality:g}", "way": mode.name}
                    data = ours.compress(self.picture, quality)
                    for figure, work in (
                        ("pixels to bytes", partial(ours.compress, self.picture, quality)),
                        ("bytes to pixels", partial(ours.decompress, data)),
                    ):
                        yield how | {"figure": figure, "value": self.timed(work), "unit": "ms"}

    @torch.inference_mode()
    def batch(self) -> Iterator[Row]:
        """Indices to pictures, many at once: VQ-D, U and D."""
        codec, count = FASTEST.codec(self.codec), self.sizes.batch
        k, t = codec.analyse(self.picture).k.expand(count, -1, -1), torch.ones(count, device=self.device)

        def decode() -> Tensor:
            z_q = codec.vq_base.rows(k)
            return codec.autoencoder.decode(codec.unet(codec.vq_base.reconstruct(z_q), t, z_q))

        how = {"what": f"published, {self.sizes.picture}, batch {count}", "way": FASTEST.name}
        rate = 1e3 * count / self.timed(decode)
        yield how | {"figure": "networks of decoding", "value": rate, "unit": "pictures/s"}

    def agreement(self) -> Iterator[Row]:
        """Files of the shipped model, written here and on the CPU: read alike on both; how far their pictures are apart."""
        cpu, right, tried, noise, apart = load_release(SMALL, torch.device("cpu")), 0, 0, [], []
        codecs = {mode: mode.codec(self.shipped) for mode in (PLAIN, FASTEST)}
        for path in demo_photographs()[: self.sizes.photographs]:
            picture = fitted(path, self.sizes.picture)
            for quality in QUALITIES:
                data = {None: cpu.compress(picture, quality)}
                data |= {mode: codec.compress(picture, quality) for mode, codec in codecs.items()}
                for one in data.values():
                    found = [cpu.read(one), *(codec.read(one) for codec in codecs.values())]
                    tried, right = tried + 1, right + all(same(found[0], other) for other in found[1:])
                exact = codecs[PLAIN].decompress(data[PLAIN])
                noise.append(psnr(exact, codecs[FASTEST].decompress(data[PLAIN])))
                apart.append((exact.short() - cpu.decompress(data[PLAIN]).short()).abs().max().item())
        how = {"what": "small, demo photographs", "way": "CPU and device"}
        yield how | {"figure": f"files read alike, of {tried}", "value": right, "unit": "files"}
        yield how | {"figure": "float32, the largest difference", "value": max(apart), "unit": "levels of 255"}
        yield how | {"figure": "bfloat16, the lowest PSNR to float32", "value": min(noise), "unit": "dB"}

    def training(self, stage: str, option: str, config: str | None = None, *overrides: str) -> Iterator[Row]:
        made = load_config(config or self.sizes.config, [*self.sizes.overrides, *overrides])
        made = replace(made, speed=OPTIONS[option])
        fused_norm.enabled = option != "plain"  # whatever the parts before have left
        rate, peak = measured(made, stage, self.device, self.sizes.steps, 3, untrained=True)
        how = {"what": f"{made.name}: stage {stage}, batch {getattr(made, stage).batch_size}", "way": option}
        yield how | {"figure": "training", "value": rate, "unit": "pictures/s"}
        yield how | {"figure": "peak memory", "value": peak, "unit": "MiB"}

    def small_training(self) -> Iterator[Row]:
        """Batch 32 where the sizes say nothing else, with the perceptual terms that it is trained with, and a PatchGAN."""
        for stage in ("gt", "codec"):
            asked = {"perceptual": "{stlpips: 1.0}", "adversary": "{weight: 0.1, start: 0}", "distortion_weight": 1.0}
            if self.sizes == Sizes():
                given = load_config("configs/small-pictures.yaml", self.sizes.overrides).codec
                terms = ", ".join(f"{name}: {factor}" for name, factor in given.perceptual.items())
                asked |= {"batch_size": 32, "crop_size": 256, "perceptual": f"{{{terms}}}"}
                asked |= {"vgg_window": given.vgg_window, "adversary": "{weight: 0.1, start: 0}"}
                asked |= {"train_decoder": given.train_decoder} if stage == "codec" else {}
            own = [f"{stage}.{key}={value}" for key, value in asked.items()]
            yield from self.training(stage, "defaults", self.sizes.small, *own)

    def launches(self) -> Iterator[Row]:
        """Programs that a step of stage `codec` starts, and how long they keep the device busy."""
        fused_norm.enabled = True
        config = load_config(self.sizes.config, self.sizes.overrides)
        started, busy, whole = profiled(replace(config, speed=OPTIONS["defaults"]), "codec", self.device)
        how = {"what": f"{config.name}: a step of stage codec", "way": "defaults"}
        yield how | {"figure": "programs started", "value": started, "unit": ""}
        yield how | {"figure": "device busy", "value": busy, "unit": "ms"}
        yield how | {"figure": "by the clock, profiled", "value": whole, "unit": "ms"}

    def large(self) -> Iterator[Row]:
        """The shipped model at a size of many megapixels, whole."""
        side, codec = self.sizes.large, FASTEST.codec(self.shipped)
        picture = fitted(demo_photographs()[0], f"{side}x{side}")
        how = {"what": f"small, {side}x{side}", "way": FASTEST.name}
        data = codec.compress(picture)
        for figure, work in (
            ("pixels to bytes", partial(codec.compress, picture)),
            ("bytes to pixels", partial(codec.decompress, data)),
        ):
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            yield how | {"figure": figure, "value": self.timed(work, 1) / 1e3, "unit": "s"}
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self.device) / 2**30
                yield how | {"figure": f"{figure}, peak memory", "value": peak, "unit": "GiB"}
        yield how | {"figure": "memory, predicted", "value": codec.memory(side, side) / 2**30, "unit": "GiB"}

    @torch.inference_mode()
    def compiled(self) -> Iterator[Row]:
        """D by torch.compile, alone and in a graph: what the fused norm is to replace."""
        codec = Mode("", without=CUDA_PATHS).codec(self.codec)
        how = {"what": f"published, {self.sizes.picture}", "way": "bfloat16, torch.compile of D"}
        x = codec.to_latent(self.picture.to(self.device)[None] / 127.5 - 1)
        codec.autoencoder.decoder.compile(dynamic=False)
        began = seconds(self.device)
        codec.autoencoder.decode(x)
        yield how | {"figure": "compiling", "value": seconds(self.device) - began, "unit": "s"}
        yield how | {"figure": "D", "value": self.timed(partial(codec.autoencoder.decode, x)), "unit": "ms"}
        use_graphs(codec)
        yield how | {"figure": "D in a graph", "value": self.timed(partial(codec.autoencoder.decode, x)), "unit": "ms"}


def same(one: Contents, other: Contents) -> bool:
    """Whether two read files have the same integers."""
    symbols = [found.symbols for found in (one, other)]
    if not torch.equal(one.k, other.k) or (symbols[0] is None) != (symbols[1] is None):
        return False
    names = ("hyper", "residual", "index") if symbols[0] else ()
    return all(np.array_equal(*(getattr(found, name) for found in symbols)) for name in names)
