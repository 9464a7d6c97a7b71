"""Measurements of the studies."""
