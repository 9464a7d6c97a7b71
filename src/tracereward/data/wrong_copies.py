"""Wrong copies of a trace for comparison with it: perturbations, and another answer where there is a fixed choice."""

import random
import re
from collections.abc import Sequence

from tracereward.data.perturbations import KINDS as PERTURBATIONS
from tracereward.data.perturbations import perturb
from tracereward.modeling.steps import LINES, StepRule
from tracereward.tasks.recipes import Task

ANSWER = "answer"
KINDS = (*PERTURBATIONS, ANSWER)
_OPPOSITE = {"yes": "no", "no": "yes", "true": "false", "false": "true"}


def wrong_copy(
    text: str,
    prompt: str,
    task: Task,
    rng: random.Random,
    *,
    kinds: Sequence[str] = KINDS,
    rule: StepRule = LINES,
) -> tuple[str, str] | None:
    """A copy with one change that makes it wrong, and the kind of the change; None where no kind applies.

    The kinds are tried in random order: those of `perturb`, and ``answer``, see `other_answer`.

    Args:
        text: the trace.
        prompt: as text, for the options.
        task: reads the answer.
        rng: the same state and arguments give the same result.
        kinds: the kinds to choose from.
        rule: what ends a step.
    """
    for kind in rng.sample(kinds, len(kinds)):
        if kind == ANSWER:
            changed = other_answer(text, prompt, task, rng)
        else:
            found = perturb(text, rng, [kind], rule)
            changed = None if found is None else found.text
        if changed is not None:
            return changed, kind
    return None


def other_answer(text: str, prompt: str, task: Task, rng: random.Random) -> str | None:
    """The trace with another stated answer: another option of the prompt, or no for yes and false for true.

    Only the last place where the answer is written changes. None if the answer is none of these, or if the task would
    not read the new one there.

    Args:
        text: the trace.
        prompt: with its options on lines of their own, ``A. ...``.
        task: reads the answer.
        rng: chooses among options.
    """
    stated = task.extract(text)
    options = re.findall(r"^\(?([A-J])[.):] ", prompt, re.MULTILINE)
    if stated is None:
        return None
    if stated in options:
        wanted = rng.choice([option for option in options if option != stated] or [stated])
        places = list(re.finditer(rf"\b{stated}\b", text))
    elif stated.casefold() in _OPPOSITE:
        words = {"yes": "yes|true", "no": "no|false"}.get(stated.casefold(), re.escape(stated))
        places = list(re.finditer(rf"\b(?:{words})\b", text, re.IGNORECASE))
        wanted = _OPPOSITE[places[-1][0].casefold()] if places else stated
    else:
        return None
    if not places:
        return None
    changed = text[: places[-1].start()] + wanted + text[places[-1].end() :]
    read = task.extract(changed)
    return changed if read is not None and not task.equal(read, stated) else None
