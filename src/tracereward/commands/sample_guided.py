"""`tracereward sample --guide`: completions from decoding guided by a reward model, as rows."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from tracereward.commands.partial_output import complete_rows
from tracereward.commands.questions import Questions, in_force, load_questions, sample_row, task_reading
from tracereward.errors import InputError, check_choice, check_number
from tracereward.files import write_jsonl
from tracereward.generation import decoding
from tracereward.generation.guide import Guide, Guided, check_tokenizers
from tracereward.generation.params import SamplingParams
from tracereward.modeling.loading import best_device, check_model, load_causal_lm, local_folder
from tracereward.modeling.precision import reading_precision
from tracereward.modeling.tokenization import end_as, load_tokenizer
from tracereward.rewards.engines import load_log_prob_model, load_reward_model
from tracereward.rewards.settings import check_reward_model


@dataclass(frozen=True, kw_only=True)
class Beam:
    """Options of beam search, see `decoding.beam`."""

    name: ClassVar = "beam"
    beam: int = 4
    expansions: int = 4
    lookahead: int = 0

    @property
    def at_once(self) -> int:
        """Traces sampled together per prompt."""
        return self.beam * self.expansions

    def run(self, guide: Guide, prompts: Sequence[str]) -> list[list[Guided]]:
        """The traces of each prompt."""
        return decoding.beam(guide, prompts, width=self.beam, expansions=self.expansions, lookahead=self.lookahead)


@dataclass(frozen=True, kw_only=True)
class Reject:
    """Options of early rejection, see `decoding.reject`.

    Raises:
        InputError: `keep` is larger than `n`.
    """

    name: ClassVar = "reject"
    n: int = 8
    keep: int = 1

    def __post_init__(self):
        if self.keep > self.n:
            raise InputError(f"--keep {self.keep}: only -n {self.n} traces are sampled")

    @property
    def at_once(self) -> int:
        """Traces sampled together per prompt."""
        return self.n

    def run(self, guide: Guide, prompts: Sequence[str]) -> list[list[Guided]]:
        """The traces of each prompt."""
        return decoding.reject(guide, prompts, n=self.n, keep=self.keep)


@dataclass(frozen=True, kw_only=True)
class Tilt:
    """Options of tilted sampling, see `decoding.tilt`.

    Raises:
        InputError: alpha is not finite.
    """

    name: ClassVar = "tilt"
    n: int = 8
    alpha: float = 1.0
    top_k: int = 8

    def __post_init__(self):
        check_number("--alpha", self.alpha)

    @property
    def at_once(self) -> int:
        """Traces sampled together per prompt."""
        return self.n

    def run(self, guide: Guide, prompts: Sequence[str]) -> list[list[Guided]]:
        """The traces of each prompt."""
        return decoding.tilt(guide, prompts, n=self.n, alpha=self.alpha, top_k=self.top_k)


METHODS = {method.name: method for method in (Beam, Reject, Tilt)}


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """The reward model and the method that guide the decoding.

    Attributes:
        reward_model: folder or Hub id; it has the policy's tokenizer.
        method: the decoding method and its options.
        reference: folder or Hub id of the model whose log-prob is added to the rewards.
    """

    reward_model: str
    method: Beam | Reject | Tilt
    reference: str | None = None


def guide_options(name: str, **given: Any) -> Beam | Reject | Tilt:
    """The decoding method `name` with the options in `given`; None is an option's default.

    Raises:
        InputError: an unknown method, an option of another method, or an invalid value.
    """
    check_choice("guide", name, METHODS)
    known = {other: {field.name for field in fields(method)} for other, method in METHODS.items()}
    given = {option: value for option, value in given.items() if value is not None}
    for option in given:
        if option not in known[name]:
            owner = " and ".join(other for other in METHODS if option in known[other])
            dash = "-" if len(option) == 1 else "--"
            raise InputError(f"{dash}{option.replace('_', '-')} is an option of --guide {owner}, not of {name}")
    return METHODS[name](**given)


def finished_guided(part: Path, size: int) -> int:
    """Questions in the complete chunks of `size` of an unfinished output; removes the rows after them."""
    rows = complete_rows(part, "question")
    done = rows[-1]["question"] // size * size if rows else 0  # a question may have fewer traces than requested
    write_jsonl(part, [row for row in rows if row["question"] < done])
    return done


def check_template(reward_model: str, questions: Questions) -> None:
    """Check that the prompts are rendered as those that the reward model was trained with.

    Raises:
        InputError: they are not, or there is no such reward model.
    """
    settings, template = check_reward_model(reward_model), questions.template
    if template != settings.template:
        raise InputError(f"{reward_model} was trained on prompts by --template {settings.template}, not {template}")
    own, given = dict(settings.chat_template_kwargs), dict(questions.chat_template_kwargs or {})
    if own != given:
        raise InputError(
            f"{reward_model} was trained with --chat_template_kwargs '{json.dumps(own)}', not '{json.dumps(given)}'"
        )


def load_guide(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    reward_model: str,
    sampling: SamplingParams,
    reference: str | None = None,
) -> Guide:
    """Load a policy and a reward model, on the accelerator if there is one.

    Args:
        model: folder or Hub id of the policy.
        tokenizer: its tokenizer.
        prompts: rendered; the length of each is checked.
        reward_model: folder or Hub id.
        sampling: how the guide samples.
        reference: folder or Hub id of the model whose log-prob is added to the rewards.

    Raises:
        InputError: the tokenizers differ (checked before a model is loaded), or a prompt leaves too few positions.
    """
    reward_tokenizer = load_tokenizer(str(local_folder(reward_model)))
    end_as(tokenizer, reward_tokenizer, model)
    check_tokenizers(tokenizer, reward_tokenizer)
    if reference is not None:
        check_model(reference)
    scorer = load_reward_model(reward_model)
    reference_model = load_log_prob_model(scorer, reference, sampling.dtype)
    precision = reading_precision(model, sampling.dtype).say(f"{model} samples")
    policy = load_causal_lm(model, precision.dtype, best_device())
    guide = Guide(policy, tokenizer, scorer, sampling, reference=reference_model)
    guide.encode(prompts)
    return guide


def guided_rows(
    model: str, questions: Questions, sampling: SamplingParams, guidance: Guidance, *, done: int = 0
) -> Iterator[list[dict[str, Any]]]:
    """Guided completions of a set of questions.

    The first `done` questions (complete chunks) are skipped.

    Yields:
        For each chunk of questions, rows as of `sample_rows` with reward and sampled_tokens: grouped by question,
        highest reward first.

    Raises:
        InputError: unreadable or inconsistent input; raised before a model is loaded.
    """
    method = guidance.method
    if sampling.temperature == 0 and method.at_once > 1:
        raise InputError(
            f"at temperature 0 all samples are the same: --guide {method.name} would sample {method.at_once}"
        )
    settings = check_reward_model(guidance.reward_model)
    questions = replace(in_force(questions, model, settings), date=settings.date)
    check_template(guidance.reward_model, questions)
    rows, prompts, tokenizer = load_questions(questions, model)
    task = task_reading(questions, model, prompts, tokenizer)
    guide = load_guide(
        model,
        tokenizer,
        prompts,
        reward_model=guidance.reward_model,
        sampling=sampling,
        reference=guidance.reference,
    )
    size = sampling.prompts_together(method.at_once)
    for start in range(done, len(prompts), size):
        yield [
            {
                **sample_row(trace, rows[start + trace.prompt], task),
                "question": start + trace.prompt,
                "reward": trace.reward,
                "sampled_tokens": trace.sampled_tokens,
            }
            for traces in method.run(guide, prompts[start : start + size])
            for trace in traces
        ]
