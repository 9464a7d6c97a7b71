"""Sampling from a policy: complete traces, continuations, decoding guided by a reward model, self-correction."""
