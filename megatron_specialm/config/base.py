"""The base class of all settings, and the checks that all values go through."""

import os
import unicodedata
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator


class Settings(BaseModel):
    """Frozen settings that refuse unknown keys. Values keep the types that YAML gave them: `yes` is not 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _one_line(cls, value: Any) -> Any:
        """Text ends up in scripts, names and paths, so it has no control characters. Nested settings check their own fields."""
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for text in parts:
            if isinstance(text, str) and any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
                raise ValueError("has a line break or another control character: remove it")
        return value


def _at_home(path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{path.partition('/')[0]} is no user's home: for a file of that name write ./{path}")
    return expanded


# A path, relative to the working directory. `~` and `~user` are expanded as in a shell.
PathText = Annotated[str, Field(min_length=1), AfterValidator(_at_home)]
