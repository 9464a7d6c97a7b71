"""What a reward model is worth beside its baselines: where the first error of a trace is, and label-free checks."""
