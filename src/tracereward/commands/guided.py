"""`tracereward sample --guide`: completions that a reward model guides, as rows."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tracereward.commands.partial_output import whole_rows
from tracereward.commands.sample import check_drawing, load_questions, sample_row
from tracereward.errors import InputError, check_choice, check_number
from tracereward.files import write_jsonl
from tracereward.generation import decoding
from tracereward.generation.guide import Guide, Guided, check_tokenizers
from tracereward.modeling.loading import best_device, check_model, load_causal_lm, local_folder
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.rewards.engines import load_log_prob_model
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import check_reward_model
from tracereward.tasks.recipes import get_task

OPTIONS = {
    "beam": {"beam": 4, "expansions": 4, "lookahead": 0},
    "reject": {"n": 8, "keep": 1},
    "tilt": {"n": 8, "alpha": 1.0, "top_k": 8},
}
"""What each method of `decode.GUIDES` is given, and the defaults."""


def guide_options(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a method, defaults filled in; those in `given` that are None were not given.

    Raises:
        InputError: there is no such method, one of the options belongs to another, or has no such value.
    """
    check_choice("guide", method, decoding.GUIDES)
    known = OPTIONS[method]
    for name, value in given.items():
        if value is not None and name not in known:
            owner = " and ".join(other for other, names in OPTIONS.items() if name in names)
            dash = "-" if len(name) == 1 else "--"
            raise InputError(f"{dash}{name.replace('_', '-')} is of --guide {owner}, not of {method}")
    options = {name: default if given.get(name) is None else given[name] for name, default in known.items()}
    if method == "reject" and options["keep"] > options["n"]:
        raise InputError(f"--keep {options['keep']}: only -n {options['n']} traces are drawn")
    if method == "tilt":
        check_number("--alpha", options["alpha"])
    return options


def run_guide(guide: Guide, method: str, prompts: Sequence[str], options: dict[str, Any]) -> list[list[Guided]]:
    """Each prompt's traces by one of `decode.GUIDES`; `options` as `guide_options` gives them."""
    if method == "beam":
        return decoding.beam(guide, prompts, options["beam"], options["expansions"], options["lookahead"])
    if method == "reject":
        return decoding.reject(guide, prompts, options["n"], options["keep"])
    return decoding.tilt(guide, prompts, options["n"], options["alpha"], options["top_k"])


def traces_at_once(method: str, options: dict[str, Any]) -> int:
    """Traces of one prompt that are drawn together."""
    return options["beam"] * options["expansions"] if method == "beam" else options["n"]


def chunk_size(method: str, options: dict[str, Any], batch_size: int) -> int:
    """Questions that are guided together."""
    return max(1, batch_size // traces_at_once(method, options))


def finished_guided(part: Path, method: str, options: dict[str, Any], batch_size: int) -> int:
    """Questions in an unfinished output whose whole chunk is there; rows behind them are removed from it."""
    rows, size = whole_rows(part, "question"), chunk_size(method, options, batch_size)
    whole = rows[-1]["question"] // size * size if rows else 0  # a question may have fewer traces than were asked for
    write_jsonl(part, [row for row in rows if row["question"] < whole])
    return whole


def check_template(reward_model: str, template: str) -> None:
    """That prompts are rendered as those that a reward model was trained on.

    Raises:
        InputError: they are not, or there is no such reward model.
    """
    settings = check_reward_model(reward_model)
    if template != settings.template:
        raise InputError(f"{reward_model} was trained on prompts by --template {settings.template}, not {template}")


def load_guide(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    reward_model: str,
    prompts: Sequence[str],
    max_new_tokens: int,
    reference: str | None = None,
    **given: Any,
) -> Guide:
    """A policy and a reward model, on the accelerator if there is one.

    Args:
        model: folder or Hub id of the policy.
        tokenizer: its tokenizer.
        reward_model: folder or Hub id.
        prompts: rendered; all are measured.
        max_new_tokens: length limit of a trace.
        reference: folder or Hub id of the model whose log-prob is added to the rewards.
        **given: other fields of `Guide`.

    Raises:
        InputError: their tokenizers differ (said before either is loaded), or a prompt leaves too little room.
    """
    check_tokenizers(tokenizer, load_tokenizer(str(local_folder(reward_model))))
    if reference is not None:
        check_model(reference)
    scorer = TokenRewardModel.from_pretrained(reward_model).to(best_device())
    beside = load_log_prob_model(scorer, reference)
    policy = load_causal_lm(model, device=best_device())
    guide = Guide(policy, tokenizer, scorer, max_new_tokens, reference=beside, **given)
    guide.encode(prompts)
    return guide


def guided_rows(
    model: str,
    reward_model: str,
    method: str,
    options: dict[str, Any],
    data: str | None,
    task_name: str,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    limit: int | None = None,
    split: str = "test",
    template: str = "plain",
    batch_size: int = 64,
    reference: str | None = None,
    done: int = 0,
) -> Iterator[list[dict[str, Any]]]:
    """Guided completions of a set's prompts: rows as `pool.sample_rows` makes them, with reward and sampled_tokens.

    The first `done` questions, whole chunks of them, are left out.

    Yields:
        For each chunk of questions its rows; those of a question stand together, by reward from the highest.

    Raises:
        InputError: before a model is loaded, if anything cannot be read or does not fit.
    """
    check_drawing(temperature, top_p)
    at_once = traces_at_once(method, options)
    if temperature == 0 and at_once > 1:
        raise InputError(f"at temperature 0 all draws are the same: --guide {method} would draw {at_once}")
    check_template(reward_model, template)
    rows, prompts, tokenizer = load_questions(model, data, task_name, limit, split, template)
    given = {"temperature": temperature, "top_p": top_p, "seed": seed, "batch_size": batch_size}
    guide = load_guide(model, tokenizer, reward_model, prompts, max_new_tokens, reference, **given)
    size = chunk_size(method, options, batch_size)
    for start in range(done, len(prompts), size):
        found = run_guide(guide, method, prompts[start : start + size], options)
        yield [
            {
                **sample_row(trace, rows[start + trace.prompt], get_task(task_name)),
                "question": start + trace.prompt,
                "reward": trace.reward,
                "sampled_tokens": trace.sampled_tokens,
            }
            for traces in found
            for trace in traces
        ]
