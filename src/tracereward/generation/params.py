"""`SamplingParams`: how completions are sampled. Imports neither torch nor transformers."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tracereward.errors import InputError

MAX_SEED = 2**32 - 1
"""NumPy's limit."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are sampled.

    Attributes:
        max_new_tokens: length limit of a completion.
        temperature: 0 is greedy decoding.
        top_p: nucleus sampling.
        seed: seed of all random numbers.
        batch_size: completions generated together.
        settings: further settings of a generation config, see `generation.settings`.
        dtype: precision of the models that are loaded to sample, see `modeling.precision`; None: chosen.

    Raises:
        InputError: an invalid value; names the option.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 64
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:  # excludes NaN too
            raise InputError(f"--temperature must be a number from 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p must be over 0 and at most 1, not {self.top_p}")
        if not 0 <= self.seed <= MAX_SEED:
            raise InputError(f"--seed must be from 0 to {MAX_SEED}, not {self.seed}")

    def seed_of(self, prompt: int, request: int = 0) -> int:
        """Seed of one of a prompt's requests to an engine: the same in any batch and after any interruption."""
        return random.Random(f"{self.seed} {prompt} {request}").getrandbits(31)  # some servers store 32 bits

    def prompts_together(self, n: int) -> int:
        """Number of prompts, with `n` completions each, per batch; at least one."""
        return max(1, self.batch_size // n)
