"""Records of the scoring loop: traces as text and as token ids, and the options of a forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from tracereward.errors import InputError
from tracereward.modeling.seam import continued, without_end_marks

TokenIds = Sequence[Sequence[int]]
CHUNK = 256
"""Rows scored together: enough to sort by length, few enough to show progress. It determines the batches, and the last
digits of a reward depend on its batch."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A trace to score, as the text that continues its prompt.

    What the prompt already opened, and end marks, are taken off the completion that is given; a completion with an end
    mark is finished, whatever `finished` says. See `modeling.seam`.

    Attributes:
        where: location of the row in error messages.
        prompt: rendered as in training.
        completion: the text.
        finished: whether the trace ended by itself; if so, its end-of-sequence token is scored too.
        spans: character span of each step, if the trace was given step by step.
    """

    where: str
    prompt: str
    completion: str
    finished: bool = True
    spans: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        text, ended = without_end_marks(self.completion)
        rest = continued(self.prompt, text)
        cut = len(text) - len(rest)
        spans = [(max(0, start - cut), max(0, min(end, len(text)) - cut)) for start, end in self.spans]
        kept = zip(spans, self.spans, strict=True)
        if any(start >= end and was[0] < was[1] for (start, end), was in kept):
            raise InputError(f"{self.where}: a step is only what its prompt already opened, or an end mark; join steps")
        object.__setattr__(self, "completion", rest)
        object.__setattr__(self, "finished", self.finished or ended)
        object.__setattr__(self, "spans", spans)


@dataclass(frozen=True, kw_only=True)
class EncodedTrace:
    """A trace to score, as token ids that the reward model can read.

    Attributes:
        where: location of the row in error messages.
        prompt: token ids.
        completion: token ids.
    """

    where: str
    prompt: Sequence[int]
    completion: Sequence[int]

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True, kw_only=True)
class LogProbModels:
    """Causal LMs whose log-probs enter the rewards; both have the reward model's tokenizer.

    Attributes:
        reference: its log-prob of each token is added (``logit_plus_logprob``).
        policy: its log-prob is subtracted (the logit of the heads ``airl`` and ``implicit``).
    """

    reference: nn.Module | None = None
    policy: nn.Module | None = None

    @property
    def signed(self) -> list[tuple[int, nn.Module]]:
        """Each model with the sign of its log-prob."""
        pairs = ((1, self.reference), (-1, self.policy))
        return [(sign, model) for sign, model in pairs if model is not None]


@dataclass(frozen=True, kw_only=True)
class ForwardOptions:
    """How token rewards are computed.

    Attributes:
        token_budget: padded tokens per forward pass; chosen for the device if None.
        extra: models whose log-probs enter the rewards.
        sharded: whether any of these models has sharded weights; all processes must then make the same number of
            passes.
    """

    token_budget: int | None = None
    extra: LogProbModels = field(default_factory=LogProbModels)
    sharded: bool = False
