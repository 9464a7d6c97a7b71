"""`Guide`: a policy and the reward model that guides it, with shared token ids."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracereward.errors import InputError
from tracereward.generation.continuation import OpenTrace, Tilt, extend
from tracereward.generation.params import SamplingParams
from tracereward.generation.sampling import Sample
from tracereward.modeling.log_probs import mean_log_probs
from tracereward.modeling.tokenization import encode_prompt, eos_ids, pad_id, same_tokenizer, with_own_end
from tracereward.rewards.scorer import Scorer
from tracereward.rewards.token_scores import TokenScores


@dataclass(frozen=True, kw_only=True)
class Guided(Sample):
    """A trace from guided decoding.

    Attributes:
        reward: aggregate of its token rewards.
        sampled_tokens: all tokens sampled for its prompt, including other and dropped traces.
    """

    reward: float
    sampled_tokens: int


@dataclass(frozen=True)
class Guide:
    """A policy, the reward model that guides it, and how tokens are sampled.

    Attributes:
        policy: a causal LM.
        tokenizer: its tokenizer, which must equal the reward model's.
        scorer: the reward model.
        sampling: how traces are sampled. A prompt's random numbers depend only on the seed and its tokens, not on its
            index or batch.
        step_tokens: length limit of a step; a longer one is split.
        reference: causal LM whose log-prob is added to the rewards, see `Scorer.score`.

    Raises:
        InputError: the tokenizers differ, or `sampling` has settings of a generation config.
    """

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer
    sampling: SamplingParams = field(default_factory=SamplingParams)
    step_tokens: int = field(default=256, kw_only=True)
    reference: PreTrainedModel | None = field(default=None, kw_only=True)

    def __post_init__(self):
        check_tokenizers(self.tokenizer, self.scorer.tokenizer)
        if self.sampling.settings:
            raise InputError(
                f"guided decoding samples from the policy itself, without {', '.join(self.sampling.settings)}"
            )

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered prompts.

        Raises:
            InputError: a prompt has no tokens, or is with `sampling.max_new_tokens` more longer than the reward model
                reads.
        """
        encoded = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        for index, ids in enumerate(encoded):
            if not ids:
                raise InputError(f"prompt {index}: no tokens; give a non-empty prompt")
            if len(ids) + self.sampling.max_new_tokens > self.scorer.max_positions:
                raise InputError(
                    f"prompt {index}: {len(ids)} prompt tokens and {self.sampling.max_new_tokens} new ones; the reward "
                    f"model reads {self.scorer.max_positions:.0f}. Set a lower length limit (--max-new-tokens)."
                )
        return encoded

    def ended(self, trace: Sequence[int]) -> bool:
        """Whether a trace has an end of sequence or reached the length limit."""
        return len(trace) >= self.sampling.max_new_tokens or self.finished(trace)

    def finished(self, trace: Sequence[int]) -> bool:
        """Whether a trace has an end of sequence."""
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
        """Add one step to each trace, or continue it to its end.

        Ended traces are unchanged. Stream names are unique within a prompt.

        Returns:
            The traces, and the number of tokens sampled for each.
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
            rule=self.scorer.settings.step_rule if by_step else None,
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
        """Token rewards of each trace, which may be partial; none for no traces."""
        if not traces:
            return []
        return self.scorer.score_ids(prompts, [self.for_scorer(trace) for trace in traces], reference=self.reference)

    def for_scorer(self, trace: Sequence[int]) -> list[int]:
        """A trace with the end-of-sequence token that the reward model knows."""
        return with_own_end(self.tokenizer, trace, eos_ids(self.policy, self.tokenizer))

    def rewards(self, prompts: Sequence[Sequence[int]], traces: Sequence[Sequence[int]]) -> list[float]:
        """The aggregated reward of each trace."""
        return [scores.aggregate(self.scorer.settings.aggregate) for scores in self.score(prompts, traces)]

    def results(
        self, prompts: Sequence[Sequence[int]], traces: Sequence[Sequence[Sequence[int]]], sampled: Sequence[int]
    ) -> list[list[Guided]]:
        """The traces of each prompt as records, highest reward first; ties keep their order."""
        owners = [owner for owner, found in enumerate(traces) for _ in found]
        ids = [list(trace) for found in traces for trace in found]
        row_prompts = [prompts[owner] for owner in owners]
        log_probs = mean_log_probs(self.policy, row_prompts, ids, pad_id(self.tokenizer))
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        rewards = self.rewards(row_prompts, ids)
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
    """Check that policy and reward model can share token ids.

    Raises:
        InputError: the tokenizers differ.
    """
    if not same_tokenizer(policy, reward_model):
        raise InputError(
            "guided decoding needs one tokenizer, but the policy has another tokenizer than the reward model: "
            "sample complete traces with `tracereward sample` and choose with `tracereward rerank`"
        )


def digest(ids: Sequence[int]) -> str:
    """A short hash of a token sequence, for names of random streams."""
    return hashlib.sha256(str(list(ids)).encode()).hexdigest()[:16]
