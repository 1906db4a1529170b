"""YAML and `key=value` overrides -> frozen dataclasses; unknown and ill-typed keys are refused by name."""

import dataclasses
import difflib
import itertools
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from utils.errors import ConfigError

T = TypeVar("T")
COMMAND_LINE = "command line"
BASE = "base"  # the key that names the file which a configuration changes


Origin = Callable[[str, str], str]  # key and message of an error -> where the value came from


def require(condition: bool, message: str) -> None:
    """Raise ValueError unless a block's values are as they must be; the message begins with the key."""
    if not condition:
        raise ValueError(message)


def require_from(least: float, params: Any, *names: str) -> None:
    """Raise ValueError for the first of these fields, numbers or lists of them, that is, or has one, below `least`."""
    for name in names:
        value = getattr(params, name)
        several = isinstance(value, tuple)
        words = f"{name} {list(value)}: one number or more, each" if several else f"{name} {value}:"
        require(min(value if several else (value,), default=-math.inf) >= least, f"{words} from {least} up")


def load_mapping(path: str | Path, overrides: Sequence[str] = (), values: dict[str, Any] | None = None) -> dict:
    """A YAML file as a plain dictionary, with `a.b=value` overrides and then `values` applied.

    A file with the key `base`, the path of another seen from its own folder, says only what it changes there. The
    override `base=path`, seen from the working folder, makes it change another file instead. An override that is an empty
    block empties what stands there: `codec.perceptual={}` leaves no term.

    Args:
        values: dotted key -> value taken as it is, where an override would be read as YAML (a folder named 2024).
    Raises:
        ConfigError: missing or unreadable file, bases in a circle, ill-formed override.
    """
    files, changes = _read(path, overrides)
    with _one_line(path):
        config = OmegaConf.merge(*reversed(files.values()))
        for item, change in zip(overrides, changes, strict=True):
            with _one_line(f"{COMMAND_LINE}: {item}"):
                config = OmegaConf.merge(config, change)
                for key in set(_keys(change, empty=True)) - set(_keys(change)):
                    OmegaConf.update(config, key, {}, merge=False)
        for key, value in (values or {}).items():
            OmegaConf.update(config, key, value, force_add=True)
        return OmegaConf.to_container(config, resolve=True)


def origin_of(path: str | Path, overrides: Sequence[str] = (), values: dict[str, Any] | None = None) -> Origin:
    """Where an error's value came from: the command line (overrides and `values`), or the file that sets it; else `path`."""
    files, changes = _read(path, overrides)
    given = [*itertools.chain(*(_keys(change, empty=True) for change in changes)), *(values or {})]
    sources = {COMMAND_LINE: given} | {str(file): list(_keys(content)) for file, content in files.items()}

    def concerns(set_key: str, key: str, told: str) -> bool:
        # The error's own key or a block around it, or one below that the message names.
        below = set_key.removeprefix(f"{key}." if key else "")
        unknown = told.startswith(f"unknown key {below.partition('.')[0]};")  # a block, where the key of a value is set
        named = unknown or re.search(rf"(?<![\w.]){re.escape(below)}(?!\w)", told) is not None
        return f"{key}.".startswith(f"{set_key}.") or ((below != set_key or not key) and named)

    return lambda key, told: next(
        (name for name, keys in sources.items() if any(concerns(one, key, told) for one in keys)), str(path)
    )


def _keys(config: DictConfig, above: str = "", empty: bool = False) -> Iterator[str]:
    """Dotted keys of everything in a mapping that is no mapping itself; with `empty`, of empty ones as well."""
    for key, value in config.items_ex(resolve=False):
        if OmegaConf.is_dict(value) and (len(value) or not empty):
            yield from _keys(value, f"{above}{key}.", empty)
        else:
            yield f"{above}{key}"


def _read(path: str | Path, overrides: Sequence[str]) -> tuple[dict[Path, DictConfig], list[DictConfig]]:
    """A file and its bases, each of which changes the next, and what every override changes, but for `base=`."""
    changes, base = [], None
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"{item}: an override is written key=value, for instance codec.optim.lr=1e-4")
        with _one_line(f"{COMMAND_LINE}: {item}"):
            changes.append(OmegaConf.from_dotlist([item]))
            base = changes[-1].pop(BASE, base)
    files: dict[Path, DictConfig] = {}
    file, base = Path(path), Path(str(base)) if base else None
    while file:
        if file.resolve() in [seen.resolve() for seen in files]:
            raise ConfigError(f"{file}: its bases lead back to it: {' -> '.join(map(str, (*files, file)))}")
        if not file.is_file():
            named = f" (the base of {[*files][-1]})" if files else ""
            raise ConfigError(f"{file}: no such configuration file{named}")
        with _one_line(file):
            files[file] = OmegaConf.load(file)
            if not OmegaConf.is_dict(files[file]):
                raise ConfigError(f"{file}: a configuration is a mapping of keys to values")
            own = files[file].pop(BASE, None)
        file, base = base or (file.parent / str(own) if own else None), None
    return files, changes


@contextmanager
def _one_line(path: str | Path) -> Iterator[None]:
    """Errors of the libraries as ConfigErrors of this file."""
    try:
        yield
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError, TypeError) as error:
        raise ConfigError(f"{path}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


class _Refused(Exception):
    """A value that cannot be: the key of its block or its own, and what is wrong, which may begin with a key below."""

    def __init__(self, key: str, told: str, below: bool = False):
        super().__init__(f"{key}{('.' if below else ': ') if key else ''}{told}")
        self.key, self.told = key, told


def build(cls: type[T], mapping: dict, where: str | Origin) -> T:
    """Fill the dataclass `cls` from a mapping; absent keys keep the defaults.

    A block that is filled in part keeps the rest of what stands in its place by default.

    Args:
        where: the file or option that errors name, or a function that tells it (`origin_of`).
    Raises:
        ConfigError: a key that `cls` does not have, a value of another type, or one that `cls` refuses.
    """
    try:
        return _build(cls, mapping, "", None)
    except _Refused as error:
        raise ConfigError(f"{where if isinstance(where, str) else where(error.key, error.told)}: {error}") from error


def _build(cls: type[T], mapping: dict, key: str, base: T | None) -> T:
    if not isinstance(mapping, dict):
        raise _Refused(key, _block_expected(cls, mapping))
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for name, value in mapping.items():
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, 1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(fields))}"
            raise _Refused(key, f"unknown key {name}; {hint}")
        factory = fields[name].default_factory
        default = getattr(base, name, None if factory is dataclasses.MISSING else factory())
        values[name] = _convert(hints[name], value, f"{key}.{name}".strip("."), default)
    try:
        return cls(**values) if base is None else dataclasses.replace(base, **values)
    except (TypeError, ValueError) as error:
        raise _Refused(key, str(error), re.match(r"\w*", str(error))[0] in fields) from error


def _block_expected(kind: Any, value: Any) -> str:
    """What is wrong where a block of keys should be, with the form of one."""
    if dataclasses.is_dataclass(kind):
        first = dataclasses.fields(kind)[0]
        form = f"{{{first.name}: {'...' if first.default is dataclasses.MISSING else first.default}}}"
    else:
        form = f"{{{typing.get_args(typing.get_args(kind)[0])[0]}: 1.0}}"
    return f"expected a block of keys, for instance {form}, found {value!r}"


def to_mapping(config: Any) -> Any:
    """A dataclass as plain dictionaries and lists, fit for YAML, JSON and checkpoints."""
    if dataclasses.is_dataclass(config):
        config = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_mapping(value) for key, value in config.items()}
    return [to_mapping(value) for value in config] if isinstance(config, (list, tuple)) else config


def _convert(kind: Any, value: Any, key: str, default: Any = None) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, key, default)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        if isinstance(value, str) and str in args:
            return value
        return _convert(next(a for a in args if a is not type(None)), value, key)
    if origin is typing.Literal:
        if not any(value == allowed and type(value) is type(allowed) for allowed in args):
            raise _Refused(key, f"{value!r} is none of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _Refused(key, f"expected a list, found {value!r}")
        return tuple(_convert(args[0], v, key) for v in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise _Refused(key, _block_expected(kind, value))
        return {_convert(args[0], k, key): _convert(args[1], v, f"{key}.{k}") for k, v in value.items()}
    if kind is float and not isinstance(value, bool):
        with suppress(TypeError, ValueError):  # YAML 1.1 reads 1e-4 as text
            value = float(value)
    wrong = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
    if wrong or (kind is float and not math.isfinite(value)):
        raise _Refused(key, f"expected {'a finite number' if kind is float else kind.__name__}, found {value!r}")
    return value
