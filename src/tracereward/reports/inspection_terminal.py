"""`tracereward inspect` in the terminal: the content of the `inspection` page, one line per step."""

from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tracereward.errors import check_choice
from tracereward.reports.inspection import about_marks, colour_limit, questions_of, scored
from tracereward.reports.plots import signed
from tracereward.rewards.heatmap import reward_colour

COLOURS: dict[str, dict[str, Any]] = {
    "auto": {},  # rich detects the terminal and NO_COLOR
    "never": {"color_system": None},
    "256": {"color_system": "256", "force_terminal": True, "no_color": False},
    "truecolor": {"color_system": "truecolor", "force_terminal": True, "no_color": False},
}
_MARK = "!"  # marks the suspected first error
_SIGNS = {"z": "·", "e": "■", "m": "↵"}  # for the kinds of tokens, see `inspection`


def print_ansi(
    traces: Iterable[dict[str, Any]],
    file: TextIO,
    *,
    width: int | None = None,
    colour: str = "auto",
    threshold: float | None = None,
) -> None:
    """Print scored traces to a terminal: one line per step, with coloured tokens and the step's reward at the right.

    Args:
        traces: as for `inspection.contents`.
        file: the output, e.g. ``sys.stdout``.
        width: columns; the terminal's if None.
        colour: one of `COLOURS`. "auto" uses what the terminal supports, and no colours if `file` is not a terminal or
            ``NO_COLOR`` is set; "truecolor" and "256" also colour a file or a pipe; "never" uses no colours.
        threshold: as for `inspection.contents`; the suspected step has a ``!`` at both ends of its line.

    Raises:
        InputError: as for `inspection.contents`, or the `colour` is unknown.
    """
    options = COLOURS[check_choice("colour", colour, COLOURS)]
    questions = questions_of(traces, threshold)
    shown = [trace for question in questions for trace in question["traces"]]
    limit = colour_limit(piece[1] for trace in shown for piece in scored(trace))
    console = Console(file=file, width=width, highlight=False, markup=False, emoji=False, **options)
    scale = Text("reward in log-odds ")
    for i in range(-4, 5):
        edge = f" {signed(i * limit / 4)} " if abs(i) == 4 else "  "
        scale.append(edge, _style(i * limit / 4, limit))
    console.print(scale)
    console.print(Text(f"{_MARK} {about_marks(any(trace['ruled'] for trace in shown), threshold)}"))
    for number, question in enumerate(questions, 1):
        console.print(Text(f"\nQuestion {number} of {len(questions)}", "bold"))
        console.print(Text(question["prompt"].strip()))
        if question["answer"] is not None:
            console.print(Text(f"right answer {question['answer']}"))
        for trace in question["traces"]:
            console.print(Text("\n" + _facts(trace, question), "bold"))
            rows = Table.grid(padding=(0, 1, 0, 0), expand=True)
            rows.add_column(width=1)
            rows.add_column(justify="right")
            rows.add_column(ratio=1, overflow="fold")
            rows.add_column(justify="right", no_wrap=True)
            rows.add_column(width=1)
            for i, step in enumerate(trace["steps"]):
                mark = _MARK if i == trace["error"] else ""
                reward = Text("–" if step["reward"] is None else signed(step["reward"]), _style(step["reward"], limit))
                rows.add_row(mark, str(i + 1), _step_text(step, limit), reward, mark)
            console.print(rows)


def _style(reward: float | None, limit: float) -> str:
    """Dark text on the light palette, readable on both light and dark terminals."""
    return f"#1d2126 on {reward_colour(0.0 if reward is None else reward, limit)}"


def _facts(trace: dict[str, Any], question: dict[str, Any]) -> str:
    facts = [f"#{trace['number']} of {len(question['traces']) + question['not_shown']}"]
    if trace["correct"] is not None:
        facts.append("✓ right" if trace["correct"] else "✗ wrong")
    facts += [f"{name} {trace[name]}" for name in ("answer", "model") if trace[name] is not None]
    facts += [f"{name} {signed(trace[name])}" for name in ("reward", "logprob") if trace[name] is not None]
    facts += [f"{name} {signed(value)}" for name, value in trace["parts"].items() if value is not None]
    return "  ".join(facts)


def _step_text(step: dict[str, Any], limit: float) -> Text:
    line = Text()
    for text, *token in step["tokens"]:
        if not token:
            line.append(text)
            continue
        reward, kinds = token
        line.append(text + "".join(_SIGNS.get(kind, "") for kind in kinds), _style(reward, limit))
    return line
