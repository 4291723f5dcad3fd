"""Shared foundation: errors, durable files, artifacts, locks, process environment, heartbeats. Imports no other package."""
