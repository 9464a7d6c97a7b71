"""World ``word-problems``: grade-school stories with worked solutions, for a pretrained language model.

A problem is one of `STORIES` with names, things and numbers of its own; each line of the solution is one sentence with
one calculation, in one of two wordings, and the last line states the answer::

    prompt      "Question: Ann buys 3 boxes with 12 pens each. ... How many pens does Ann have left?\\nEnd with ..."
    completion  "3 boxes hold 3 * 12 = 36 pens.\\n...\\n#### 31"
    answer      "31"

`draw_new` tells `NEW_STORIES`, which no demonstration has. The problems are our own; their form is that of GSM8K.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

NAMES = ("Ann", "Ben", "Carla", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Leon")
THINGS = ("pens", "apples", "books", "marbles", "stickers", "cards", "shells", "cookies", "stamps", "candles")


@dataclass(frozen=True)
class Story:
    """Templates with the names of numbers, of three people ``one``, ``two`` and ``three``, and of ``things``.

    Attributes:
        ranges: fewest and most of each number that is drawn.
        results: number that is worked out -> its calculation, in the order of the lines; the last is the answer.
        question: the story.
        lines: two wordings of each line, in which ``{}`` is the calculation.
        totals: number that the story gives but that is worked out from those drawn.
    """

    ranges: dict[str, tuple[int, int]]
    results: dict[str, str]
    question: str
    lines: tuple[tuple[str, str], ...]
    totals: dict[str, Callable[[dict[str, int]], int]]

    def tell(self, rng: random.Random) -> tuple[str, list[str], int]:
        """The question, the lines of its solution, and the answer."""
        numbers = {name: rng.randint(*limits) for name, limits in self.ranges.items()}
        for name, total in self.totals.items():
            numbers[name] = total(numbers)
        people = dict(zip(("one", "two", "three"), rng.sample(NAMES, 3), strict=True))
        words = {**people, "things": rng.choice(THINGS)}
        question = self.question.format(**words, **numbers)
        written, answer = [], 0
        for (name, calculation), wordings in zip(self.results.items(), self.lines, strict=True):
            left, operator, right = calculation.split(" ")
            numbers[name] = answer = _work(numbers[left], operator, numbers[right])
            worked = f"{numbers[left]} {operator} {numbers[right]} = {answer}"
            written.append(rng.choice(wordings).format(worked, **words, **numbers))
        return question, written, answer


def _work(left: int, operator: str, right: int) -> int:
    if operator == "/":
        assert left % right == 0
        return left // right
    return left * right if operator == "*" else left + right if operator == "+" else left - right


def _story(
    question: str,
    ranges: dict[str, tuple[int, int]],
    *lines: tuple[str, str, str, str],
    **totals: Callable[[dict[str, int]], int],
) -> Story:
    """Each line is the name of its result, the calculation, and two wordings."""
    results = {name: calculation for name, calculation, *_ in lines}
    return Story(ranges, results, question, tuple((one, two) for *_, one, two in lines), totals)


STORIES: tuple[Story, ...] = (
    _story(
        "{one} buys {boxes} boxes with {each} {things} each. Then {one} gives away {gone} {things}. How many {things} "
        "does {one} have left?",
        {"boxes": (4, 9), "each": (6, 15), "gone": (5, 22)},
        ("all", "boxes * each", "{boxes} boxes hold {} {things}.", "{one} buys {} {things}."),
        ("left", "all - gone", "After giving away {gone} there are {} {things}.", "{one} has {} {things} left."),
    ),
    _story(
        "{one} earns {rate} dollars an hour and works {hours} hours. {two} earns {pay} dollars an hour and works "
        "{time} hours. How many dollars do they earn together?",
        {"rate": (8, 19), "hours": (3, 9), "pay": (8, 19), "time": (3, 9)},
        ("first", "rate * hours", "{one} earns {} dollars.", "For {one} it is {} dollars."),
        ("second", "pay * time", "{two} earns {} dollars.", "For {two} it is {} dollars."),
        ("both", "first + second", "Together they earn {} dollars.", "The sum is {} dollars."),
    ),
    _story(
        "{one} has {own} {things}. {two} has {times} times as many {things} as {one}. {three} has {more} {things} more "
        "than {two}. How many {things} does {three} have?",
        {"own": (7, 29), "times": (2, 6), "more": (4, 25)},
        ("second", "own * times", "{two} has {} {things}.", "Of {things}, {two} has {}."),
        ("third", "second + more", "{three} has {} {things}.", "{three} has {more} more: {}."),
    ),
    _story(
        "{one} buys {count} {things} at {price} dollars each and a bag for {bag} dollars, and pays with {money} "
        "dollars. How many dollars does {one} get back?",
        {"count": (4, 12), "price": (3, 9), "bag": (6, 29)},
        ("cost", "count * price", "The {things} cost {} dollars.", "{count} {things} cost {}."),
        ("all", "cost + bag", "With the bag it is {} dollars.", "All costs {} dollars."),
        ("back", "money - all", "{one} gets back {} dollars.", "The change is {} dollars."),
        money=lambda n: ((n["count"] * n["price"] + n["bag"]) // 50 + 1) * 50,
    ),
    _story(
        "{one} reads {pages} pages a day for {days} days, then {more} pages a day for {time} days. After that, {rest} "
        "pages of the book are left. How many pages does the book have?",
        {"pages": (11, 29), "days": (4, 9), "more": (11, 29), "time": (2, 5), "rest": (15, 90)},
        ("first", "pages * days", "In the first days it is {} pages.", "First, {} pages."),
        ("second", "more * time", "After that it is {} pages.", "Then, {} pages."),
        ("read", "first + second", "That is {} pages.", "So far {}."),
        ("all", "read + rest", "The book has {} pages.", "With the rest it is {} pages."),
    ),
    _story(
        "{one} has {all} {things}, keeps {kept} of them and shares the rest equally among {friends} friends. How many "
        "{things} does each friend get?",
        {"friends": (3, 9), "each": (6, 19), "kept": (5, 20)},
        ("shared", "all - kept", "{one} shares {} {things}.", "To share there are {} {things}."),
        ("get", "shared / friends", "Each friend gets {} {things}.", "That is {} each."),
        all=lambda n: n["friends"] * n["each"] + n["kept"],
    ),
    _story(
        "{one} saves {weekly} dollars a week for {weeks} weeks, gets {gift} dollars as a gift and spends {spent} "
        "dollars. How many dollars does {one} have?",
        {"weekly": (11, 29), "weeks": (4, 9), "gift": (15, 60), "spent": (12, 50)},
        ("saved", "weekly * weeks", "In {weeks} weeks it is {} dollars.", "{one} saves {}."),
        ("with", "saved + gift", "With the gift it is {} dollars.", "The gift makes {}."),
        ("left", "with - spent", "{one} has {} dollars.", "After spending there are {} dollars."),
    ),
    _story(
        "{one} plants {rows} rows of {each} tomato plants. {dead} plants die. Each of the others bears {fruits} "
        "tomatoes. How many tomatoes are there?",
        {"rows": (4, 9), "each": (11, 25), "dead": (6, 30), "fruits": (2, 5)},
        ("planted", "rows * each", "{one} plants {} plants.", "There are {} plants at first."),
        ("alive", "planted - dead", "Of these, {} live.", "{} plants are left."),
        ("tomatoes", "alive * fruits", "They bear {} tomatoes.", "That makes {}."),
    ),
    _story(
        "A bus has {start} passengers. At the first stop {on} get on, at the second stop {off} get off, and at the "
        "third stop {again} get on. How many passengers are on the bus now?",
        {"start": (20, 45), "on": (5, 19), "off": (6, 18), "again": (4, 15)},
        ("first", "start + on", "After the first stop there are {}.", "First it is {} passengers."),
        ("second", "first - off", "After the second stop there are {}.", "Then it is {}."),
        ("third", "second + again", "After the third stop there are {}.", "Now there are {} passengers."),
    ),
    _story(
        "{one} bakes {trays} trays of {each} rolls, puts {bag} rolls in a bag and sells each bag for {price} dollars. "
        "How many dollars does {one} earn?",
        {"trays": (4, 9), "bag": (2, 6), "times": (2, 4), "price": (3, 9)},
        ("rolls", "trays * each", "{one} bakes {} rolls.", "There are {} rolls."),
        ("bags", "rolls / bag", "That is {} bags.", "They fill {} bags."),
        ("earned", "bags * price", "{one} earns {} dollars.", "The bags bring {}."),
        each=lambda n: n["bag"] * n["times"],
    ),
    _story(
        "A ticket for an adult costs {full} dollars, one for a child {price} dollars less. What do {adults} adults and "
        "{children} children pay?",
        {"full": (11, 19), "price": (3, 6), "adults": (2, 9), "children": (3, 9)},
        ("paid", "adults * full", "The adults pay {} dollars.", "For adults it is {} dollars."),
        ("less", "full - price", "A child pays {} dollars.", "A ticket for a child costs {} dollars."),
        ("half", "children * less", "The children pay {} dollars.", "For children it is {}."),
        ("sum", "paid + half", "Together they pay {} dollars.", "In all it is {}."),
    ),
)
NEW_STORIES: tuple[Story, ...] = (
    _story(
        "{one} is {age} years old. {two} is {times} times as old as {one}. {three} is {less} years younger than {two}. "
        "How old is {three} in {years} years?",
        {"age": (6, 14), "times": (2, 5), "less": (2, 9), "years": (3, 15)},
        ("second", "age * times", "{two} is {} years old.", "The age of {two} is {}."),
        ("third", "second - less", "{three} is {} years old.", "The age of {three} is {}."),
        ("later", "third + years", "In {years} years {three} is {}.", "After {years} years it is {}."),
    ),
    _story(
        "A shop has {shelves} shelves with {each} {things} on each. {people} customers take {load} {things} each. How "
        "many {things} are still in the shop?",
        {"shelves": (5, 9), "each": (12, 28), "people": (2, 5), "load": (6, 11)},
        ("stored", "shelves * each", "The shelves hold {} {things}.", "There are {} {things}."),
        ("taken", "people * load", "The customers take {} {things}.", "{} {things} are taken."),
        ("left", "stored - taken", "Still there are {} {things}.", "The rest is {}."),
    ),
    _story(
        "{one} rides {speed} kilometers an hour for {hours} hours and then {slow} kilometers an hour for {time} hours. "
        "The whole way is {goal} kilometers. How many kilometers are left?",
        {"speed": (12, 29), "hours": (2, 6), "slow": (5, 11), "time": (2, 6), "rest": (10, 60)},
        ("first", "speed * hours", "First {one} rides {} kilometers.", "It begins with {}."),
        ("second", "slow * time", "Then {one} rides {} kilometers.", "Then come {}."),
        ("done", "first + second", "That is {} kilometers.", "Done are {}."),
        ("left", "goal - done", "There are {} kilometers left.", "What is left is {}."),
        goal=lambda n: n["speed"] * n["hours"] + n["slow"] * n["time"] + n["rest"],
    ),
    _story(
        "At a contest there are {teams} teams of {size} players, and {extra} helpers. Everyone gets a lunch for "
        "{price} dollars. What do all lunches cost?",
        {"teams": (4, 9), "size": (6, 15), "extra": (5, 20), "price": (2, 6)},
        ("players", "teams * size", "There are {} players.", "The teams have {} players."),
        ("people", "players + extra", "With helpers there are {} people.", "{} people eat."),
        ("cost", "people * price", "The lunches cost {} dollars.", "All pay {}."),
    ),
)
"""Of test questions alone."""


def draw(rng: random.Random, mistake_rate: float = 0.0) -> dict:
    """One problem; its solution is always right."""
    return _row(rng, STORIES)


def draw_new(rng: random.Random, mistake_rate: float = 0.0) -> dict:
    """One problem with a story that no demonstration has."""
    return _row(rng, NEW_STORIES)


def _row(rng: random.Random, stories: tuple[Story, ...]) -> dict:
    question, lines, answer = rng.choice(stories).tell(rng)
    return {
        "prompt": f"Question: {question}\nEnd with #### and the number.\nAnswer:\n",
        "completion": "\n".join([*lines, f"#### {answer}"]),
        "answer": str(answer),
    }
