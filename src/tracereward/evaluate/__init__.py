"""Evaluation of a reward model against its baselines: where the first error of a trace is, and label-free checks."""
