"""Load a reward model for scoring, with transformers or vLLM, and the models whose log-probs enter its rewards."""

from transformers import PreTrainedModel

from tracereward.errors import InputError, check_choice
from tracereward.modeling.loading import best_device, check_model, load_causal_lm, local_folder
from tracereward.modeling.precision import Precision, reading_precision, scoring_precision
from tracereward.modeling.tokenization import load_tokenizer, same_vocabulary
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.records import LogProbModels
from tracereward.rewards.scorer import Scorer
from tracereward.rewards.settings import RewardSettings, check_policy, check_reward_model, read_settings

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


def load_scorer(model: str, engine: str = "transformers", dtype: str | None = None) -> Scorer:
    """Load a reward model for scoring, on the accelerator if there is one; says its precision if that is a choice.

    Args:
        model: folder or Hub id.
        engine: one of `ENGINES`.
        dtype: see `scoring_precision`.
    """
    if engine == "vllm":
        from tracereward.rewards.vllm_scorer import VllmScorer

        return VllmScorer(model, None if dtype == "auto" else dtype)
    return load_reward_model(model, dtype)


def load_reward_model(model: str, dtype: str | None = None) -> TokenRewardModel:
    """`load_scorer` with transformers."""
    precision = precision_of(model, dtype).say(f"{model} scores")
    return TokenRewardModel.from_pretrained(model, dtype=precision.dtype).to(best_device())


def precision_of(model: str, dtype: str | None = None) -> Precision:
    """The precision in which a reward model scores; `dtype` as for `scoring_precision`."""
    return scoring_precision(model, read_settings(local_folder(model)).dtype, dtype)


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


def load_log_prob_models(
    model: Scorer, *, reference: str | None = None, policy: str | None = None, dtype: str | None = None
) -> LogProbModels:
    """Load the models whose log-probs enter the rewards; `dtype` as for `reading_precision`.

    Raises:
        InputError: a model's tokenizer differs from the reward model's.
    """
    loaded = (load_log_prob_model(model, name, dtype) for name in (reference, policy))
    return LogProbModels(reference=next(loaded), policy=next(loaded))


def load_log_prob_model(model: Scorer, name: str | None, dtype: str | None = None) -> PreTrainedModel | None:
    """Load a causal LM for its log-probs; None if `name` is None. `dtype` as for `reading_precision`.

    Raises:
        InputError: its tokenizer differs from the reward model's.
    """
    if name is None:
        return None
    if not same_vocabulary(model.tokenizer, load_tokenizer(name)):
        raise InputError(f"{name}: its tokenizer differs from the reward model's; use a model with the same tokenizer")
    precision = reading_precision(name, dtype).say(f"{name} computes log-probs")
    return load_causal_lm(name, precision.dtype, best_device())
