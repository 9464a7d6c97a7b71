"""World ``word-problems``: grade-school word problems with worked solutions, for a pretrained language model.

A problem is one of the templates `STORIES`, filled with sampled names, things and numbers. Each line of the solution is
one sentence with one calculation, in one of two wordings; the last line states the answer::

    prompt      "Question: Ann buys 3 boxes with 12 pens each. ... How many pens does Ann have left?\nEnd with ..."
    completion  "3 boxes hold 3 * 12 = 36 pens.\n...\n#### 31"
    answer      "31"

`sample_unseen` uses `NEW_STORIES`, which are in no demonstration. The problems are our own, in the format of GSM8K.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

NAMES = ("Ann", "Ben", "Carla", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Leon")
THINGS = ("pens", "apples", "books", "marbles", "stickers", "cards", "shells", "cookies", "stamps", "candles")


Line = tuple[str, str, str, str]
"""Name of the result, its calculation, and two wordings in which ``{}`` is the worked calculation."""


@dataclass(frozen=True, kw_only=True)
class Story:
    """Template of a problem; its placeholders are numbers, ``one``, ``two`` and ``three`` (people), and ``things``.

    Attributes:
        question: text of the problem.
        ranges: smallest and largest value of each sampled number.
        lines: lines of the solution; the result of the last one is the answer.
        totals: numbers in the question that are computed from the sampled ones.
    """

    question: str
    ranges: dict[str, tuple[int, int]]
    lines: tuple[Line, ...]
    totals: dict[str, Callable[[dict[str, int]], int]] = field(default_factory=dict)

    def fill(self, rng: random.Random) -> tuple[str, list[str], int]:
        """Sample numbers, names and wordings; return the question, the lines of its solution, and the answer."""
        numbers = {name: rng.randint(*limits) for name, limits in self.ranges.items()}
        for name, total in self.totals.items():
            numbers[name] = total(numbers)
        people = dict(zip(("one", "two", "three"), rng.sample(NAMES, 3), strict=True))
        words = {**people, "things": rng.choice(THINGS)}
        question = self.question.format(**words, **numbers)
        written, answer = [], 0
        for name, calculation, *wordings in self.lines:
            left, operator, right = calculation.split(" ")
            numbers[name] = answer = _calculate(numbers[left], operator, numbers[right])
            worked = f"{numbers[left]} {operator} {numbers[right]} = {answer}"
            written.append(rng.choice(wordings).format(worked, **words, **numbers))
        return question, written, answer


def _calculate(left: int, operator: str, right: int) -> int:
    if operator == "/":
        assert left % right == 0
        return left // right
    return left * right if operator == "*" else left + right if operator == "+" else left - right


# A table: its entries look alike on purpose.
STORIES: tuple[Story, ...] = (
    Story(
        question="{one} buys {boxes} boxes with {each} {things} each. Then {one} gives away {gone} {things}. How many "
        "{things} does {one} have left?",
        ranges={"boxes": (4, 9), "each": (6, 15), "gone": (5, 22)},
        lines=(
            ("all", "boxes * each", "{boxes} boxes hold {} {things}.", "{one} buys {} {things}."),
            ("left", "all - gone", "After giving away {gone} there are {} {things}.", "{one} has {} {things} left."),
        ),
    ),
    Story(
        question="{one} earns {rate} dollars an hour and works {hours} hours. {two} earns {pay} dollars an hour and "
        "works {time} hours. How many dollars do they earn together?",
        ranges={"rate": (8, 19), "hours": (3, 9), "pay": (8, 19), "time": (3, 9)},
        lines=(
            ("first", "rate * hours", "{one} earns {} dollars.", "For {one} it is {} dollars."),
            ("second", "pay * time", "{two} earns {} dollars.", "For {two} it is {} dollars."),
            ("both", "first + second", "Together they earn {} dollars.", "The sum is {} dollars."),
        ),
    ),
    Story(
        question="{one} has {own} {things}. {two} has {times} times as many {things} as {one}. {three} has {more} "
        "{things} more than {two}. How many {things} does {three} have?",
        ranges={"own": (7, 29), "times": (2, 6), "more": (4, 25)},
        lines=(
            ("second", "own * times", "{two} has {} {things}.", "Of {things}, {two} has {}."),
            ("third", "second + more", "{three} has {} {things}.", "{three} has {more} more: {}."),
        ),
    ),
    Story(
        question="{one} buys {count} {things} at {price} dollars each and a bag for {bag} dollars, and pays with "
        "{money} dollars. How many dollars does {one} get back?",
        ranges={"count": (4, 12), "price": (3, 9), "bag": (6, 29)},
        lines=(
            ("cost", "count * price", "The {things} cost {} dollars.", "{count} {things} cost {}."),
            ("all", "cost + bag", "With the bag it is {} dollars.", "All costs {} dollars."),
            ("back", "money - all", "{one} gets back {} dollars.", "The change is {} dollars."),
        ),
        totals={"money": lambda n: ((n["count"] * n["price"] + n["bag"]) // 50 + 1) * 50},
    ),
    Story(
        question="{one} reads {pages} pages a day for {days} days, then {more} pages a day for {time} days. After "
        "that, {rest} pages of the book are left. How many pages does the book have?",
        ranges={"pages": (11, 29), "days": (4, 9), "more": (11, 29), "time": (2, 5), "rest": (15, 90)},
        lines=(
            ("first", "pages * days", "In the first days it is {} pages.", "First, {} pages."),
            ("second", "more * time", "After that it is {} pages.", "Then, {} pages."),
            ("read", "first + second", "That is {} pages.", "So far {}."),
            ("all", "read + rest", "The book has {} pages.", "With the rest it is {} pages."),
        ),
    ),
    Story(
        question="{one} has {all} {things}, keeps {kept} of them and shares the rest equally among {friends} friends. "
        "How many {things} does each friend get?",
        ranges={"friends": (3, 9), "each": (6, 19), "kept": (5, 20)},
        lines=(
            ("shared", "all - kept", "{one} shares {} {things}.", "To share there are {} {things}."),
            ("get", "shared / friends", "Each friend gets {} {things}.", "That is {} each."),
        ),
        totals={"all": lambda n: n["friends"] * n["each"] + n["kept"]},
    ),
    Story(
        question="{one} saves {weekly} dollars a week for {weeks} weeks, gets {gift} dollars as a gift and spends "
        "{spent} dollars. How many dollars does {one} have?",
        ranges={"weekly": (11, 29), "weeks": (4, 9), "gift": (15, 60), "spent": (12, 50)},
        lines=(
            ("saved", "weekly * weeks", "In {weeks} weeks it is {} dollars.", "{one} saves {}."),
            ("with", "saved + gift", "With the gift it is {} dollars.", "The gift makes {}."),
            ("left", "with - spent", "{one} has {} dollars.", "After spending there are {} dollars."),
        ),
    ),
    Story(
        question="{one} plants {rows} rows of {each} tomato plants. {dead} plants die. Each of the others bears "
        "{fruits} tomatoes. How many tomatoes are there?",
        ranges={"rows": (4, 9), "each": (11, 25), "dead": (6, 30), "fruits": (2, 5)},
        lines=(
            ("planted", "rows * each", "{one} plants {} plants.", "There are {} plants at first."),
            ("alive", "planted - dead", "Of these, {} live.", "{} plants are left."),
            ("tomatoes", "alive * fruits", "They bear {} tomatoes.", "That makes {}."),
        ),
    ),
    Story(
        question="A bus has {start} passengers. At the first stop {on} get on, at the second stop {off} get off, and "
        "at the third stop {again} get on. How many passengers are on the bus now?",
        ranges={"start": (20, 45), "on": (5, 19), "off": (6, 18), "again": (4, 15)},
        lines=(
            ("first", "start + on", "After the first stop there are {}.", "First it is {} passengers."),
            ("second", "first - off", "After the second stop there are {}.", "Then it is {}."),
            ("third", "second + again", "After the third stop there are {}.", "Now there are {} passengers."),
        ),
    ),
    Story(
        question="{one} bakes {trays} trays of {each} rolls, puts {bag} rolls in a bag and sells each bag for {price} "
        "dollars. How many dollars does {one} earn?",
        ranges={"trays": (4, 9), "bag": (2, 6), "times": (2, 4), "price": (3, 9)},
        lines=(
            ("rolls", "trays * each", "{one} bakes {} rolls.", "There are {} rolls."),
            ("bags", "rolls / bag", "That is {} bags.", "They fill {} bags."),
            ("earned", "bags * price", "{one} earns {} dollars.", "The bags bring {}."),
        ),
        totals={"each": lambda n: n["bag"] * n["times"]},
    ),
    Story(
        question="A ticket for an adult costs {full} dollars, one for a child {price} dollars less. What do {adults} "
        "adults and {children} children pay?",
        ranges={"full": (11, 19), "price": (3, 6), "adults": (2, 9), "children": (3, 9)},
        lines=(
            ("paid", "adults * full", "The adults pay {} dollars.", "For adults it is {} dollars."),
            ("less", "full - price", "A child pays {} dollars.", "A ticket for a child costs {} dollars."),
            ("half", "children * less", "The children pay {} dollars.", "For children it is {}."),
            ("sum", "paid + half", "Together they pay {} dollars.", "In all it is {}."),
        ),
    ),
)
NEW_STORIES: tuple[Story, ...] = (
    Story(
        question="{one} is {age} years old. {two} is {times} times as old as {one}. {three} is {less} years younger "
        "than {two}. How old is {three} in {years} years?",
        ranges={"age": (6, 14), "times": (2, 5), "less": (2, 9), "years": (3, 15)},
        lines=(
            ("second", "age * times", "{two} is {} years old.", "The age of {two} is {}."),
            ("third", "second - less", "{three} is {} years old.", "The age of {three} is {}."),
            ("later", "third + years", "In {years} years {three} is {}.", "After {years} years it is {}."),
        ),
    ),
    Story(
        question="A shop has {shelves} shelves with {each} {things} on each. {people} customers take {load} {things} "
        "each. How many {things} are still in the shop?",
        ranges={"shelves": (5, 9), "each": (12, 28), "people": (2, 5), "load": (6, 11)},
        lines=(
            ("stored", "shelves * each", "The shelves hold {} {things}.", "There are {} {things}."),
            ("taken", "people * load", "The customers take {} {things}.", "{} {things} are taken."),
            ("left", "stored - taken", "Still there are {} {things}.", "The rest is {}."),
        ),
    ),
    Story(
        question="{one} rides {speed} kilometers an hour for {hours} hours and then {slow} kilometers an hour for "
        "{time} hours. The whole way is {goal} kilometers. How many kilometers are left?",
        ranges={"speed": (12, 29), "hours": (2, 6), "slow": (5, 11), "time": (2, 6), "rest": (10, 60)},
        lines=(
            ("first", "speed * hours", "First {one} rides {} kilometers.", "It begins with {}."),
            ("second", "slow * time", "Then {one} rides {} kilometers.", "Then come {}."),
            ("done", "first + second", "That is {} kilometers.", "Done are {}."),
            ("left", "goal - done", "There are {} kilometers left.", "What is left is {}."),
        ),
        totals={"goal": lambda n: n["speed"] * n["hours"] + n["slow"] * n["time"] + n["rest"]},
    ),
    Story(
        question="At a contest there are {teams} teams of {size} players, and {extra} helpers. Everyone gets a lunch "
        "for {price} dollars. What do all lunches cost?",
        ranges={"teams": (4, 9), "size": (6, 15), "extra": (5, 20), "price": (2, 6)},
        lines=(
            ("players", "teams * size", "There are {} players.", "The teams have {} players."),
            ("people", "players + extra", "With helpers there are {} people.", "{} people eat."),
            ("cost", "people * price", "The lunches cost {} dollars.", "All pay {}."),
        ),
    ),
)
"""Used in test questions only."""


def sample(rng: random.Random, mistake_rate: float = 0.0) -> dict:
    """Sample one problem; its solution is always correct."""
    return _row(rng, STORIES)


def sample_unseen(rng: random.Random, mistake_rate: float = 0.0) -> dict:
    """Sample one problem from a template that no demonstration uses."""
    return _row(rng, NEW_STORIES)


def _row(rng: random.Random, stories: tuple[Story, ...]) -> dict:
    question, lines, answer = rng.choice(stories).fill(rng)
    return {
        "prompt": f"Question: {question}\nEnd with #### and the number.\nAnswer:\n",
        "completion": "\n".join([*lines, f"#### {answer}"]),
        "answer": str(answer),
    }
