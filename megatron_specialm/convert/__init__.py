"""Models to and from other formats, each conversion verified before it counts."""
