"""Engines: what trains a model on some processes. `protocol.py` says what an engine does, and `open.py` opens one. Each package
here is an engine: it alone knows its library, process groups and optimizer."""
