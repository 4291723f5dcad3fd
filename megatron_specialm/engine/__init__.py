"""Engines: what trains a model on some processes. The training loop knows them by their protocol only."""
