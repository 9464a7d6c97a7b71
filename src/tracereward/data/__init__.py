"""Rows of demonstrations and traces: reading, checking, perturbing, probing."""
