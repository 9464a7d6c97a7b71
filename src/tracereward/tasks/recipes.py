"""Tasks: conversion of a public dataset's rows to demonstrations, and extraction and comparison of its answers.

Every prompt states the answer format in one line and ends in a newline, and every completion starts and ends with a
visible character. So prompt and completion, tokenized separately, give the same tokens as the concatenated text.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from tracereward.errors import check_choice, check_text
from tracereward.messages import check_messages
from tracereward.tasks import answers, choices, extraction, mathematics, multi_hop
from tracereward.tasks.fields import read_text
from tracereward.thinking import ANY, Thinking


@dataclass(frozen=True)
class AnswerReader:
    """Reads the final answer behind the thinking of a completion: an answer in it does not count.

    Attributes:
        read: answer part -> final answer, or None if none is stated.
        thinking: how completions are split; by default at the marks of well-known models.
    """

    read: Callable[[str], str | None]
    thinking: Thinking = ANY

    def __call__(self, completion: str) -> str | None:
        """The final answer; None if none is stated, or if the thinking is not closed."""
        answer = self.thinking.answer(completion)
        return None if answer is None else self.read(answer)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A dataset format and its answer checking.

    Attributes:
        name: value of `--task`.
        dataset: Hub id of the default dataset; None if there is none.
        subset: configuration of that dataset.
        example: raw row -> ``{"prompt", "completion", "answer"}``; completion and answer are None if the row has none.
            Does not modify the row. Raises KeyError(field) for a missing field, ValueError for an invalid one.
        extract: completion -> final answer, or None if none is stated; reads what is behind the thinking only, see
            `AnswerReader`.
        equal: (extracted answer, gold answer) -> whether they are equal.
        completion_field: raw field that holds the trace, for error messages.
        step_delimiter: text that ends a step of a trace.
        answer_line: format of the line that states the answer.
    """

    name: str
    example: Callable[[dict], dict]
    extract: Callable[[str], str | None]
    equal: Callable[[str, str], bool]
    dataset: str | None = None
    subset: str | None = None
    completion_field: str = "completion"
    step_delimiter: str = "\n"
    answer_line: str = "#### {}"

    def __post_init__(self) -> None:
        if not isinstance(self.extract, AnswerReader):
            object.__setattr__(self, "extract", AnswerReader(self.extract))

    @property
    def thinking(self) -> Thinking:
        """How completions are split into thinking and answer."""
        assert isinstance(self.extract, AnswerReader)
        return self.extract.thinking

    def behind(self, thinking: Thinking) -> "Task":
        """The task with answers read behind completions' thinking, which is split in another way."""
        assert isinstance(self.extract, AnswerReader)
        return replace(self, extract=replace(self.extract, thinking=thinking))

    def verify(self, completion: str, answer: str) -> bool:
        """Whether the answer extracted from `completion` equals the gold `answer`; False if there is none."""
        stated = self.extract(check_text("completion", completion))
        return stated is not None and self.equal(stated, check_text("answer", answer))


def get_task(name: str) -> Task:
    """Return the task called `name`.

    Raises:
        InputError: there is no such task; the message suggests the nearest name.
    """
    return TASKS[check_choice("task", name, TASKS)]


def generic(row: dict) -> dict:
    """TRL's prompt-completion rows: fields prompt, completion and, optionally, answer; strings or lists of messages.

    Only trailing white space of a completion is removed: a policy would not learn to write it, and a discriminator
    would recognise it. A missing, null or blank completion is None.
    """
    prompt, completion, answer = row["prompt"], row.get("completion"), row.get("answer")
    if isinstance(prompt, str):
        read_text(row, "prompt")
    else:
        check_messages(prompt, "prompt")
    if isinstance(completion, str):
        completion = completion.rstrip() or None
    elif completion is not None:
        check_messages(completion, "completion")
    if isinstance(answer, bool):
        answer = "yes" if answer else "no"
    if answer is not None and not isinstance(answer, (str, int, float)):
        raise ValueError(f"field 'answer' is {type(answer).__name__}, not text or a number")
    answer = None if answer is None else str(answer).strip() or None
    return {"prompt": prompt, "completion": completion, "answer": answer}


def equal_any(answer: str, gold: str) -> bool:
    """Equal as mathematics, as yes or no, or as text."""
    return answers.equal_math(answer, gold) or answers.equal_yes_no(answer, gold)


# A table: its entries look alike on purpose.
_ALL = (
    Task(name="arithmetic", example=generic, extract=extraction.extract_number, equal=answers.equal_math),
    Task(
        name="gsm8k",
        dataset="openai/gsm8k",
        subset="main",
        example=mathematics.gsm8k,
        extract=extraction.extract_number,
        equal=answers.equal_math,
        completion_field="answer",
    ),
    # The traces are long numbered lists: a line is a step.
    Task(
        name="medreason",
        dataset="UCSC-VLAA/MedReason",
        example=choices.medreason,
        extract=extraction.extract_letter,
        equal=answers.equal_text,
        completion_field="reasoning",
        answer_line="The answer is ({}).",
    ),
    # The traces are single paragraphs: a sentence is a step.
    Task(
        name="mmlu_pro",
        dataset="TIGER-Lab/MMLU-Pro",
        example=choices.mmlu_pro,
        extract=extraction.extract_letter,
        equal=answers.equal_text,
        completion_field="trace",
        step_delimiter=". ",
        answer_line="The answer is ({}).",
    ),
    Task(
        name="medqa",
        dataset="GBaker/MedQA-USMLE-4-options",
        example=choices.medqa,
        extract=extraction.extract_letter,
        equal=answers.equal_text,
        completion_field="trace",
        answer_line="The answer is ({}).",
    ),
    Task(
        name="medmcqa",
        dataset="openlifescienceai/medmcqa",
        example=choices.medmcqa,
        extract=extraction.extract_letter,
        equal=answers.equal_text,
        completion_field="exp",
        answer_line="The answer is ({}).",
    ),
    Task(
        name="medmcqa_from_1",
        example=partial(choices.medmcqa, first=1),
        extract=extraction.extract_letter,
        equal=answers.equal_text,
        completion_field="exp",
        answer_line="The answer is ({}).",
    ),
    Task(
        name="casehold",
        dataset="coastalcph/lex_glue",
        subset="case_hold",
        example=choices.casehold,
        extract=extraction.extract_letter,
        equal=answers.equal_text,
        completion_field="trace",
        answer_line="The answer is ({}).",
    ),
    Task(
        name="arc",
        dataset="allenai/ai2_arc",
        subset="ARC-Challenge",
        example=choices.arc,
        extract=extraction.extract_letter,
        equal=answers.equal_text,
        completion_field="trace",
        answer_line="The answer is ({}).",
    ),
    Task(
        name="gpqa",
        dataset="Idavidrein/gpqa",
        subset="gpqa_diamond",
        example=choices.gpqa,
        extract=extraction.extract_letter,
        equal=answers.equal_text,
        completion_field="Explanation",
        answer_line="The answer is ({}).",
    ),
    Task(
        name="strategyqa",
        dataset="ChilleD/StrategyQA",
        example=multi_hop.strategyqa,
        extract=extraction.extract_yes_no,
        equal=answers.equal_yes_no,
        completion_field="facts",
        answer_line="The answer is {}.",
    ),
    Task(
        name="hotpotqa",
        dataset="hotpotqa/hotpot_qa",
        subset="distractor",
        example=multi_hop.hotpotqa,
        extract=extraction.extract_span,
        equal=answers.equal_span,
        completion_field="supporting_facts",
        answer_line="The answer is {}.",
    ),
    # The Hub datasets have questions and answers without proofs.
    Task(
        name="prontoqa",
        example=multi_hop.prontoqa,
        extract=extraction.extract_yes_no,
        equal=answers.equal_yes_no,
        completion_field="explanation",
        answer_line="The answer is {}.",
    ),
    # Long traces of reasoning models: a line is a step.
    Task(
        name="openr1",
        dataset="open-r1/OpenR1-Math-220k",
        subset="default",
        example=mathematics.openr1,
        extract=extraction.extract_math,
        equal=answers.equal_math,
        completion_field="generations",
        answer_line="\\boxed{{{}}}",
    ),
    Task(
        name="math",
        dataset="DigitalLearningGmbH/MATH-lighteval",
        example=mathematics.math,
        extract=extraction.extract_math,
        equal=answers.equal_math,
        completion_field="solution",
        answer_line="\\boxed{{{}}}",
    ),
    # AIME's data have questions, answers and, in some copies, solutions.
    Task(
        name="aime",
        dataset="HuggingFaceH4/aime_2024",
        example=mathematics.aime,
        extract=extraction.extract_math,
        equal=answers.equal_math,
        completion_field="solution",
        answer_line="\\boxed{{{}}}",
    ),
    Task(name="generic", example=generic, extract=extraction.extract_any, equal=equal_any),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
