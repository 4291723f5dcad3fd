"""Models to and from other formats. A conversion is complete only when its result has been verified."""
