"""Every value of a config and of a site profile, replaced by what does not belong there: it loads, or it is a `ConfigError`."""

import copy
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from megatron_specialm.base.accelerator import planned_machine
from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.load import configs_folder, load_pipeline, read_config, resolve_config
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.site import Site, load_site
from megatron_specialm.config.yaml_file import dump_yaml, read_yaml
from megatron_specialm.graph.build import build_graph
from megatron_specialm.report.estimates import memory_table, training_table
from tests.settings import settings_in

ROOT = Path(__file__).parents[2]
SMOKE = configs_folder() / "pipelines" / "smoke.yaml"
WRONG = (
    "null", "true", "no", "-1", "0", "2", "1e30", "1e400", ".nan", "-.inf", "0x7fffffffffffffff", "x", '""', '"a\\nb"',
    '"\\0"', '"\\ud83d"', "~", "~nobody-of-that-name/x", "[]", "[1, x]", "{}", "{a: {b: 1}}", "2024-13-01", "24:00:00", "010",
    "!!binary aGk=", "!!set {a}", "[[[]]]", '"' + "y" * 5000 + '"',
)  # fmt: skip
FULL_SITE = """
launcher: srun
python: /python
gpu: H100
modules: [a]
environment: {A: b}
container: {runtime: pyxis, image: a, python: python3, mounts: ["/a:/a"]}
exclude: [node1]
template: a
jobs: {default: {time: "5:00:00", cpus_per_process: 1, gpus_per_process: 1, processes_per_node: 1, memory: 1G, concurrency: 1,
  tasks_per_job: 1, account: a, partition: a, qos: a, constraint: a, reservation: a, options: [--a]}}
limits: {warning_seconds: 300, heartbeat_seconds: 5, silent_seconds: 60, failures: 1}
preflight: {enabled: true, seconds: 1, free_disk: 1}
"""


def _nodes(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if path:
        yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _nodes(part, (*path, key))


def _with(config: dict[str, Any], path: Sequence[str | int], text: str) -> dict[str, Any]:
    config = copy.deepcopy(config)
    place: Any = config
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = read_yaml(text, where="value")
    return config


def test_a_config_with_any_wrong_value_loads_or_is_refused_by_name() -> None:
    """A sample of some 30,000 pairs, another one in no run: the seed is fixed."""
    config = {**read_config(SMOKE), "local": {"threads": 1, "parallel_tasks": 1}}
    resolved = load_pipeline(SMOKE).model_dump(mode="json")
    draw = random.Random(0)
    for one in (config, resolved):
        for path, text in draw.sample([(path, text) for path in _nodes(one) for text in WRONG], 700):
            _loads_or_is_refused(one, path, text)


def _loads_or_is_refused(config: dict[str, Any], path: Sequence[str | int], text: str) -> None:
    key = ".".join(map(str, path))
    try:
        pipeline = resolve_config(_with(config, path, text), Path("config.yaml"))
        build_graph(pipeline)
        training_table(pipeline, planned_machine("H100"))
        memory_table(pipeline, planned_machine("H100"))
    except ConfigError as error:
        assert str(error), key
    except Exception as error:
        raise AssertionError(f"{key}={text}: {error!r}") from error


def test_a_profile_with_any_wrong_value_loads_or_is_refused_by_name(tmp_path: Path) -> None:
    config, file = read_yaml(FULL_SITE, where="site"), tmp_path / "site.yaml"
    pairs = [(path, text) for path in _nodes(config) for text in WRONG]
    for path, text in random.Random(0).sample(pairs, 400):
        file.write_text(dump_yaml(_with(config, path, "=here=")).replace("=here=", text))
        try:
            site = load_site(file)
        except ConfigError as error:
            assert str(file) in str(error), f"{path}={text}: {error}"
        else:
            assert "\n" not in "".join(_texts(site)), f"{path}={text}"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, BaseModel):
        value = value.model_dump()
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(part)
    if isinstance(value, str):
        yield value


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("name=2024-13-01", r'name: 2024-13-01 without quotes is a date to YAML: quote it, as "2024-13-01"'),
        ("name=1:30", "base 60 to YAML: quote it"),
        ("stages.slm.steps=0100", "0100 without quotes is a number in base 8 .* or write a number without the 0"),
        ("stages.slm.steps=yes", r"stages\.slm\.steps: .* whole number.*got True"),
        ("stages.slm.steps='5'", r"stages\.slm\.steps: .* without quotes.*got '5'"),
        ("stages.slm.steps=1e3", r"stages\.slm\.steps: .* exponent.*got 1000\.0"),
        ("stages.slm.steps=99999999999999999999", "more than 64 bits"),
        ("stages.slm.optimizer.learning_rate=.inf", r"learning_rate: .*finite number \(got inf\)"),
        ("stages.slm.optimizer.learning_rate=1e999", r"learning_rate: .*finite"),
        ("stages.slm.optimizer.learning_rate=true", r"learning_rate: .*got True"),
        ("stages.slm.schedule=[1]", r"stages\.slm\.schedule: .*keys and values"),
        ("stages.slm.kind=[train]", r"kind: \['train'\] is not a stage kind"),
        ("stages.slm.model=" + "y" * 5000, "no preset"),
        ("defaults.train=5", r"defaults\.train: must be settings .*got 5"),
        ("defaults=5", "defaults: must map"),
        ("stages=", r"stages: .*give a value.*got None"),
        ("text=null", r"text: .*give a value.*got None"),
        ("text.generic.train=5", r"text\.generic\.train: .*got 5"),
        ("text.domains.torch.text_field='a\n\n\tb'", r"text_field: has a line break"),
        ("root=", "root: "),
        ("root=''", "root: .*at least 1 character"),
        ("root=~nobody-of-that-name/x", "root: ~nobody-of-that-name is no user's home"),
        ("name=!!python/object/apply:os.system [true]", "not valid YAML"),
        ("name=!!timestamp x", "is a date to YAML"),
        ("name=!!int ''", "not valid YAML"),
        ("seed={1: 2}", "key 1 is not text: quote it"),
        ("seed={on: 2}", "key True is not text: quote it"),
        ("seed={2024-01-01: 2}", "a date to YAML: quote it"),
        ("seed={[a]: 2}", r"key \['a'\] is not text"),
        ("seed=" + "[" * 3000 + "]" * 3000, "too deep"),
        ("name=" + "y" * 81, "name: .*pattern"),
        ("stages." + "y" * 81 + "={kind: tokenizer}", "at most 80"),
        ("text.domains." + "y" * 81 + "={train: a, test: b}", "at most 80"),
        ("seed=4294967296", "seed: .*less than or equal"),
    ],
)
def test_what_is_wrong_is_said(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_pipeline(SMOKE, [override])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: &x {b: *x}\n", r"config\.yaml: not valid YAML: an anchor contains itself"),
        (b"".join(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10 if i else [b"x"])) for i in range(12)),
         "more than 50,000 values"),
        ("name: é".encode("utf-16"), "not UTF-8"),
        ("name: é".encode("latin-1"), "not UTF-8"),
        (b"name: a\0b", "not valid YAML"),
        (b"name:\ta\n\tseed: 1\n", "not valid YAML"),
        (b"name: a\n---\nname: b\n", "single document"),
        (b"", "must be a mapping"),
        (b"extends: 2024-01-01\n", "extends: must be the path"),
        (b"extends: [a]\n", "extends: must be the path"),
        (b'extends: "a\\0b"\n', "extends: must be the path"),
        (b"x" * (5 << 20), "more than 4,194,304 bytes"),
    ],
)  # fmt: skip
def test_files_that_are_no_configs_are_refused_by_name(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        load_pipeline(tmp_path / "config.yaml")


def test_numbers_with_an_exponent_are_numbers_and_text_that_looks_like_one_stays_text() -> None:
    for text, value in {
        "1e-4": 1e-4,
        "1.5E3": 1500.0,
        ".5e+1": 5.0,
        "520_000": 520_000,
        "0x10": 16,
        "1.0e-4": 1e-4,
    }.items():
        assert read_yaml(text, where="value") == value
    for value in ("1e-4", "1e5", "24:00:00", "no", "010", "2024-01-01", "~", ".5e1", "a: b"):
        assert read_yaml(dump_yaml([value]), where="value") == [value]


def test_a_home_is_where_the_shell_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_pipeline(
        SMOKE, ["root=~/runs", "text.generic.train=[~/a/*.jsonl, b.jsonl]", "stages.tokenizer.path=~/t"]
    )
    assert config.root == f"{tmp_path}/runs" and config.text.generic.train == [f"{tmp_path}/a/*.jsonl", "b.jsonl"]
    assert config.stages["tokenizer"].path == f"{tmp_path}/t"  # type: ignore[union-attr]
    assert load_pipeline(SMOKE, ["root=./~/runs"]).root == "./~/runs"
    (tmp_path / "site.yaml").write_text("python: ~/venv/bin/python\n")
    assert load_site(tmp_path / "site.yaml").python == f"{tmp_path}/venv/bin/python"


@pytest.mark.parametrize("root", [Pipeline, Site])
def test_no_field_has_a_constraint_that_replaces_another(root: type[BaseModel]) -> None:
    """pydantic keeps the outer one of two patterns that stand in each other."""
    for cls in _classes(root):
        for name, field in cls.model_fields.items():
            for kinds in [[type(one).__name__ for one in _constraints(field.metadata)], *_inner(field.annotation)]:
                assert len(kinds) == len(set(kinds)), f"{cls.__name__}.{name}: {kinds}"


def _constraints(metadata: Sequence[Any]) -> Iterator[Any]:
    for one in metadata:
        yield from _constraints(one.metadata) if hasattr(one, "metadata") else [one]


def _inner(annotation: Any) -> Iterator[list[str]]:
    """The names of constraints on each `Annotated` below: those that pydantic has not taken off the field itself."""
    if hasattr(annotation, "__metadata__"):
        found = _constraints(annotation.__metadata__)
        yield ["pattern" if getattr(one, "pattern", None) else type(one).__name__ for one in found]
    for part in get_args(annotation) if get_origin(annotation) is not None else ():
        yield from _inner(part)


def _classes(cls: type[BaseModel]) -> set[type[BaseModel]]:
    found = {cls}
    for field in cls.model_fields.values():
        for inner in settings_in(field.annotation):
            found |= _classes(inner)
    return found
