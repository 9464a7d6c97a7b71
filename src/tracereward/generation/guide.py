"""`Guide`: a policy and the reward model that guides it, token ids passing from one to the other."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracereward.errors import InputError
from tracereward.generation.continuation import OpenTrace, Tilt, extend
from tracereward.generation.params import SamplingParams
from tracereward.generation.sampling import Sample
from tracereward.modeling.log_probs import mean_log_probs
from tracereward.modeling.tokenization import encode_prompt, eos_ids, pad_id, same_tokenizer
from tracereward.rewards.scorer import Scorer
from tracereward.rewards.token_scores import TokenScores


@dataclass(frozen=True, kw_only=True)
class Guided(Sample):
    """A trace that a reward model chose.

    Attributes:
        reward: the aggregate of its token rewards.
        sampled_tokens: all tokens sampled for its prompt, those of other traces and of dropped ones too.
    """

    reward: float
    sampled_tokens: int


@dataclass(frozen=True)
class Guide:
    """A policy, the reward model that guides it, and how tokens are sampled.

    Attributes:
        policy: a causal LM.
        tokenizer: its tokenizer, which must be the reward model's.
        scorer: the reward model.
        sampling: of traces. A prompt's random numbers depend on the seed and its tokens: neither its place in a list
            nor its neighbours matter.
        step_tokens: length limit of a step; a longer one continues as another step.
        reference: causal LM whose log-prob is added to the rewards, see `Scorer.score`.

    Raises:
        InputError: the tokenizers differ.
    """

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer
    sampling: SamplingParams = field(default_factory=SamplingParams)
    step_tokens: int = field(default=256, kw_only=True)
    reference: PreTrainedModel | None = field(default=None, kw_only=True)

    def __post_init__(self):
        check_tokenizers(self.tokenizer, self.scorer.tokenizer)

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered prompts.

        Raises:
            InputError: with `sampling.max_new_tokens` more, one would be longer than the reward model reads.
        """
        encoded = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        for index, ids in enumerate(encoded):
            if len(ids) + self.sampling.max_new_tokens > self.scorer.max_positions:
                raise InputError(
                    f"prompt {index}: {len(ids)} prompt tokens and {self.sampling.max_new_tokens} new ones; the reward "
                    f"model reads {self.scorer.max_positions:.0f}. Set a lower length limit (--max-new-tokens)."
                )
        return encoded

    def ended(self, trace: Sequence[int]) -> bool:
        """Whether a trace ended by itself or is as long as it may get."""
        return len(trace) >= self.sampling.max_new_tokens or self.finished(trace)

    def finished(self, trace: Sequence[int]) -> bool:
        """Whether a trace ended by itself."""
        return bool(trace) and trace[-1] in eos_ids(self.policy, self.tokenizer)

    def grow(
        self,
        prompts: Sequence[Sequence[int]],
        traces: Sequence[Sequence[int]],
        streams: Sequence[str],
        *,
        by_step: bool = True,
        greedy: bool = False,
        tilt: Tilt | None = None,
    ) -> tuple[list[list[int]], list[int]]:
        """Traces with one more step each, or grown to their end, and how many tokens were sampled for each.

        Traces that have ended come back unchanged. A stream is named within its prompt.
        """
        open_rows = [row for row, trace in enumerate(traces) if not self.ended(trace)]
        longest = self.step_tokens if by_step else self.sampling.max_new_tokens
        continuations = extend(
            self.policy,
            self.tokenizer,
            [
                OpenTrace(
                    prompts[row],
                    traces[row],
                    f"{self.sampling.seed} {digest(prompts[row])} {streams[row]}",
                    min(longest, self.sampling.max_new_tokens - len(traces[row])),
                )
                for row in open_rows
            ],
            delimiter=self.scorer.settings.step_delimiter if by_step else None,
            temperature=0.0 if greedy else self.sampling.temperature,
            top_p=self.sampling.top_p,
            batch_size=self.sampling.batch_size,
            tilt=tilt,
        )
        grown, counts = [list(trace) for trace in traces], [0] * len(traces)
        for row, part in zip(open_rows, continuations, strict=True):
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
        self, prompts: Sequence[Sequence[int]], traces: Sequence[Sequence[Sequence[int]]], sampled: Sequence[int]
    ) -> list[list[Guided]]:
        """Each prompt's traces as records, by reward from the highest; of equals the first comes first."""
        owners = [owner for owner, found in enumerate(traces) for _ in found]
        ids = [list(trace) for found in traces for trace in found]
        asked = [prompts[owner] for owner in owners]
        log_probs = mean_log_probs(self.policy, asked, ids, pad_id(self.tokenizer))
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        rewards = self.rewards(asked, ids)
        records: list[list[Guided]] = [[] for _ in prompts]
        for row, owner in enumerate(owners):
            record = Guided(
                prompt=owner,
                ids=ids[row],
                text=texts[row],
                finished=self.finished(ids[row]),
                logprob=log_probs[row],
                reward=rewards[row],
                sampled_tokens=sampled[owner],
            )
            records[owner].append(record)
        return [sorted(found, key=lambda record: -record.reward) for found in records]


def check_tokenizers(policy: PreTrainedTokenizerBase, reward_model: PreTrainedTokenizerBase) -> None:
    """Refuse a policy and a reward model that cannot share token ids.

    Raises:
        InputError: the tokenizers differ.
    """
    if not same_tokenizer(policy, reward_model):
        raise InputError(
            "the policy has another tokenizer than the reward model, which therefore cannot guide it token by token: "
            "sample complete traces with `tracereward sample` and choose with `tracereward rerank`"
        )


def digest(ids: Sequence[int]) -> str:
    """A short name of a token sequence, to name random streams by."""
    return hashlib.sha256(str(list(ids)).encode()).hexdigest()[:16]
