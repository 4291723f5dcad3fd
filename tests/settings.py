"""What tests that go through all settings share."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel


def settings_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings classes in a field's annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from settings_in(part)
