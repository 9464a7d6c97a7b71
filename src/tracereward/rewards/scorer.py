"""`Scorer`: from traces as text to `TokenScores`, whatever computes the token rewards."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tracereward.errors import InputError, RunFailed, TooLong
from tracereward.modeling.alignment import join_steps, step_ends, token_offsets
from tracereward.modeling.batching import Batch
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.rewards.first_error_rules import first_below
from tracereward.rewards.settings import RewardSettings
from tracereward.rewards.supervision import supervision_mask
from tracereward.rewards.token_scores import TokenScores
from tracereward.selection import Candidate, choose
from tracereward.tasks.recipes import get_task


class Scorer(ABC):
    """What scoring needs of a reward model.

    Attributes:
        tokenizer: the reward model's.
        settings: what must be the same in training and scoring.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: RewardSettings

    @property
    @abstractmethod
    def max_positions(self) -> float:
        """Tokens of the longest prompt and completion that can be read; infinity if nothing limits them."""

    @property
    @abstractmethod
    def token_budget(self) -> int:
        """Padded tokens that suit one forward pass."""

    @abstractmethod
    def token_rewards(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        token_budget: int | None = None,
        reference: nn.Module | None = None,
        policy: nn.Module | None = None,
        spread: bool = False,
    ) -> list[Tensor]:
        """Clipped, backfilled rewards of token-id pairs: one float32 tensor of len(completion) each, on the CPU.

        Args:
            prompts: token ids.
            completions: token ids of as many traces.
            token_budget: padded tokens per forward pass; `token_budget` if None.
            reference: causal LM whose log-prob of each token is added to f (``logit_plus_logprob``).
            policy: causal LM whose log-prob is taken off (the logit of the heads ``airl`` and ``implicit``).
            spread: whether weights of these are spread over processes, all of which then make as many passes.
        """

    def step_ends(self, completion: Sequence[int]) -> list[bool]:
        """Which tokens of a completion end a step."""
        text, offsets = token_offsets(self.tokenizer, completion)
        return step_ends(text, offsets, self.settings.step_delimiter)

    def supervision(self, batch: Batch) -> Tensor:
        """The supervision mask of a batch, (B, T) bool."""
        return supervision_mask(
            batch.completion_mask, batch.step_ends, self.settings.granularity, self.settings.interval
        )

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        finished: Sequence[bool] | None = None,
        token_budget: int | None = None,
        reference: nn.Module | None = None,
        policy: nn.Module | None = None,
    ) -> list[TokenScores]:
        """Score completions given as text, in one forward pass each.

        Args:
            prompts: rendered prompts (with the recipe's words and template), as in training.
            completions: as many traces.
            finished: whether each trace ended by itself (then the end-of-sequence token is scored too, as in
                training) or was cut off; all ended if None.
            token_budget: padded tokens per forward pass; as many as suit the device if None.
            reference: the model that ``settings.reference_model`` names, to get what training rewarded under
                ``logit_plus_logprob``; without it the rewards are the logits alone.
            policy: the policy, to get the logit of the heads ``airl`` and ``implicit``; without it the rewards are f.

        Raises:
            InputError: a trace is empty, or longer than the backbone's positions; nothing is ever truncated.
        """
        finished = [True] * len(completions) if finished is None else finished
        prompt_ids, completion_ids = [], []
        for index, texts in enumerate(zip(prompts, completions, finished, strict=True)):
            prompt, completion = self.check_length(f"row {index}", *texts)
            prompt_ids.append(prompt)
            completion_ids.append(completion)
        return self.score_ids(prompt_ids, completion_ids, token_budget, reference, policy)

    def score_ids(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *args: Any, **kwargs: Any
    ) -> list[TokenScores]:
        """The same of token ids, see `token_rewards`."""
        rewards = self.token_rewards(prompts, completions, *args, **kwargs)
        return [self.to_scores(ids, values) for ids, values in zip(completions, rewards, strict=True)]

    def rerank(
        self, prompt: str, candidates: Sequence[str], method: str = "reward", log_probs: Sequence[float] | None = None
    ) -> list[tuple[int, float]]:
        """Candidates of one question from best to worst: pairs of index and trace reward.

        Args:
            prompt: rendered, as in training.
            candidates: traces.
            method: one of `rerank.METHODS` that chooses; what it chooses comes first, the others follow by reward.
                Votes compare the answers that the recipe of ``settings.task`` extracts.
            log_probs: mean policy log-probs, for the methods with one.
        """
        task, how = get_task(self.settings.task), self.settings.aggregate
        rewards = [scores.aggregate(how) for scores in self.score([prompt] * len(candidates), candidates)]
        known = [None] * len(candidates) if log_probs is None else log_probs
        rows = [
            Candidate(text, task.extract(text), reward, log_prob, len(text))
            for text, reward, log_prob in zip(candidates, rewards, known, strict=True)
        ]
        first = choose(rows, method, task.equal)
        order = sorted(range(len(rows)), key=lambda index: (index != first, -rewards[index]))
        return [(index, rewards[index]) for index in order]

    def first_error(self, prompt: str, steps: Sequence[str], threshold: float = 0.0) -> int | None:
        """Index of the first step whose mean reward is under `threshold`; None if there is none.

        Args:
            prompt: rendered, as in training.
            steps: of one trace, without delimiters.
            threshold: in log-odds; `tracereward evaluate processbench` fits one on labelled traces.
        """
        rewards = self.score_steps([prompt], [steps])[0]
        return first_below(rewards, threshold)

    def score_steps(self, prompts: Sequence[str], traces: Sequence[Sequence[str]]) -> list[list[float]]:
        """Mean token reward of each step of traces that are given step by step.

        Steps are joined by ``settings.step_delimiter`` (`alignment.join_steps`). Characters decide which tokens are a
        step's, so that a step may itself contain the delimiter.

        Raises:
            InputError: as for `score`, or see `check_steps`.
        """
        joined = [join_steps(steps, self.settings.step_delimiter) for steps in traces]
        for index, (text, spans) in enumerate(joined):
            self.check_steps(f"trace {index}", text, spans, encode_completion(self.tokenizer, text))
        scores = self.score(prompts, [text for text, _ in joined])
        return [trace.span_rewards(spans) for trace, (_, spans) in zip(scores, joined, strict=True)]

    def to_scores(self, completion: Sequence[int], rewards: Tensor) -> TokenScores:
        """Token ids and their rewards as a `TokenScores`."""
        text, offsets = token_offsets(self.tokenizer, completion)
        ends = step_ends(text, offsets, self.settings.step_delimiter)
        mask = torch.ones(1, len(completion), dtype=torch.long)
        supervised = supervision_mask(mask, torch.tensor([ends]), self.settings.granularity, self.settings.interval)
        tokens = [text[start:end] for start, end in offsets]
        if completion and completion[-1] == self.tokenizer.eos_token_id:
            tokens[-1] = str(self.tokenizer.eos_token)
        return TokenScores(tokens, offsets, rewards.tolist(), supervised[0].tolist(), ends)

    def check_length(self, where: str, prompt: str, completion: str, finished: bool) -> tuple[list[int], list[int]]:
        """Token ids of a rendered prompt and a trace that this model can read.

        Raises:
            InputError: the trace is empty; names `where`.
            TooLong: it is longer than the backbone's positions.
        """
        prompt_ids, ids = encode_prompt(self.tokenizer, prompt), encode_completion(self.tokenizer, completion, finished)
        self.check_ids(where, prompt_ids, ids)
        return prompt_ids, ids

    def check_steps(self, where: str, text: str, spans: Sequence[tuple[int, int]], completion: Sequence[int]) -> None:
        """Refuse steps that their tokens do not spell: it could not be said which tokens are a step's.

        Args:
            where: named in the message.
            text: the joined steps.
            spans: characters of each step.
            completion: token ids of `text`.

        Raises:
            InputError: the tokenizer drops or changes a character; names the first step with one.
        """
        spelt, _ = token_offsets(self.tokenizer, completion)
        if spelt != text:
            differ = (place for place, (a, b) in enumerate(zip(spelt, text)) if a != b)
            at = next(differ, min(len(spelt), len(text)))
            step = next((number for number, (_, end) in enumerate(spans, start=1) if at < end), len(spans))
            raise InputError(
                f"{where}: step {step}: the tokenizer does not give {text[at : at + 20]!r} back, so that a step's "
                "tokens cannot be told from its neighbours': mend the text, or give the trace as one completion"
            )

    def check_ids(self, where: str, prompt: Sequence[int], completion: Sequence[int]) -> None:
        """Refuse token ids that this model cannot read; see `check_length`."""
        limit = self.max_positions
        if not completion:
            raise InputError(f"{where}: the completion is empty")
        if len(prompt) + len(completion) > limit:
            raise TooLong(
                f"{where}: {len(prompt)} prompt and {len(completion)} completion tokens, the reward model reads "
                f"{limit:.0f}. Traces are never cut (the answer would be lost): leave the row out or use a longer "
                "backbone."
            )


def check_finite(where: str, name: str, values: Sequence[float]) -> None:
    """Refuse what a damaged model gives: a nan would be ranked somewhere.

    Args:
        where: location of the trace in the error message.
        name: of a value, e.g. "reward".
        values: those of the trace.

    Raises:
        RunFailed: a value is not finite.
    """
    if not all(map(math.isfinite, values)):
        raise RunFailed(f"{where}: the model gives a {name} that is not finite: its weights may be damaged")
