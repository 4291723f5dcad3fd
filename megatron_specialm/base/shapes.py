"""Numbers as files of JSON hold them, for the types that `read_json` is given."""

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0)]
