"""`Questions`: a set of questions to sample completions for; its rows and prompts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tracereward.console import note
from tracereward.data.demonstrations import load_demonstrations
from tracereward.data.readers import STDIN, data_name
from tracereward.errors import InputError
from tracereward.generation.engine import Answer, EngineOptions, Prompt
from tracereward.generation.params import SamplingParams
from tracereward.modeling.loading import check_model, context_length, read_config
from tracereward.modeling.lost_text import MOST_OF_A_TEXT, check_texts
from tracereward.modeling.policy_settings import PolicySettings, remembered
from tracereward.modeling.precision import reading_precision
from tracereward.modeling.rendering import Rendering, check_rendering, plain_prompt, render_prompt
from tracereward.modeling.thinking_marks import thinking_of, thinking_of_template
from tracereward.modeling.tokenization import encode_prompt, load_tokenizer, without_added
from tracereward.rewards.settings import RewardSettings
from tracereward.tasks.recipes import Task, get_task


@dataclass(frozen=True, kw_only=True)
class Questions:
    """A set of questions.

    Attributes:
        data: file or Hub id; None is the task's own set.
        task: name of the task that reads the rows and checks answers.
        split: of a Hub set.
        limit: use the first rows only.
        template: plain or chat.
        chat_template_kwargs: variables of the chat template, see `Rendering`.
        date: the day that a chat template which reads the clock writes, see `Rendering`.
        stream: read the rows as they come, see `sample_stream`.
        rows: the rows of one window of a stream; None reads `data`.
        before: number of questions before that window; None if the rows are all.

    Task, template, its variables and the date may be None: see `in_force`.
    """

    data: str | None = None
    task: str | None = None
    split: str = "test"
    limit: int | None = None
    template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    date: str | None = None
    stream: bool = False
    rows: Sequence[dict[str, Any]] | None = None
    before: int | None = None

    @property
    def streamed(self) -> bool:
        """Whether the rows are read once, as they come; those of stdin always."""
        return self.stream or self.data == STDIN

    @property
    def rendering(self) -> Rendering:
        """How prompts become text, once all is set."""
        kwargs = self.chat_template_kwargs or {}
        return Rendering(template=str(self.template), chat_template_kwargs=kwargs, date=self.date or "")

    @property
    def options(self) -> dict[str, Any]:
        """The options that determine the rows, apart from the data; those of this version only where they are set."""
        found = {"task": self.task, "split": self.split, "limit": self.limit, "template": self.template}
        if self.chat_template_kwargs:
            found["chat_template_kwargs"] = dict(self.chat_template_kwargs)
        return found | ({"template_date": self.date} if self.date else {})


def in_force(questions: Questions, model: str, judge: RewardSettings | None = None) -> Questions:
    """The questions with every option set: as given, else as the model remembers, else generic and plain.

    Says what the model remembers, and where a given option differs from it.

    Args:
        questions: as given.
        model: folder or Hub id of the policy.
        judge: settings of the reward model that guides it, whose rendering counts if the policy remembers none.

    Raises:
        InputError: the model's ``tracereward.json`` is damaged.
    """
    if questions.date is not None:  # done already
        return questions
    names: tuple[str, ...] = ("task", "template", "chat_template_kwargs")
    stored, who = remembered(model), model
    if stored is None and judge is not None:
        kwargs = judge.chat_template_kwargs
        stored = PolicySettings(template=judge.template, chat_template_kwargs=kwargs, date=judge.date)
        who, names = "the reward model", names[1:]
    default = stored or PolicySettings()
    given = {name: getattr(questions, name) for name in names if getattr(questions, name) is not None}
    own: dict[str, Any] = {name: getattr(default, name) for name in names}
    if given.get("template", own["template"]) != own["template"]:  # the variables belong to the other template
        own["chat_template_kwargs"] = {}
    if stored is not None:
        _say(who, own, given)
    found = replace(questions, **{**own, **given}, date=default.date)
    return replace(found, task=found.task or default.task)


def _say(model: str, own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """One line: the options that a model remembers, and the given ones that differ."""

    def words(options: Mapping[str, Any]) -> str:
        texts = {name: value if isinstance(value, str) else f"'{json.dumps(value)}'" for name, value in options.items()}
        return " ".join(f"--{name} {text}" for name, text in texts.items())

    followed = {name: value for name, value in own.items() if name not in given and value != {}}
    if all(value == getattr(PolicySettings(), name) for name, value in followed.items()):
        followed = {}  # as of any other model
    text = f"as {model} was trained: {words(followed)}" if followed else ""
    if other := {name: value for name, value in given.items() if value != own[name]}:
        trained = words({name: own[name] for name in other})
        text = f"{text}; " if text else ""
        text += f"{words(other)} as given, and {model} was trained with {trained}"
    if text:
        note(text)


def in_force_at(engine: EngineOptions, questions: Questions, model: str) -> tuple[Questions, EngineOptions]:
    """As `in_force` for the model of an engine, with the API of a server set.

    A model that is a folder here is rendered here, as it was trained, and its server is sent texts. Of any other name
    only the server knows a chat template, and it is sent messages; ``plain`` prompts are sent as texts.

    Raises:
        InputError: the API and the template contradict each other, or see `in_force`.
    """
    if not engine.is_server:
        return in_force(questions, model), engine
    here = Path(model).expanduser().is_dir()
    if here:
        if engine.api == "chat" and questions.template is None:
            questions = replace(questions, template="chat")
        questions = in_force(questions, model)
    elif questions.date is None:
        questions = replace(questions, task=questions.task or PolicySettings.task, date="")
        if questions.template is None:
            given = questions.chat_template_kwargs or engine.api == "chat"
            chat = given or any(not isinstance(row["prompt"], str) for row in read_questions(questions))
            questions = replace(questions, template="chat" if chat else "plain")
    questions.rendering  # noqa: B018 (checks the values)
    api = engine.api or ("completions" if questions.template == "plain" or here else "chat")
    if api == "chat" and questions.template == "plain":
        raise InputError(
            "--api chat sends messages for the server to render: use --template chat, or --api completions"
        )
    if api == "completions" and questions.template == "chat" and not here:
        raise InputError(
            f"--api completions with --template chat renders prompts by the chat template of {model}, which is no "
            "folder here: use --api chat, or give the model's folder (and serve it under that name)"
        )
    return questions, replace(engine, api=api)


def server_prompts(
    questions: Questions,
    model: str,
    max_new_tokens: int,
    engine: EngineOptions,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[list[dict[str, Any]], list[Prompt], PreTrainedTokenizerBase | None]:
    """The rows, what is sent for each, a text or messages, and the tokenizer that renders here. Says what is sent.

    Args:
        questions: with every option set, see `in_force_at`.
        model: folder of the policy, or its name at the server.
        max_new_tokens: length limit of the completions.
        engine: the server, with its API.
        tokenizer: see `load_questions`.

    Raises:
        InputError: as `load_questions`.
    """
    sent: list[Prompt]
    if engine.api == "chat":
        rows, how = read_questions(questions), "as messages, which the server renders by its own chat template"
        asked = [row["prompt"] for row in rows]
        sent = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in asked]
    elif questions.template == "plain":
        rows, how = read_questions(questions), "as texts"
        sent = [plain_prompt(row["prompt"], row["source"]) for row in rows]
    else:
        rows, prompts, tokenizer = load_questions(questions, model, max_new_tokens, tokenizer)
        how = f"as texts, rendered by the chat template of {model}"
        sent = [without_added(tokenizer, prompt) for prompt in prompts]  # the server's tokenizer adds them
    if not questions.before:  # once for a stream
        note(f"{engine.name}: prompts are sent {how}")
    return rows, sent, tokenizer


def source_of(questions: Questions, task: Task) -> tuple[str, str | None]:
    """The file or Hub id of the questions, and its configuration.

    Raises:
        InputError: none is given, and the task has none of its own.
    """
    source = questions.data or task.dataset
    if source is None:
        raise InputError(f"task {task.name!r} has no default data set: give --data, a file or a Hub id")
    return source, task.subset if questions.data in (None, task.dataset) else None


def read_questions(questions: Questions) -> list[dict[str, Any]]:
    """The rows.

    Args:
        questions: with every option set, see `in_force`.

    Raises:
        InputError: unreadable input.
    """
    if questions.rows is not None:
        return list(questions.rows)
    task = get_task(str(questions.task))
    source, subset = source_of(questions, task)
    return load_demonstrations(
        source, task, split=questions.split, subset=subset, limit=questions.limit, require_completion=False
    )


def load_questions(
    questions: Questions, model: str, max_new_tokens: int = 0, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[list[dict[str, Any]], list[str], PreTrainedTokenizerBase]:
    """The rows, their rendered prompts and the policy's tokenizer, without loading the model.

    Args:
        questions: with every option set, see `in_force`.
        model: folder or Hub id of the policy.
        max_new_tokens: length limit of the completions.
        tokenizer: the policy's, checked with an earlier window of a stream; loaded if None.

    Raises:
        InputError: unreadable input, or a prompt that leaves less than `max_new_tokens` of what the policy reads.
    """
    rendering = questions.rendering
    rows = read_questions(questions)
    if tokenizer is None:
        check_model(model)
        tokenizer = load_tokenizer(model)
        check_rendering(tokenizer, rendering)
    prompts = [render_prompt(tokenizer, row["prompt"], rendering, row["source"]) for row in rows]
    asked = [(row["source"], [prompt]) for row, prompt in zip(rows, prompts, strict=True)]
    what = questions.data or str(get_task(str(questions.task)).dataset)
    check_texts(tokenizer, asked, data_name(what), MOST_OF_A_TEXT)
    positions = context_length(read_config(model))
    longest, where = max((len(encode_prompt(tokenizer, prompt)), row["source"]) for row, prompt in zip(rows, prompts))
    if longest + max_new_tokens > positions:
        raise InputError(
            f"{where}: {longest} prompt tokens and up to {max_new_tokens} new ones, but {model} reads {positions}: set "
            "a lower length limit (--max-new-tokens), or use a model with a longer context"
        )
    return rows, prompts, tokenizer


def task_reading(questions: Questions, model: str, prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> Task:
    """The task, which reads answers behind the thinking of completions.

    Args:
        questions: with every option set, see `in_force`.
        model: folder or Hub id of the policy.
        prompts: rendered; some suffice.
        tokenizer: the policy's.
    """
    stored, rows = remembered(model), [{"prompt": prompt} for prompt in prompts]
    marks = stored.think or None if stored is not None else None
    if questions.rendering.template == "plain":
        thinking = thinking_of(tokenizer, questions.rendering, rows, marks)
    else:
        thinking = thinking_of_template(tokenizer, questions.rendering, marks)
    return get_task(str(questions.task)).behind(thinking)


def sample_row(sample: Answer, row: dict[str, Any], task: Task) -> dict[str, Any]:
    """The output row of ``tracereward sample`` for one completion of the question in `row`.

    length and logprob are missing where a server does not tell them.
    """
    found = {
        "question": sample.prompt,
        "prompt": row["prompt"],
        "completion": sample.text,
        "answer": row["answer"],
        "extracted": task.extract(sample.text),
        "correct": None if row["answer"] is None else task.verify(sample.text, row["answer"]),
        "finished": sample.finished,
    }
    known = {"length": sample.length, "logprob": sample.logprob}
    return found | {name: value for name, value in known.items() if value is not None}


def with_precision(policy: str, sampling: SamplingParams) -> SamplingParams:
    """How completions are sampled, with the precision of the policy where it is not the checkpoint's own.

    It is stored with unfinished rows: on a machine that would choose another precision they are not continued.
    """
    if sampling.dtype not in (None, "auto"):
        return sampling
    precision = reading_precision(policy)
    return replace(sampling, dtype=None if precision.own else precision.name)
