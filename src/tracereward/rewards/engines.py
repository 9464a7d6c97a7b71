"""Load a reward model for scoring, with transformers or vLLM, and the models whose log-probs enter its rewards."""

from transformers import PreTrainedModel

from tracereward.errors import InputError, check_choice
from tracereward.modeling.loading import best_device, check_model, load_causal_lm
from tracereward.modeling.tokenization import load_tokenizer, same_vocabulary
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.records import LogProbModels
from tracereward.rewards.scorer import Scorer
from tracereward.rewards.settings import RewardSettings, check_policy, check_reward_model

ENGINES = ("transformers", "vllm")


def check_engine(model: str, engine: str) -> RewardSettings:
    """Settings of a reward model, checked to run on `engine`; loads no weights.

    Raises:
        InputError: the engine is unknown or not installed, or it cannot run this model.
    """
    check_choice("engine", engine, ENGINES)
    if engine == "vllm":
        from tracereward.rewards.vllm_scorer import check_vllm

        return check_vllm(model)
    return check_reward_model(model)


def load_scorer(model: str, engine: str) -> Scorer:
    """Load a reward model for scoring, on the accelerator if there is one."""
    if engine == "vllm":
        from tracereward.rewards.vllm_scorer import VllmScorer

        return VllmScorer(model)
    return TokenRewardModel.from_pretrained(model).to(best_device())


def check_log_prob_models(
    settings: RewardSettings, reference: str | None, policy: str | None, engine: str = "transformers"
) -> None:
    """Reject models whose log-probs cannot enter the rewards; loads no weights.

    Raises:
        InputError: the head subtracts no policy, the engine computes no log-probs, or a model is missing.
    """
    check_policy(settings, policy)
    for name in (reference, policy):
        if name is not None:
            if engine != "transformers":
                raise InputError(f"--engine {engine} computes no log-probs: remove --reference and --policy")
            check_model(name)


def load_log_prob_models(model: Scorer, *, reference: str | None = None, policy: str | None = None) -> LogProbModels:
    """Load the models whose log-probs enter the rewards.

    Raises:
        InputError: a model's tokenizer differs from the reward model's.
    """
    return LogProbModels(reference=load_log_prob_model(model, reference), policy=load_log_prob_model(model, policy))


def load_log_prob_model(model: Scorer, name: str | None) -> PreTrainedModel | None:
    """Load a causal LM for its log-probs; None if `name` is None.

    Raises:
        InputError: its tokenizer differs from the reward model's.
    """
    if name is None:
        return None
    if not same_vocabulary(model.tokenizer, load_tokenizer(name)):
        raise InputError(f"{name}: its tokenizer differs from the reward model's; use a model with the same tokenizer")
    return load_causal_lm(name, device=best_device())
