"""Disturbed runs: code shared by `tools/chaos.py` and the tests of damaged and killed runs."""
