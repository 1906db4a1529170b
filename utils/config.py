"""YAML and `key=value` overrides -> frozen dataclasses; unknown and ill-typed keys are refused by name."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from utils.errors import ConfigError

T = TypeVar("T")
BASE = "base"  # the key that names the file which a configuration changes


def load_mapping(path: str | Path, overrides: Sequence[str] = (), values: dict[str, Any] | None = None) -> dict:
    """A YAML file as a plain dictionary, with `a.b=value` overrides and then `values` applied.

    A file with the key `base`, the path of another seen from its own folder, says only what it changes there. The
    override `base=path`, seen from the working folder, makes it change another file instead.

    Args:
        values: dotted key -> value taken as it is, where an override would be read as YAML (a folder named 2024).
    Raises:
        ConfigError: missing or unreadable file, bases in a circle, ill-formed override.
    """
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"{item}: an override is written key=value, for instance codec.optim.lr=1e-4")
    with _one_line(path):
        changes = OmegaConf.from_dotlist(list(overrides))
        base = changes.pop(BASE, None)
        config = OmegaConf.merge(_inherited(Path(path), Path(str(base)) if base else None), changes)
        for key, value in (values or {}).items():
            OmegaConf.update(config, key, value, force_add=True)
        return OmegaConf.to_container(config, resolve=True)


def _inherited(path: Path, base: Path | None = None, below: tuple[Path, ...] = ()) -> DictConfig:
    """A file over its base; `base` takes the place of its own, `below` inherits from it."""
    if path.resolve() in [file.resolve() for file in below]:
        raise ConfigError(f"{path}: its bases lead back to it: {' -> '.join(map(str, (*below, path)))}")
    if not path.is_file():
        named = f" (the base of {below[-1]})" if below else ""
        raise ConfigError(f"{path}: no such configuration file{named}")
    with _one_line(path):
        config = OmegaConf.load(path)
        if not OmegaConf.is_dict(config):
            raise ConfigError(f"{path}: a configuration is a mapping of keys to values")
        own = config.pop(BASE, None)
        base = base or (path.parent / str(own) if own else None)
        return OmegaConf.merge(_inherited(base, None, (*below, path)), config) if base else config


@contextmanager
def _one_line(path: str | Path) -> Iterator[None]:
    """Errors of the libraries as ConfigErrors of this file."""
    try:
        yield
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError, TypeError) as error:
        raise ConfigError(f"{path}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


def build(cls: type[T], mapping: dict, where: str, base: T | None = None) -> T:
    """Fill the dataclass `cls` from a mapping; absent keys keep the values of `base`, or else the defaults.

    A block that is filled in part keeps the rest of what stands in its place by default.

    Args:
        where: the file or option that errors name.
    Raises:
        ConfigError: a key that `cls` does not have, a value of another type, or one that `cls` refuses.
    """
    if not isinstance(mapping, dict):
        raise ConfigError(f"{where}: expected a block of keys, found {mapping!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in mapping:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(fields))}"
            raise ConfigError(f"{where}: unknown key {key}; {hint}")
    values = {}
    for key, value in mapping.items():
        factory = fields[key].default_factory
        default = getattr(base, key, None if factory is dataclasses.MISSING else factory())
        values[key] = _convert(hints[key], value, f"{where}: {key}", default)
    try:
        return cls(**values) if base is None else dataclasses.replace(base, **values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def to_mapping(config: Any) -> Any:
    """A dataclass as plain dictionaries and lists, fit for YAML, JSON and checkpoints."""
    if dataclasses.is_dataclass(config):
        config = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_mapping(value) for key, value in config.items()}
    return [to_mapping(value) for value in config] if isinstance(config, (list, tuple)) else config


def _convert(kind: Any, value: Any, where: str, default: Any = None) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where, default)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        if isinstance(value, str) and str in args:
            return value
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"{where}: {value!r} is none of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, found {value!r}")
        return tuple(_convert(args[0], v, where) for v in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a block of keys, found {value!r}")
        return {_convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and not isinstance(value, bool):
        with suppress(TypeError, ValueError):  # YAML 1.1 reads 1e-4 as text
            return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {kind.__name__}, found {value!r}")
    return value
