"""For torch.hub: the codec with the weights that ship, from any working directory.

codec = torch.hub.load(FOLDER, "diffo", source="local")     # or by this repository's name on GitHub
codec = torch.hub.load(FOLDER, "diffo", source="local", weights="weights/mine", device="cuda")
"""

import sys
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path

dependencies = ["torch", "numpy", "PIL", "constriction", "omegaconf"]

FOLDER = Path(__file__).resolve().parent
PACKAGES = {path.parent.name for path in FOLDER.glob("*/__init__.py")}


def diffo(weights=None, device="cpu", **options):
    """The codec of a release: `compress(image) -> bytes`, `decompress(data) -> image`, `info(data)`.

    Arguments, results and errors are those of `load_codec` and `ImageCodec` in coding/api.py; a relative `weights` folder
    is seen from the working directory.
    """
    with own_packages():
        from coding.api import load_codec

        return load_codec(weights, device, **options)


@contextmanager
def own_packages():
    """Inside it, `utils`, `models` and the like are this repository's packages.

    A caller who has packages of these names, imported or on his path, has them back afterwards: this repository's are then
    in sys.modules no longer, and go on working for who holds them already.
    """
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES}
    foreign = [name for name, module in before.items() if not is_own(module)]
    elsewhere = [path for path in sys.path if Path(path).resolve() != FOLDER]
    taken = foreign or any(PathFinder.find_spec(name, elsewhere) for name in PACKAGES)
    for name in foreign:
        del sys.modules[name]
    sys.path.insert(0, str(FOLDER))
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
        if taken:
            for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
                del sys.modules[name]
            sys.modules.update(before)


def is_own(module) -> bool:
    """Whether a module lies in this repository."""
    places = [module.__file__] if getattr(module, "__file__", None) else getattr(module, "__path__", [])
    return any(Path(place).resolve().is_relative_to(FOLDER) for place in places)
