"""The base of every settings class."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Frozen settings that refuse unknown keys and do not turn one type into another (`"12"` is not a number)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True)
