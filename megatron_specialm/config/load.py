"""From a YAML file to a validated `Pipeline`.

In this order: `extends` (the config is merged over another one), dotted overrides from the command line, `defaults` by stage
kind, model presets by name, validation. The result is resolved: dumped and loaded again it is the same.
"""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

import megatron_specialm
from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config import schema
from megatron_specialm.config.explain import did_you_mean, explain
from megatron_specialm.config.imported import describe_source
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.text import TextSet
from megatron_specialm.config.training import ONE_RATE, SEVERAL_RATES
from megatron_specialm.config.trainings import settings_of_other_data
from megatron_specialm.config.yaml_file import MAX_LEVELS, Room, dump_yaml, read_yaml, read_yaml_file, shorten

PACKAGE = Path(megatron_specialm.__file__).parent
MAX_CONFIGS = 20  # in a chain of `extends`


def settings_classes(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes that a field of this type may hold, behind unions, lists and mappings."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [cls for part in get_args(annotation) for cls in settings_classes(part)]


KINDS = list(dict.fromkeys(get_args(cls.model_fields["kind"].annotation)[0] for cls in settings_classes(schema.Stage)))


def shipped_folder(name: str) -> Path:
    """A folder that is shipped with the code: inside the package in a wheel, at the top of the repository in a checkout."""
    packaged = PACKAGE / "shipped" / name
    return packaged if packaged.is_dir() else PACKAGE.parent / name


def configs_folder() -> Path:
    """The shipped configs and models."""
    return shipped_folder("configs")


def find_config(path: Path) -> Path:
    """The file; where there is none, the shipped config of that name, as `configs/pipelines/smoke.yaml`."""
    if path.parts[:1] != ("configs",) or ".." in path.parts or os.path.lexists(path):
        return path
    shipped = configs_folder().joinpath(*path.parts[1:])
    return shipped if shipped.is_file() else path


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
    """Resolve and validate a config that was read from its file and overridden; see `load_pipeline`."""
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
        _refuse_unused_defaults(f"{path}: defaults.train", defaults.get("train") or {}, config["stages"].values())
    try:
        return Pipeline.model_validate(config)
    except ValidationError as error:
        lines = explain(error, key_of=lambda location: ".".join(map(str, _walk(location)[0])), valid_keys=_valid_keys)
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines)) from None


def dump_pipeline(pipeline: Pipeline) -> str:
    """The resolved config as YAML, as a run folder keeps it and jobs read it."""
    return dump_yaml(pipeline.model_dump(mode="json"))


def read_config(path: Path, seen: tuple[Path, ...] = (), room: Room | None = None) -> dict[str, Any]:
    """Read a config and merge it over the one that it extends (a path relative to its own folder).

    Args:
        seen: the configs that led here by `extends`.
        room: how much may still be read.

    Raises:
        ConfigError: a file is missing or not YAML, has a key twice, or the chain of `extends` is a circle or too long.
    """
    place, room = Path(os.path.realpath(path)), room or Room()
    if place in seen:
        raise ConfigError(f"{path}: extends itself: {' -> '.join(map(str, (*seen, place)))}")
    if len(seen) == MAX_CONFIGS:
        raise ConfigError(f"{seen[0]}: extends a chain of more than {MAX_CONFIGS - 1} configs: join some of them")
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
    """Merge two mappings, `over` winning; any other value is replaced. A null removes a key of `base`."""
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
    if len(parents) > MAX_LEVELS:
        raise ConfigError(f"{where}: more than {MAX_LEVELS} dots: no setting is nested so deep")
    place = config
    for depth, part in enumerate(parents):
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ConfigError(f"{where}: {'.'.join(parents[: depth + 1])} is a value, not a mapping")
    if value is not None or parents not in (["stages"], ["text", "domains"]):
        place[last] = value
        return
    if last not in place:
        raise ConfigError(f"{where}: the config has no {key}{did_you_mean(last, list(place))}")
    del place[last]  # as null does in a config that extends another


def _resolve_stage(path: Path, name: str, stage: Any, defaults: Mapping[str, Any], *, others: Collection[str]) -> Any:
    if not isinstance(stage, dict):
        raise ConfigError(f"{path}: stages.{name}: must be a mapping with a `kind`, found {stage!r}")
    kind = stage.get("kind")
    if kind is None:  # often an override of a stage whose name is mistyped
        raise ConfigError(
            f"{path}: stages.{name}: has no `kind`{did_you_mean(name, sorted(others))}; kinds: {', '.join(KINDS)}"
        )
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{path}: stages.{name}.kind: {kind!r} is not a stage kind{did_you_mean(str(kind), KINDS)}")
    stage = _merge(_defaults_for(stage, defaults.get(kind) or {}), stage)
    if isinstance(stage.get("model"), str):
        stage["model"] = _preset(f"{path}: stages.{name}.model", path, stage["model"])
    if kind == "import" and stage.get("model") is None:
        stage |= _described(stage)
    return stage


def _described(stage: Mapping[str, Any]) -> dict[str, Any]:
    """`model` and `vocabulary_size` of an import stage, from its source; nothing where validation will refuse its values."""
    path, revision, config = (stage.get(key) for key in ("path", "revision", "config"))
    if not isinstance(path, str) or not isinstance(revision, str | None) or not isinstance(config, str | None):
        return {}
    return describe_source(
        Path(path).expanduser(), revision=revision, config=None if config is None else Path(config).expanduser()
    )


def _defaults_for(stage: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of its kind that a stage takes: none that go with another `data`, and no `model` where it has `init`, from
    which it takes its shape."""
    others = settings_of_other_data({**defaults, **stage}.get("data")) if stage["kind"] == "train" else set()
    return {
        key: value for key, value in defaults.items() if key not in others and not (key == "model" and "init" in stage)
    }


def _refuse_unused_defaults(where: str, defaults: Mapping[str, Any], stages: Iterable[Mapping[str, Any]]) -> None:
    unused = [settings_of_other_data(stage.get("data")) for stage in stages if stage["kind"] == "train"]
    for key in defaults:
        if unused and all(key in others for others in unused):
            raise ConfigError(f"{where}.{key}: goes with another `data` than that of all train stages here: drop it")


def _preset(where: str, config: Path, name: str) -> Any:
    folders = [config.parent / "models", config.parent.parent / "models", configs_folder() / "models"]
    known = {entry.stem: entry for folder in reversed(folders) for entry in sorted(folder.glob("*.yaml"))}
    if name in known:
        return {"name": name, **read_config(known[name])}
    raise ConfigError(
        f"{where}: no preset {name!r}{did_you_mean(name, list(known))}; known: {', '.join(sorted(known))}"
    )


def _check_defaults(where: str, defaults: Mapping[str, Any]) -> None:
    for kind, settings in defaults.items():
        if kind not in KINDS:
            raise ConfigError(f"{where}.{kind}: unknown{did_you_mean(kind, KINDS)}; known: {', '.join(KINDS)}")
        if not isinstance(settings, dict | None):
            raise ConfigError(f"{where}.{kind}: must be settings of such stages, as in {{...: ...}} (got {settings!r})")


def _valid_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys that the mapping around a location's last part takes."""
    classes = _walk(location[:-1])[1]
    names = dict.fromkeys(name for cls in classes for name in cls.model_fields)
    return [*names, *(["sizes"] if TextSet in classes and "domains" in location else [])]


def _walk(location: tuple[int | str, ...]) -> tuple[list[int | str], list[type[BaseModel]]]:
    """The parts of a pydantic location that are keys of the config, and the classes that the value there may be of. Behind
    a key whose value is of a union, the next part may be a tag, which chooses among its classes and is no key."""
    keys: list[int | str] = []
    classes: list[type[BaseModel]] = [Pipeline]
    may_choose = False  # the next part may be a tag
    inside = False  # a mapping or list of settings, of which the next part is a key or index
    for part in location:
        if inside:
            keys.append(part)
            inside = False
        elif tagged := [cls for cls in classes if may_choose and part in _tags(cls)]:
            classes, may_choose = tagged, len(tagged) > 1
        elif part not in (ONE_RATE, SEVERAL_RATES):
            keys.append(part)
            found = (cls.model_fields[str(part)].annotation for cls in classes if part in cls.model_fields)
            annotation = next(found, None)
            classes, inside, may_choose = settings_classes(annotation), get_origin(annotation) in (dict, list), True
    return keys, classes


def _tags(cls: type[BaseModel]) -> set[str]:
    """What a union may tell a class by: the values of its fields that can have one value only."""
    fields = [
        get_args(field.annotation) for field in cls.model_fields.values() if get_origin(field.annotation) is Literal
    ]
    return {values[0] for values in fields if len(values) == 1}
