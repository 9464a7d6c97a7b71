"""Dataclasses of options: their allowed values, which are checked, their fields and their defaults."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from tracereward.errors import InputError, check_choice


@dataclass(frozen=True)
class OneOf:
    """Allowed names of an option."""

    names: tuple[str, ...]

    def check(self, option: str, value: Any) -> None:
        """Raise `InputError` with the nearest allowed name."""
        check_choice(option, value, self.names)


@dataclass(frozen=True, kw_only=True)
class Range:
    """Allowed numbers of an option; never nan or infinite.

    Attributes:
        min: inclusive lower bound.
        above: exclusive lower bound.
        max: inclusive upper bound.
        below: exclusive upper bound.
        whole: integers only.
        why: reason, for the message.
    """

    min: float | None = None
    above: float | None = None
    max: float | None = None
    below: float | None = None
    whole: bool = False
    why: str = ""

    def check(self, option: str, value: Any) -> None:
        """Raise `InputError` with the allowed range."""
        if (
            isinstance(value, int if self.whole else (int, float))
            and math.isfinite(value)
            and (self.min is None or value >= self.min)
            and (self.above is None or value > self.above)
            and (self.max is None or value <= self.max)
            and (self.below is None or value < self.below)
        ):
            return
        limits = (("at least", self.min), ("more than", self.above), ("at most", self.max), ("less than", self.below))
        text = " and ".join(f"{words} {limit}" for words, limit in limits if limit is not None)
        number = "a whole number of " if self.whole else ""
        if self.min is not None and self.max is not None:
            text = f"between {self.min} and {self.max}"
            number = number.removesuffix("of ")
        raise InputError(f"{option} must be {number}{text}, not {value}" + (f": {self.why}" if self.why else ""))


def check_options(options: Any, ranges: Mapping[str, Range | OneOf] | None = None) -> None:
    """Check all options that are set against their annotations.

    Args:
        options: a dataclass.
        ranges: additional ranges by field name, for another library's fields; unknown names are ignored.

    Raises:
        InputError: names the option and the allowed values.
    """
    rules: dict[str, list[Any]] = {name: [limits] for name, limits in (ranges or {}).items()}
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        if get_origin(hint) is Annotated:
            rules[name] = [rule for rule in get_args(hint)[1:] if isinstance(rule, OneOf | Range)]
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        for rule in rules.get(option.name, ()):
            if value is not None:
                rule.check(option.name, value)


def check_types(options: Any) -> None:
    """Check that switches, texts, lists and mappings have the types of their annotations; numbers have a `Range`.

    Raises:
        InputError: names the option and the type.
    """
    for name, hint in get_type_hints(type(options)).items():
        kinds = {get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,))}
        named = {bool: "True or False", str: "a text", list: "a list", dict: "a dict"}
        value, wanted = getattr(options, name), [words for kind, words in named.items() if kind in kinds]
        if wanted and not isinstance(value, tuple(kinds)):
            raise InputError(f"{name} must be {' or '.join(wanted)}, not {value!r}")


def own_fields(group: type) -> list[dataclasses.Field]:
    """The options that a class declares itself."""
    own = vars(group).get("__annotations__", {})
    return [option for option in dataclasses.fields(group) if option.name in own]


def option_defaults(*classes: type) -> dict[str, Any]:
    """The default of every option of these dataclasses."""
    return {
        option.name: option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
        for cls in classes
        for option in dataclasses.fields(cls)
    }
