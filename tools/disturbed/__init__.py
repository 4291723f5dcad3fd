"""Runs that are disturbed: what `tools/chaos.py` and the tests of damaged and killed runs share."""
