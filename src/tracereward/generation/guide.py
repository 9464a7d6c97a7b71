"""`Guide`: a policy and the reward model that guides it, token ids passing from one to the other."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracereward.errors import InputError
from tracereward.generation.continuation import Tilt, extend
from tracereward.generation.sampling import Sample
from tracereward.modeling.log_probs import mean_log_probs
from tracereward.modeling.tokenization import encode_prompt, eos_ids, pad_id, same_tokenizer
from tracereward.rewards.scorer import Scorer
from tracereward.rewards.token_scores import TokenScores


@dataclass(frozen=True)
class Guided(Sample):
    """A trace that a reward model chose.

    Attributes:
        reward: the aggregate of its token rewards.
        sampled_tokens: all tokens drawn for its prompt, those of other traces and of dropped ones too.
    """

    reward: float
    sampled_tokens: int


@dataclass(frozen=True)
class Guide:
    """A policy, the reward model that guides it, and how tokens are drawn.

    Attributes:
        policy: a causal LM.
        tokenizer: its tokenizer, which must be the reward model's.
        scorer: the reward model.
        max_new_tokens: length limit of a trace.
        step_tokens: length limit of a step; what is longer goes on as another step.
        temperature: 0 takes the likeliest token.
        top_p: nucleus.
        seed: of everything. With it, a prompt's tokens give its random numbers: neither its place in a list nor its
            neighbours matter.
        batch_size: traces generated together.
        reference: causal LM whose log-prob is added to the rewards, see `Scorer.score`.

    Raises:
        InputError: the tokenizers differ.
    """

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer
    max_new_tokens: int = 512
    step_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 64
    reference: PreTrainedModel | None = None

    def __post_init__(self):
        check_tokenizers(self.tokenizer, self.scorer.tokenizer)

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered prompts.

        Raises:
            InputError: with `max_new_tokens` more, one would be longer than the reward model reads.
        """
        encoded = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        for index, ids in enumerate(encoded):
            if len(ids) + self.max_new_tokens > self.scorer.max_positions:
                raise InputError(
                    f"prompt {index}: {len(ids)} prompt tokens and {self.max_new_tokens} new ones; the reward model "
                    f"reads {self.scorer.max_positions:.0f}. Set a lower length limit (--max-new-tokens)."
                )
        return encoded

    def ended(self, trace: Sequence[int]) -> bool:
        """Whether a trace ended by itself or is as long as it may get."""
        return len(trace) >= self.max_new_tokens or self.finished(trace)

    def finished(self, trace: Sequence[int]) -> bool:
        """Whether a trace ended by itself."""
        return bool(trace) and trace[-1] in eos_ids(self.policy, self.tokenizer)

    def grow(
        self,
        prompts: Sequence[Sequence[int]],
        traces: Sequence[Sequence[int]],
        streams: Sequence[str],
        by_step: bool = True,
        greedy: bool = False,
        tilt: Tilt | None = None,
    ) -> tuple[list[list[int]], list[int]]:
        """Traces with one more step each, or grown to their end, and how many tokens were drawn for each.

        Traces that have ended come back as they are. A stream is named within its prompt.
        """
        rows = [row for row, trace in enumerate(traces) if not self.ended(trace)]
        room = [self.max_new_tokens - len(traces[row]) for row in rows]
        drawn = extend(
            self.policy,
            self.tokenizer,
            [prompts[row] for row in rows],
            [traces[row] for row in rows],
            [f"{self.seed} {digest(prompts[row])} {streams[row]}" for row in rows],
            [min(self.step_tokens, limit) for limit in room] if by_step else room,
            self.scorer.settings.step_delimiter if by_step else None,
            0.0 if greedy else self.temperature,
            self.top_p,
            self.batch_size,
            tilt,
        )
        grown, counts = [list(trace) for trace in traces], [0] * len(traces)
        for row, part in zip(rows, drawn, strict=True):
            grown[row] += part.ids
            counts[row] = part.count
        return grown, counts

    def score(self, prompts: Sequence[Sequence[int]], traces: Sequence[Sequence[int]]) -> list[TokenScores]:
        """The token rewards of each trace so far."""
        return self.scorer.score_ids(prompts, traces, reference=self.reference)

    def rewards(self, prompts: Sequence[Sequence[int]], traces: Sequence[Sequence[int]]) -> list[float]:
        """Their aggregates."""
        return [scores.aggregate(self.scorer.settings.aggregate) for scores in self.score(prompts, traces)]

    def results(
        self, prompts: Sequence[Sequence[int]], traces: Sequence[Sequence[Sequence[int]]], drawn: Sequence[int]
    ) -> list[list[Guided]]:
        """Each prompt's traces as records, by reward from the highest; of equals the first comes first."""
        owners = [owner for owner, found in enumerate(traces) for _ in found]
        ids = [list(trace) for found in traces for trace in found]
        asked = [prompts[owner] for owner in owners]
        log_probs = mean_log_probs(self.policy, asked, ids, pad_id(self.tokenizer))
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        records: list[list[Guided]] = [[] for _ in prompts]
        for row in zip(owners, ids, texts, log_probs, self.rewards(asked, ids), strict=True):
            owner, trace, text, log_prob, reward = row
            records[owner].append(
                Guided(owner, trace, text, self.finished(trace), log_prob, reward, sampled_tokens=drawn[owner])
            )
        return [sorted(found, key=lambda record: -record.reward) for found in records]


def check_tokenizers(policy: PreTrainedTokenizerBase, reward_model: PreTrainedTokenizerBase) -> None:
    """Guiding passes token ids from one model to the other.

    Raises:
        InputError: the tokenizers differ.
    """
    if not same_tokenizer(policy, reward_model):
        raise InputError(
            "the policy has another tokenizer than the reward model, which therefore cannot guide it token by token: "
            "draw whole traces with `tracereward sample` and choose with `tracereward rerank`"
        )


def digest(ids: Sequence[int]) -> str:
    """A short name of a token sequence, to name random streams by."""
    return hashlib.sha256(str(list(ids)).encode()).hexdigest()[:16]
