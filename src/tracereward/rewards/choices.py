"""Allowed names in a reward model's settings and the training options; imports nothing."""

HEADS = ("token", "action", "airl", "implicit")
REWARD_FORMS = ("logit", "logit_plus_logprob", "f")
GRANULARITIES = ("sparse", "step", "interval", "dense")
POSITIVES = ("expert", "agreeing")
NEGATIVES = ("all", "disagreeing")
