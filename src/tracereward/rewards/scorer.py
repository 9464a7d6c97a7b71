"""`Scorer`: the base class of reward models and engines, from traces as text to `TokenScores`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tracereward.errors import (
    EmptyTrace,
    InputError,
    RunFailed,
    TooLong,
    check_choice,
    check_list,
    check_number,
    check_text_list,
)
from tracereward.errors import check_text as check_argument
from tracereward.modeling.alignment import step_ends, token_offsets
from tracereward.modeling.batching import Batch, pack
from tracereward.modeling.lost_text import check_text
from tracereward.modeling.tokenization import encode_trace, pad_id
from tracereward.rewards.first_error_rules import first_below
from tracereward.rewards.parts import position_weights, task_of, thinking_tokens
from tracereward.rewards.ranking import Ranking
from tracereward.rewards.records import EncodedTrace, ForwardOptions, LogProbModels, TokenIds, Trace
from tracereward.rewards.settings import RewardSettings
from tracereward.rewards.token_scores import TokenScores, trace_reward
from tracereward.selection import RERANK_METHODS, Candidate, choose


class Scorer(ABC):
    """Base class of all engines: subclasses compute token rewards, this class encodes, ranks and formats.

    Attributes:
        tokenizer: the reward model's.
        settings: settings that training and scoring must share.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: RewardSettings

    @property
    @abstractmethod
    def max_positions(self) -> float:
        """Longest prompt plus completion that the model accepts, in tokens; infinity if there is no limit."""

    @property
    @abstractmethod
    def token_budget(self) -> int:
        """Padded tokens per forward pass on this device."""

    @abstractmethod
    def compute_rewards(self, prompts: TokenIds, completions: TokenIds, options: ForwardOptions) -> list[Tensor]:
        """Clipped, backfilled rewards of token-id pairs: one float32 tensor of len(completion) each, on the CPU."""

    def token_rewards(
        self,
        prompts: TokenIds,
        completions: TokenIds,
        token_budget: int | None = None,
        *,
        reference: nn.Module | None = None,
        policy: nn.Module | None = None,
        sharded: bool = False,
    ) -> list[Tensor]:
        """Clipped, backfilled rewards of token-id pairs: one float32 tensor of len(completion) each, on the CPU.

        Args:
            prompts: token ids.
            completions: token ids, one for each prompt.
            token_budget: padded tokens per forward pass; the property `token_budget` if None.
            reference: causal LM whose log-prob of each token is added to f (``logit_plus_logprob``).
            policy: causal LM whose log-prob is subtracted (the logit of the heads ``airl`` and ``implicit``).
            sharded: whether any of these models has sharded weights; all processes then make the same number of
                passes.
        """
        extra = LogProbModels(reference=reference, policy=policy)
        options = ForwardOptions(token_budget=token_budget, extra=extra, sharded=sharded)
        return self.compute_rewards(prompts, completions, options)

    def step_ends(self, completion: Sequence[int]) -> list[bool]:
        """Flag the tokens of a completion that end a step."""
        text, offsets = token_offsets(self.tokenizer, completion)
        return step_ends(text, offsets, self.settings.step_rule)

    def thinking_tokens(self, completion: Sequence[int]) -> int:
        """Number of leading tokens of a completion that are thinking, its marks included."""
        return thinking_tokens(self.settings, *token_offsets(self.tokenizer, completion))

    def supervision(self, batch: Batch) -> Tensor:
        """The supervision mask of a batch, (B, T) bool."""
        return self.position_weights(batch) > 0

    def position_weights(self, batch: Batch) -> Tensor:
        """What each position weighs in a mean over supervised positions, (B, T); see `supervision.part_weights`."""
        return position_weights(self.settings, batch.completion_mask, batch.step_ends, batch.thinking)

    def trace_reward(self, completion: Sequence[int], rewards: Sequence[float], how: str) -> float:
        """The trace reward of a completion's token rewards; see `token_scores.trace_reward`."""
        weight = self.settings.thinking_weight
        thinking = 0 if weight is None else self.thinking_tokens(completion)
        return trace_reward(rewards, how, thinking, weight)

    def batch(self, prompts: TokenIds, completions: TokenIds) -> Batch:
        """Pad token ids into a `Batch`, with what `supervision` reads: step ends, thinking."""
        settings = self.settings
        ends = [self.step_ends(ids) for ids in completions] if settings.granularity == "step" else None
        thinking = None if settings.thinking_weight is None else [self.thinking_tokens(ids) for ids in completions]
        return pack(prompts, completions, pad_id(self.tokenizer), ends, thinking=thinking)

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        finished: Sequence[bool] | None = None,
        *,
        token_budget: int | None = None,
        reference: nn.Module | None = None,
        policy: nn.Module | None = None,
    ) -> list[TokenScores]:
        """Score completions given as text.

        Args:
            prompts: rendered as in training, with the task's wording and the template.
            completions: one trace for each prompt.
            finished: whether each trace ended by itself (its end-of-sequence token is then scored too, as in
                training) or was cut off; all ended if None.
            token_budget: padded tokens per forward pass; chosen for the device if None.
            reference: the model that ``settings.reference_model`` names, for the training reward under
                ``logit_plus_logprob``; without it rewards are logits only.
            policy: the policy, for the logit of the heads ``airl`` and ``implicit``; without it rewards are f.

        Raises:
            InputError: an argument is no list of texts or they differ in length; a prompt or trace is empty, longer
                than the backbone's positions (nothing is ever truncated), or much of it is not in the vocabulary.
            RunFailed: a reward is not finite.
        """
        prompts = check_text_list("prompts", prompts)
        completions = check_text_list("completions", completions, len(prompts))
        ended = [True] * len(prompts) if finished is None else check_list("finished", finished, len(prompts))
        if not all(isinstance(one, (bool, np.bool_)) for one in ended):
            raise InputError("finished must hold true or false for each completion")
        encoded = [
            self.encode(Trace(where=f"row {index}", prompt=prompt, completion=completion, finished=bool(end)))
            for index, (prompt, completion, end) in enumerate(zip(prompts, completions, ended, strict=True))
        ]
        ids = [trace.prompt for trace in encoded], [trace.completion for trace in encoded]
        return self.score_ids(*ids, token_budget=token_budget, reference=reference, policy=policy)

    def score_ids(self, prompts: TokenIds, completions: TokenIds, **options: Any) -> list[TokenScores]:
        """Score token ids; for the options see `token_rewards`.

        Raises:
            InputError: an argument is no list of lists of token ids, they differ in length, or a trace cannot be
                scored.
            RunFailed: a reward is not finite.
        """
        prompts = self._id_lists("prompts", prompts)
        completions = self._id_lists("completions", completions, len(prompts))
        for index, pair in enumerate(zip(prompts, completions, strict=True)):
            self.check_ids(f"row {index}", *pair)
        rewards = self.token_rewards(prompts, completions, **options)
        for index, values in enumerate(rewards):
            check_finite(f"row {index}", "reward", values.tolist())
        return [self.to_scores(ids, values) for ids, values in zip(completions, rewards, strict=True)]

    def _id_lists(self, what: str, values: object, length: int | None = None) -> list[Sequence[int]]:
        """Check lists of token ids."""
        rows: list[Sequence[int]] = check_list(what, values, length)
        size = len(self.tokenizer)
        for index, ids in enumerate(rows):
            fits = not isinstance(ids, (str, Mapping)) and hasattr(ids, "__len__")
            if not fits or not all(isinstance(one, (int, np.integer)) and 0 <= one < size for one in ids):
                raise InputError(f"{what}[{index}] must be a list of token ids from 0 to {size - 1}")
        return rows

    def encode(self, trace: Trace, limit: float = math.inf, *, known: bool = True) -> EncodedTrace:
        """Tokenize a trace and check that this model can score it.

        Args:
            trace: as text.
            limit: longest prompt plus completion in tokens, if lower than this model's.
            known: refuse a text that is not in the vocabulary.

        Raises:
            EmptyTrace: the trace has no token.
            InputError: the prompt has none, so that nothing predicts the first token.
            TooLong: it is longer than the backbone's positions, or `limit`.
            InputError: much of its text is not in the vocabulary, or the tokenizer cannot round-trip its steps.
        """
        prompt, completion = encode_trace(self.tokenizer, trace.prompt, trace.completion, trace.finished)
        self.check_ids(trace.where, prompt, completion, limit)
        if trace.spans:
            self._check_steps(trace, completion)
        if known:
            check_text(self.tokenizer, trace.prompt, prompt, trace.where)
            check_text(self.tokenizer, trace.completion, completion, trace.where)
        return EncodedTrace(where=trace.where, prompt=prompt, completion=completion)

    def rewards_of(self, traces: Sequence[EncodedTrace], options: ForwardOptions) -> list[Tensor]:
        """Token rewards of encoded traces, see `token_rewards`.

        Raises:
            RunFailed: a reward is not finite.
        """
        ids = [trace.prompt for trace in traces], [trace.completion for trace in traces]
        rewards = self.compute_rewards(*ids, options)
        for trace, values in zip(traces, rewards, strict=True):
            check_finite(trace.where, "reward", values.tolist())
        return rewards

    def score_encoded(self, traces: Sequence[EncodedTrace], extra: LogProbModels | None = None) -> list[TokenScores]:
        """Scores of encoded traces.

        Raises:
            RunFailed: a reward is not finite.
        """
        rewards = self.rewards_of(traces, ForwardOptions(extra=extra or LogProbModels()))
        return [self.to_scores(trace.completion, values) for trace, values in zip(traces, rewards, strict=True)]

    def rerank(
        self, prompt: str, candidates: Sequence[str], method: str = "reward", log_probs: Sequence[float] | None = None
    ) -> Ranking:
        """Rank the candidates of one question: a list of pairs of index and trace reward, best first.

        Args:
            prompt: rendered as in training.
            candidates: traces.
            method: one of `selection.RERANK_METHODS`; its choice comes first, the others follow by reward. Votes
                compare the answers that the task ``settings.task`` extracts.
            log_probs: mean policy log-probs, for the methods that use them.

        Raises:
            InputError: as for `score`; or the method is unknown, or needs log-probs that are not given.
        """
        candidates = check_text_list("candidates", candidates)
        prompt = check_argument("prompt", prompt)
        check_choice("method", method, RERANK_METHODS)
        if log_probs is not None:
            log_probs = check_list("log_probs", log_probs, len(candidates))
            for index, value in enumerate(log_probs):
                check_number(f"log_probs[{index}]", value)
        elif "logprob" in method:
            raise InputError(f"method {method!r} needs log_probs, the mean policy log-prob of each candidate")
        task, how = task_of(self.settings), self.settings.aggregate
        rewards = [scores.aggregate(how) for scores in self.score([prompt] * len(candidates), candidates)]
        known = [None] * len(candidates) if log_probs is None else log_probs
        rows = [
            Candidate(text=text, answer=task.extract(text), reward=reward, logprob=log_prob, length=len(text))
            for text, reward, log_prob in zip(candidates, rewards, known, strict=True)
        ]
        first = choose(rows, method, task.equal)
        order = sorted(range(len(rows)), key=lambda index: (index != first, -rewards[index]))
        return Ranking([(index, rewards[index]) for index in order], candidates)

    def first_error(self, prompt: str, steps: Sequence[str], threshold: float | None = None) -> int | None:
        """Index of the suspected first wrong step of a trace; None if no step is suspected.

        Args:
            prompt: rendered as in training.
            steps: steps of one trace, without delimiters.
            threshold: suspects the first step whose mean reward is lower, in log-odds, instead of the rule that the
                reward model stores.

        Raises:
            InputError: as for `score_steps`, or there is neither a rule nor a threshold.
        """
        if threshold is not None:
            check_number("threshold", threshold)
        asked, trace = check_argument("prompt", prompt), check_text_list("steps", steps)
        if threshold is not None:
            return first_below(self.score_steps([asked], [trace])[0], threshold)
        rule = self.settings.first_error_rule(None, "threshold")
        [(scores, spans)] = self._score_steps([asked], [trace])
        return rule.mark(scores.by_step(spans))

    def score_steps(self, prompts: Sequence[str], traces: Sequence[Sequence[str]]) -> list[list[float]]:
        """Mean token reward of each step.

        Steps are joined by `StepRule.join`. Tokens are assigned to steps by
        character spans, so a step may contain the delimiter.

        Raises:
            InputError: as for `score`, or the tokenizer cannot round-trip a step.
        """
        return [scores.step_rewards(spans) for scores, spans in self._score_steps(prompts, traces)]

    def _score_steps(
        self, prompts: Sequence[str], traces: Sequence[Sequence[str]]
    ) -> list[tuple[TokenScores, Sequence[tuple[int, int]]]]:
        """The scores of each trace and the spans of its steps; see `score_steps`."""
        prompts = check_text_list("prompts", prompts)
        listed = [
            check_text_list(f"traces[{n}]", steps) for n, steps in enumerate(check_list("traces", traces, len(prompts)))
        ]
        for n, steps in enumerate(listed):
            if not all(step.strip() for step in steps):
                raise InputError(f"traces[{n}] has an empty step")
        joined = [self.settings.step_rule.join(steps) for steps in listed]
        found = [
            Trace(where=f"trace {index}", prompt=prompt, completion=text, spans=spans)
            for index, (prompt, (text, spans)) in enumerate(zip(prompts, joined, strict=True))
        ]
        encoded = [self.encode(trace) for trace in found]
        scores = self.score_ids([trace.prompt for trace in encoded], [trace.completion for trace in encoded])
        return [(one, trace.spans) for one, trace in zip(scores, found, strict=True)]

    def to_scores(self, completion: Sequence[int], rewards: Tensor) -> TokenScores:
        """Build the `TokenScores` of a completion."""
        text, offsets = token_offsets(self.tokenizer, completion)
        ends = step_ends(text, offsets, self.settings.step_rule)
        mask = torch.ones(1, len(completion), dtype=torch.long)
        thinking = thinking_tokens(self.settings, text, offsets)
        inside = torch.arange(len(completion))[None] < thinking
        supervised = position_weights(self.settings, mask, torch.tensor([ends]), inside) > 0
        tokens = [text[start:end] for start, end in offsets]
        if completion and completion[-1] == self.tokenizer.eos_token_id:
            tokens[-1] = str(self.tokenizer.eos_token)
        return TokenScores(
            tokens=tokens,
            offsets=offsets,
            rewards=rewards.tolist(),
            supervised=supervised[0].tolist(),
            step_ends=ends,
            thinking=thinking,
            thinking_weight=self.settings.thinking_weight,
        )

    def _check_steps(self, trace: Trace, completion: Sequence[int]) -> None:
        """Reject steps that the tokenizer cannot round-trip: their token boundaries would be ambiguous.

        Raises:
            InputError: the tokenizer drops or changes a character; names the first such step.
        """
        text, (decoded, _) = trace.completion, token_offsets(self.tokenizer, completion)
        if decoded != text:
            differ = (place for place, (a, b) in enumerate(zip(decoded, text)) if a != b)
            at = next(differ, min(len(decoded), len(text)))
            step = next((number for number, (_, end) in enumerate(trace.spans, start=1) if at < end), len(trace.spans))
            raise InputError(
                f"{trace.where}: step {step}: the tokenizer cannot round-trip {text[at : at + 20]!r}, so step "
                "boundaries are ambiguous; edit the text or pass the trace as one completion"
            )

    def check_ids(self, where: str, prompt: Sequence[int], completion: Sequence[int], limit: float = math.inf) -> None:
        """Reject token ids that this model cannot score; see `encode`."""
        limit = min(limit, self.max_positions)
        if not completion:
            raise EmptyTrace(f"{where}: the completion is empty")
        if not prompt:
            raise InputError(f"{where}: the prompt has no tokens; give a non-empty prompt")
        if len(prompt) + len(completion) > limit:
            raise TooLong(
                f"{where}: {len(prompt)} prompt and {len(completion)} completion tokens, the reward model reads "
                f"{limit:.0f}. Traces are never truncated (the answer would be lost): remove the row or use a backbone "
                "with a longer context."
            )


def check_finite(where: str, name: str, values: Sequence[float]) -> None:
    """Reject NaN and infinity, the sign of damaged weights: a NaN would get an arbitrary rank.

    Args:
        where: location of the trace in the error message.
        name: what the values are, e.g. "reward".
        values: values of the trace.

    Raises:
        RunFailed: a value is not finite.
    """
    if not all(map(math.isfinite, values)):
        raise RunFailed(f"{where}: the model gives a {name} that is not finite: its weights may be damaged")
