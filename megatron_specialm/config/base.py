"""The base of every settings class, and what all values have in common."""

import os
import unicodedata
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator


class Settings(BaseModel):
    """Frozen settings that refuse unknown keys. YAML has typed the values, and they are taken as they are: `yes` is no 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _one_line(cls, value: Any) -> Any:
        """What ends up in scripts, names and paths; a mapping's own fields are its class's."""
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for text in parts:
            if isinstance(text, str) and any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
                raise ValueError("has a line break or another control character: take it out")
        return value


def _at_home(path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{path.partition('/')[0]} is no user's home: a file of that name is ./{path}")
    return expanded


# A path as the shell would read it, `~` and `~user` being homes. It is relative to the working directory.
PathText = Annotated[str, Field(min_length=1), AfterValidator(_at_home)]
