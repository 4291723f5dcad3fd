"""Shared foundation: errors, durable files, artifacts, locks, process status, heartbeats, GPUs. Imports no other package."""
