"""The scores of a picture: what each measures, by which library and convention, and what it needs.

All take 8-bit RGB pictures and compute in float32 or finer.
"""

import importlib.util
from dataclasses import dataclass

from measuring import weights
from measuring.metrics import MS_SSIM_MIN_SIDE
from measuring.weights import PackagedFile, WeightFile, lacking
from utils.errors import DiffoError


@dataclass(frozen=True)
class Score:
    """A score of a decoded picture.

    Attributes:
        heading: its name in tables and charts. unit: "" for a plain number. decimals: worth printing.
        convention: one sentence that says which of its variants it is.
        package: of PyPI, that computes it; "" where torch alone does. pyiqa: its name in pyiqa.
        weights: the files that it loads. min_side: the smallest side in pixels that it takes.
        reference: whether it compares with the original, or looks at the decoded picture alone.
    """

    heading: str
    convention: str
    package: str = "pyiqa"
    pyiqa: str = ""
    weights: tuple[WeightFile | PackagedFile, ...] = ()
    unit: str = ""
    decimals: int = 4
    min_side: int = 1
    lower_is_better: bool = False
    reference: bool = True


_MODULES = {"cvvdp": "pycvvdp", "pytorch-msssim": "pytorch_msssim"}  # where a package is imported under another name

SCORES = {
    "psnr": Score(
        "PSNR", "Over all RGB values, peak 255; infinite for equal pictures.", package="", unit="dB", decimals=2
    ),
    "psnr_red": Score(
        "PSNR of red",
        "Of the red channel alone, peak 255, as the published evaluation measures it; blind to green and blue.",
        package="",
        unit="dB",
        decimals=2,
    ),
    "ms_ssim": Score(
        "MS-SSIM (luma)",
        "Of BT.601 luma in whole grey values, 5 scales, negative terms cut at every pixel: pyiqa's ms_ssim.",
        package="",
        min_side=MS_SSIM_MIN_SIDE,
    ),
    "ms_ssim_rgb": Score(
        "MS-SSIM (RGB)",
        "Mean over R, G and B, 5 scales, negative terms cut after the mean over a channel: pytorch-msssim's ms_ssim.",
        package="pytorch-msssim",
        min_side=MS_SSIM_MIN_SIDE,
    ),
    "stlpips-vgg": Score(
        "ST-LPIPS-vgg",
        "Shift-tolerant LPIPS (Ghildyal and Liu, ECCV 2022) on the VGG-16 trunk, which is not LPIPS.",
        pyiqa="stlpips-vgg",
        weights=(weights.STLPIPS_VGG,),
        min_side=18,
        lower_is_better=True,
    ),
    "stlpips-alex": Score(
        "ST-LPIPS-alex",
        "Shift-tolerant LPIPS (Ghildyal and Liu, ECCV 2022) on the AlexNet trunk, which is not LPIPS.",
        pyiqa="stlpips",
        weights=(weights.STLPIPS_ALEX,),
        min_side=21,
        lower_is_better=True,
    ),
    "lpips-vgg": Score(
        "LPIPS-vgg",
        "LPIPS 0.1 (Zhang et al., CVPR 2018) on the VGG-16 trunk, with linear heads.",
        pyiqa="lpips-vgg",
        weights=(weights.VGG16, weights.LPIPS_VGG),
        min_side=16,
        lower_is_better=True,
    ),
    "lpips-alex": Score(
        "LPIPS-alex",
        "LPIPS 0.1 (Zhang et al., CVPR 2018) on the AlexNet trunk, with linear heads.",
        pyiqa="lpips",  # there the plain name is AlexNet; here it always tells the trunk
        weights=(weights.ALEXNET, weights.LPIPS_ALEX),
        min_side=31,
        lower_is_better=True,
    ),
    "dists": Score(
        "DISTS",
        "Structure and texture similarity on VGG-16 (Ding et al., PAMI 2022), at full size, not at 256 pixels.",
        pyiqa="dists",
        weights=(weights.VGG16, weights.DISTS),
        min_side=16,
        lower_is_better=True,
    ),
    "clip-iqa": Score(
        "CLIP-IQA",
        "Without reference (Wang et al., AAAI 2023): CLIP RN50, the mean over five pairs of prompts of pyiqa's clipiqa.",
        pyiqa="clipiqa",
        weights=(weights.CLIP_RN50,),
        min_side=32,
        reference=False,
    ),
    "musiq": Score(
        "MUSIQ",
        "Without reference (Ke et al., ICCV 2021): trained on KonIQ-10k, about 0 to 100.",
        pyiqa="musiq",
        weights=(weights.MUSIQ,),
        decimals=2,
        min_side=32,
        reference=False,
    ),
    "fsim": Score(
        "FSIM", "With colour, which is also called FSIMc (Zhang et al., TIP 2011).", pyiqa="fsim", min_side=2
    ),
    "nlpd": Score(
        "NLPD",
        "Normalised Laplacian pyramid distance of luma (Laparra et al., 2016), 6 levels.",
        pyiqa="nlpd",
        lower_is_better=True,
    ),
    "gmsd": Score(
        "GMSD",
        "Gradient magnitude similarity deviation of luma at half size (Xue et al., TIP 2014).",
        pyiqa="gmsd",
        min_side=2,
        lower_is_better=True,
    ),
    "vsi": Score("VSI", "Visual saliency-induced index, with colour (Zhang et al., TIP 2014).", pyiqa="vsi"),
    "vif": Score(
        "VIF",
        "Visual information fidelity of luma, in wavelets (Sheikh and Bovik, TIP 2006); 0 or NaN for flat originals.",
        pyiqa="vif",
        min_side=33,
    ),
    "cvvdp": Score(
        "ColorVideoVDP",
        "In JOD, 10 for no visible difference (Mantiuk et al., SIGGRAPH 2024): a still sRGB picture on the display "
        "standard_4k, 30 inch and 200 cd/m2, seen from 0.75 m, 75 pixels per degree.",
        package="cvvdp",
        unit="JOD",
        decimals=3,
        min_side=2,
    ),
}


def unavailable(name: str) -> str | None:
    """None if a score of `SCORES` can be computed now, else one line that says why not and what to do.

    Looks at installed packages and files only; nothing is imported or fetched. Raises DiffoError for an unknown name.
    """
    if name not in SCORES:
        raise DiffoError(f"unknown metric {name}; known are {', '.join(SCORES)}")
    package = SCORES[name].package
    if package and importlib.util.find_spec(_MODULES.get(package, package)) is None:
        return f"{name} needs the package {package}: pip install {package}"
    return lacking(name, SCORES[name].weights)
