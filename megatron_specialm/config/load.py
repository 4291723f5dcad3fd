"""From a YAML file to a validated `Pipeline`.

In this order: `extends` (the config is laid over another one), dotted overrides from the command line, `defaults` by stage
kind, model presets by name, validation. What comes out is resolved: writing it down and loading it again gives the same.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

import megatron_specialm
from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config import schema
from megatron_specialm.config.explain import did_you_mean, explain
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.text import TextSet
from megatron_specialm.config.training import ONE_RATE, SEVERAL_RATES
from megatron_specialm.config.yaml_file import MOST_LEVELS, Room, dump_yaml, read_yaml, read_yaml_file, shorten

PACKAGE = Path(megatron_specialm.__file__).parent
MOST_CONFIGS = 20  # that extend each other


def _by_kind(union: Any) -> dict[str, type[BaseModel]]:
    """The classes of a discriminated union by their `kind`."""
    return {get_args(cls.model_fields["kind"].annotation)[0]: cls for cls in get_args(get_args(union)[0])}


KINDS = _by_kind(schema.Stage)
ENCODERS = _by_kind(schema.Encoder)


def shipped_folder(name: str) -> Path:
    """A folder that comes with the code: inside the package in a wheel, at the top of the repository in a checkout."""
    packaged = PACKAGE / "shipped" / name
    return packaged if packaged.is_dir() else PACKAGE.parent / name


def configs_folder() -> Path:
    """The shipped configs and models."""
    return shipped_folder("configs")


def find_config(path: Path) -> Path:
    """The file, or where there is none the shipped config of that name, as `configs/pipelines/smoke.yaml`."""
    shipped = configs_folder().parent / path
    return shipped if shipped.is_file() and not path.exists() else path


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Load, resolve and validate a pipeline config.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value` settings, values read as YAML.

    Raises:
        ConfigError: naming the file, the dotted key, the value and the fix.
    """
    config = read_config(path)
    for override in overrides:
        _apply_override(config, override)
    return resolve_config(config, path)


def resolve_config(config: dict[str, Any], path: Path) -> Pipeline:
    """Resolve and validate what a config's file and overrides have given; see `load_pipeline`."""
    defaults = config.pop("defaults", None) or {}
    if not isinstance(defaults, dict):
        raise ConfigError(
            f"{path}: defaults: must map stage kinds to settings, as in {{train: {{...}}}} (got {defaults!r})"
        )
    stages = config.get("stages")
    if isinstance(stages, dict):
        _check_defaults(f"{path}: defaults", defaults)
        config["stages"] = {
            name: _resolve_stage(path, name, stage, defaults, others=stages.keys() - {name})
            for name, stage in stages.items()
        }
    try:
        return Pipeline.model_validate(config)
    except ValidationError as error:
        lines = explain(error, key_of=_key_of, valid_keys=_valid_keys)
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines)) from None


def dump_pipeline(pipeline: Pipeline) -> str:
    """The resolved config as YAML: what a run folder keeps, and what jobs run from."""
    return dump_yaml(pipeline.model_dump(mode="json"))


def read_config(path: Path, seen: tuple[Path, ...] = (), room: Room | None = None) -> dict[str, Any]:
    """Read a config and lay it over the config it extends (a path relative to its own folder).

    Raises:
        ConfigError: a file that is missing or is not YAML, a key that stands twice, or a circle of configs, or a long row.
    """
    place, room = Path(os.path.realpath(path)), room or Room()
    if place in seen:
        raise ConfigError(f"{path}: extends itself: {' -> '.join(map(str, (*seen, place)))}")
    if len(seen) == MOST_CONFIGS:
        raise ConfigError(
            f"{seen[0]}: extends more than {MOST_CONFIGS - 1} configs one after the other: join some of them"
        )
    try:
        config = read_yaml_file(path, room)
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        named = f" (named by `extends` in {seen[-1]})" if seen else ""
        raise ConfigError(f"{path}: no such file{named}{did_you_mean(path.name, siblings)}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values, found {type(config).__name__}")
    base = config.pop("extends", None)
    if base is None:
        return config
    if not isinstance(base, str) or not base.isprintable():
        raise ConfigError(f"{path}: extends: must be the path of a config, from this one's folder (got {base!r})")
    return _merge(read_config(path.parent / os.path.expanduser(base), (*seen, place), room), config)


def _merge(base: Any, over: Any) -> Any:
    """Lay one mapping over another; anything but two mappings is replaced. A null takes a key out."""
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    merged = {**base, **{key: _merge(base.get(key), value) for key, value in over.items()}}
    return {key: value for key, value in merged.items() if not (value is None and key in base)}


def _apply_override(config: dict[str, Any], override: str) -> None:
    where = f"override {shorten(override)}"
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{where}: write KEY=VALUE with a dotted key, as in stages.slm.steps=100")
    value = read_yaml(text, where=where)
    *parents, last = key.split(".")
    if len(parents) > MOST_LEVELS:
        raise ConfigError(f"{where}: more than {MOST_LEVELS} dots: no setting stands so deep")
    place = config
    for depth, part in enumerate(parents):
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ConfigError(f"{where}: {'.'.join(parents[: depth + 1])} is a value, not a mapping")
    place[last] = value


def _resolve_stage(path: Path, name: str, stage: Any, defaults: Mapping[str, Any], *, others: Collection[str]) -> Any:
    if not isinstance(stage, dict):
        raise ConfigError(f"{path}: stages.{name}: must be a mapping with a `kind`, found {stage!r}")
    kind = stage.get("kind")
    if kind is None:  # mostly an override of a stage whose name is mistyped
        raise ConfigError(
            f"{path}: stages.{name}: has no `kind`{did_you_mean(name, sorted(others))}; kinds: {', '.join(KINDS)}"
        )
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(
            f"{path}: stages.{name}.kind: {kind!r} is not a stage kind{did_you_mean(str(kind), list(KINDS))}"
        )
    own = _without_inherited_shape(defaults.get(kind) or {}, stage)
    stage = _merge(own, stage)
    if isinstance(stage.get("model"), str):
        stage["model"] = _preset(f"{path}: stages.{name}.model", path, stage["model"])
    return stage


def _without_inherited_shape(defaults: Mapping[str, Any], stage: Mapping[str, Any]) -> dict[str, Any]:
    """A default `model` is for stages that start from random weights: one with `init` takes its shape from there."""
    return {key: value for key, value in defaults.items() if not (key == "model" and "init" in stage)}


def _preset(where: str, config: Path, name: str) -> Any:
    folders = [config.parent / "models", config.parent.parent / "models", configs_folder() / "models"]
    known = {entry.stem: entry for folder in reversed(folders) for entry in sorted(folder.glob("*.yaml"))}
    if name in known:
        return {"name": name, **read_config(known[name])}
    raise ConfigError(
        f"{where}: no preset {name!r}{did_you_mean(name, list(known))}; known: {', '.join(sorted(known))}"
    )


def _check_defaults(where: str, defaults: Mapping[str, Any]) -> None:
    known = list(KINDS)
    for kind, settings in defaults.items():
        if kind not in known:
            raise ConfigError(f"{where}.{kind}: unknown{did_you_mean(kind, known)}; known: {', '.join(known)}")
        if not isinstance(settings, dict | None):
            raise ConfigError(f"{where}.{kind}: must be settings of such stages, as in {{...: ...}} (got {settings!r})")


def _key_of(location: tuple[int | str, ...]) -> str:
    """The dotted key as it stands in the config."""
    tags = {*KINDS, *ENCODERS, ONE_RATE, SEVERAL_RATES}
    return ".".join(
        str(part)
        for index, part in enumerate(location)
        if not (index and part in tags and index == _tag_index(location, index))
    )


def _tag_index(location: tuple[int | str, ...], index: int) -> int:
    """pydantic puts a union's tag into the location, right behind the stage's name, `encoder` or `learning_rate`: it is no key
    of the config."""
    behind_stage = index == 2 and location[0] == "stages"
    behind_union = location[index - 1] in ("encoder", "learning_rate")
    return index if behind_stage or behind_union else -1


def _valid_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys that the mapping around a location's last part takes."""
    current: type[BaseModel] | None = Pipeline
    for part in location[:-1]:
        if part in KINDS and current is Pipeline:
            current = KINDS[str(part)]
            continue
        if current is None or part not in current.model_fields:
            continue
        found = _settings_class(current.model_fields[str(part)].annotation)
        current = found or (None if part == "encoder" else current)
    if "encoder" in location[:-1]:
        current = ENCODERS[str(location[list(location).index("encoder") + 1])]
    elif current is TextSet:
        return [*TextSet.model_fields, *(["sizes"] if "domains" in location else [])]
    return list(current.model_fields) if current else []


def _settings_class(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((arg for arg in get_args(annotation) if isinstance(arg, type) and issubclass(arg, BaseModel)), None)
