"""Chains of operations as text, shared by the arithmetic worlds."""

# (value, operator, operand, result as written)
Line = tuple[int, str, int, int]

LARGEST = 40
"""Largest number in the vocabulary."""


def apply(value: int, operator: str, operand: int) -> int:
    """Result of one operation, + - or *."""
    return value + operand if operator == "+" else value - operand if operator == "-" else value * operand


def prompt(start: int, operations: list[tuple[str, int]]) -> str:
    r"""The question: ``"23 - 7 + 5 = ?\n"``."""
    return str(start) + "".join(f" {operator} {operand}" for operator, operand in operations) + " = ?\n"


def row(start: int, lines: list[Line], working: bool, answer: int) -> dict:
    """One problem solved line by line or, without `working`, with the result of the last line only."""
    steps = [f"{value} {operator} {operand} = {result}" for value, operator, operand, result in lines]
    return {
        "prompt": prompt(start, [(operator, operand) for _, operator, operand, _ in lines]),
        "completion": "\n".join([*(steps if working else []), f"#### {lines[-1][3]}"]),
        "answer": str(answer),
    }
