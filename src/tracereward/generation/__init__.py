"""Sampling from a policy: whole completions, continuations, decoding guided by a reward model, self-correction."""
