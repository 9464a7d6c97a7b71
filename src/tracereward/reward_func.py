"""A reward model as a reward function of TRL's trainers."""

from collections.abc import Callable
from typing import Any

from tracereward.demonstrations import render
from tracereward.reward_model import TokenRewardModel


def as_reward_func(model: TokenRewardModel) -> Callable[..., list[float]]:
    """What ``GRPOTrainer(reward_funcs=...)`` calls: the trace reward of each completion.

    A token-head checkpoint can also be named by its folder there: TRL then loads it with transformers and takes the
    last token's logit, without clip, temperature and aggregate. This function gives what `score` gives, for any head.

    Args:
        model: scores on its own device; prompts are rendered by ``settings.template``, texts or lists of messages.
    """

    def tracereward(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **_: Any
    ) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        rows = [{"prompt": p, "completion": c, "answer": None, "source": "a rollout"} for p, c in pairs]
        rendered = render(rows, model.tokenizer, model.settings.template)
        eos = model.tokenizer.eos_token_id
        texts = [row["prompt"] for row in rendered], [row["completion"] for row in rendered]
        finished = None
        if completion_ids is not None:  # of a trace without text there is only its end to score
            finished = [ids[-1:] == [eos] or not text for ids, text in zip(completion_ids, texts[1], strict=True)]
        return [trace.aggregate(model.settings.aggregate) for trace in model.score(*texts, finished)]

    return tracereward
