"""Reward models: the heads, the artefact on disk, scoring and its settings."""
