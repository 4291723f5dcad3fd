"""Engines: what trains a model on some processes. `protocol.py` says what an engine does, `open.py` opens one, `objective.py`
says what an objective is. Each package here is an engine: it alone knows its library, process groups and optimizer."""
