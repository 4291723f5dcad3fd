"""Parity: compares a layout with one process, for every loss, gradient and weight."""
