"""The engine that scores: transformers or vLLM."""

from transformers import PreTrainedModel

from tracereward.errors import InputError, check_choice
from tracereward.modeling.loading import best_device, load_causal_lm
from tracereward.modeling.tokenization import load_tokenizer, same_tokenizer
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.scorer import Scorer
from tracereward.rewards.settings import RewardSettings, check_reward_model

ENGINES = ("transformers", "vllm")


def check_engine(model: str, engine: str) -> RewardSettings:
    """Settings of a reward model that `engine` can run; loads nothing.

    Raises:
        InputError: there is no such engine, it is not installed, or it cannot run this model.
    """
    check_choice("engine", engine, ENGINES)
    if engine == "vllm":
        from tracereward.rewards.vllm_scorer import check_vllm

        return check_vllm(model)
    return check_reward_model(model)


def load_scorer(model: str, engine: str) -> Scorer:
    """A reward model that is ready to score, on the accelerator if there is one."""
    if engine == "vllm":
        from tracereward.rewards.vllm_scorer import VllmScorer

        return VllmScorer(model)
    return TokenRewardModel.from_pretrained(model).to(best_device())


def load_beside(model: Scorer, name: str | None) -> PreTrainedModel | None:
    """A causal LM whose log-probs enter a reward model's rewards; None for no name.

    Raises:
        InputError: it has another tokenizer.
    """
    if name is None:
        return None
    if not same_tokenizer(model.tokenizer, load_tokenizer(name)):
        raise InputError(f"{name} has another tokenizer than the reward model: its log-probs are of other tokens")
    return load_causal_lm(name, device=best_device())
