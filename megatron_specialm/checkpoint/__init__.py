"""Canonical weights on disk: saving, opening, merging."""
