"""Number types for the dataclasses that `read_json` checks."""

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0)]
