"""Thinking models: where the thinking of a completion ends and its answer starts."""

from collections.abc import Sequence
from dataclasses import dataclass

from tracereward.errors import InputError, check_choice

PARTS = ("thinking", "answer")
MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
"""Marks before and behind the thinking, as well-known models write them."""


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """How a completion is split into thinking and answer.

    Attributes:
        marks: pairs of the texts that open and close the thinking.
        opened: whether prompts end within the thinking, so that completions start in it.
    """

    marks: tuple[tuple[str, str], ...] = MARKS
    opened: bool = False

    def __post_init__(self) -> None:
        for pair in self.marks:
            valid = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(m, str) and m.strip() for m in pair)
            if not valid or pair[0] == pair[1]:
                raise InputError(f"think_marks must be two different texts, such as <think> </think>, not {pair!r}")

    def answer_start(self, completion: str) -> int | None:
        """Index of the answer's first character; None if the thinking is not closed, 0 if there is none."""
        start = max((completion.rfind(mark) + len(mark) for _, mark in self.marks if mark in completion), default=0)
        rest = completion[start:]
        opens = any(rest.lstrip().startswith(mark) for mark, _ in self.marks)
        if opens or (self.opened and not start):
            return None
        return start + len(rest) - len(rest.lstrip()) if start else 0

    def answer(self, completion: str) -> str | None:
        """The answer; None if the thinking is not closed."""
        start = self.answer_start(completion)
        return None if start is None else completion[start:]

    def opens(self, prompt: str) -> bool:
        """Whether a rendered prompt ends within the thinking."""
        return any(prompt.rstrip().endswith(mark) for mark, _ in self.marks)

    def check(self, where: str, prompt: str, completion: str, asked: object = "") -> None:
        """Check a finished trace of which the parts count separately.

        Args:
            where: location of the row.
            prompt: rendered.
            completion: the text that follows it.
            asked: the prompt as given, if it is a text.

        Raises:
            InputError: names the row, the field and the fix.
        """
        for opening, closing in self.marks:
            if isinstance(asked, str) and closing in asked.rstrip().removesuffix(closing):
                raise InputError(
                    f"{where}: prompt: it has thinking ({closing}): move that to the completion or remove it"
                )
            opened = completion.count(opening) + prompt.rstrip().endswith(opening)
            closed = completion.count(closing)
            if opened > 1 or closed > 1:
                raise InputError(
                    f"{where}: completion: {max(opened, closed)} times thinking ({opening} ... {closing}): keep one, "
                    "before the answer"
                )
            if opened > closed:
                raise InputError(
                    f"{where}: completion: the thinking is not closed: write {closing} before the answer, or "
                    "drop the row"
                )
            if closed > opened:
                raise InputError(f"{where}: completion: {closing} closes thinking that {opening} does not open: add it")


ANY = Thinking()
"""Of texts of which nothing else is known."""


def part_of(values: Sequence[float], thinking: int) -> dict[str, Sequence[float]]:
    """The values of the tokens of each part that a trace has.

    Args:
        values: T token values.
        thinking: number of leading tokens that are thinking.
    """
    parts = zip(PARTS, (values[:thinking], values[thinking:]), strict=True)
    return {name: of_part for name, of_part in parts if len(of_part)}


def weights_of(parts: Sequence[str], weight: float) -> dict[str, float]:
    """What each part of a trace weighs in its reward; they sum to 1.

    Args:
        parts: those that the trace has.
        weight: of the thinking, in [0, 1]; the answer has the rest. A trace with one part has that part's reward.
    """
    given = {"thinking": weight, "answer": 1 - weight}
    if len(parts) == 1:
        return {check_choice("part", parts[0], PARTS): 1.0}
    return {name: given[name] for name in parts}
