"""A probe for leaks: do surface features alone distinguish experts from rollouts, without the reasoning?

A discriminator finds what the probe finds, and earlier than it finds errors: the policy is then rewarded for, say, a
line ending that only experts have. Equal texts may still differ as tokens: a ``<think>`` that is one token in rollouts
and five letters in experts, or another end of sequence. The probe therefore reads both.
"""

import math
import re
import string
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from tracereward.metrics import auroc

# Experts are better than the policy and therefore a little longer or tidier: 0.6 is common and harmless. Above 0.7,
# surface features order seven of ten pairs, and explain much of the discriminator's loss.
LEAK_BOUND = 0.7
FOLDS = 5  # each model sees 80 % of the prompts
# Of each class. With fewer, the standard error of the AUROC is above 0.11, so the bound is within two of them.
MIN_TRACES = 10
# Features are named if their standardised coefficient is above this share of the largest.
NAMED_SHARE = 0.25
MAX_NAMED = 3  # so that the warning stays one sentence
# A token is a feature if this share of the traces has it at its place, the classes weighted equally: few are, and a
# token that all experts have and no rollout has a share of 0.5.
COMMON_SHARE = 0.05
SEED = 0  # of the folds: the same traces give the same figure

LABELS = {
    "characters": "length in characters",
    "words": "number of words",
    "lines": "number of lines",
    "digits": "number of digits",
    "punctuation": "number of punctuation marks",
    "capitals": "number of capital letters",
    "non_ascii": "number of non-ASCII characters",
    "calculator_marks": "number of calculator marks",
    "white_space_share": "share of white space",
    "double_spaces": "number of double spaces",
    "leading_white_space": "leading white space",
    "trailing_white_space": "trailing white space",
    "ends_with_punctuation": "share with punctuation at the end",
    "finished": "share with an end-of-sequence token",
}


@dataclass(frozen=True)
class TraceText:
    """Input of the probe.

    Attributes:
        prompt: any identifier.
        text: the completion.
        finished: whether it has an end-of-sequence token.
        tokens: its tokens as the vocabulary names them, the end of sequence included; empty if they are not compared.
    """

    prompt: str
    text: str
    finished: bool
    tokens: Sequence[str] = ()


@dataclass(frozen=True)
class Feature:
    """A feature that separates: its standardised coefficient (positive if higher in experts) and its own AUROC."""

    name: str
    coefficient: float
    auroc: float


@dataclass(frozen=True)
class Probe:
    """Result of the probe.

    Attributes:
        auroc: of held-out scores; nan if there were too few traces. Chance is 0.5; a little under it is noise too.
        features: those most responsible, the largest coefficient first.
        n: number of traces.
    """

    auroc: float
    features: tuple[Feature, ...]
    n: int

    @property
    def row(self) -> dict[str, float | list[str]]:
        """For a row of ``metrics.jsonl``."""
        return {"surface/auroc": self.auroc, "surface/features": [feature.name for feature in self.features]}


def surface_features(text: str, finished: bool) -> dict[str, float]:
    """Surface features of one completion; the keys are those of `LABELS`.

    Leading and trailing white space are counted in characters and excluded from all other features, so that each leak
    has its own feature. `double_spaces` counts runs of two or more spaces, `calculator_marks` counts ``<<``.
    """
    body = text.strip()
    return {
        "characters": len(body),
        "words": len(body.split()),
        "lines": len(body.splitlines()),
        "digits": sum(character.isdigit() for character in body),
        "punctuation": sum(character in string.punctuation for character in body),
        "capitals": sum(character.isupper() for character in body),
        "non_ascii": sum(not character.isascii() for character in body),
        "calculator_marks": body.count("<<"),
        "white_space_share": sum(character.isspace() for character in body) / max(1, len(body)),
        "double_spaces": len(re.findall("  +", body)),
        "leading_white_space": len(text) - len(text.lstrip()) if body else 0,
        "trailing_white_space": len(text) - len(text.rstrip()),
        "ends_with_punctuation": float(body[-1:] in tuple(string.punctuation)),
        "finished": float(finished),
    }


def token_features(traces: Sequence[TraceText], is_expert: Sequence[bool], special: set[str]) -> dict[str, list[float]]:
    """Whether each trace has a token at a place, for the tokens that are common there; by a label that names both.

    Places are the first token, the last one of the text, the end of sequence, and, for special tokens, anywhere before.

    Args:
        traces: with tokens.
        is_expert: the class of each.
        special: tokens that are no text, or that were added to the vocabulary, such as ``<think>``.
    """
    places: dict[str, list[set[str]]] = {"starts": [], "ends": [], "end": [], "has": []}
    for trace in traces:
        body = list(trace.tokens)
        end = body[-1:] if trace.finished else []
        body = body[: len(body) - len(end)]
        for place, found in zip(places, (body[:1], body[-1:], end, special & set(body))):
            places[place].append(set(found))
    weight = np.where(is_expert, 0.5 / max(1, sum(is_expert)), 0.5 / max(1, len(is_expert) - sum(is_expert)))
    words = {
        "starts": "share that starts with the token",
        "ends": "share whose text ends with the token",
        "end": "share whose end of sequence is the token",
        "has": "share with the token",
    }
    features: dict[str, list[float]] = {}
    for place, sets in places.items():
        for token in sorted(set().union(*sets)):
            has = [float(token in one) for one in sets]
            if COMMON_SHARE <= float(weight @ has) < 1:
                shown = token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")
                features[f"{words[place]} {shown!r}"] = has
    return features


def prompt_folds(is_expert: Sequence[bool], prompts: Sequence[str], folds: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training rows, held-out rows) of each fold; all traces of a prompt are in one fold, and classes are balanced.

    An expert and the rollouts of its prompt have similar content. In different folds, the probe could recognise a
    prompt by its length.
    """
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=SEED)
    return list(splitter.split(np.zeros(len(prompts)), np.asarray(is_expert, dtype=int), np.asarray(prompts)))


def surface_probe(experts: Sequence[TraceText], rollouts: Sequence[TraceText], special: Collection[str] = ()) -> Probe:
    """Logistic regression on `surface_features` and `token_features`, scored by the AUROC of its held-out scores.

    Features are standardised, the classes weighted equally, and the folds are those of `prompt_folds`. The features
    that are named, and their coefficients, come from a fit on all traces.

    Args:
        experts: expert traces, usually one a prompt.
        rollouts: the policy's, usually several a prompt, of the same prompts.
        special: see `token_features`.

    Returns:
        `Probe(nan, (), n)` with fewer than `MIN_TRACES` of either, or if either has a single prompt.
    """
    traces = [*experts, *rollouts]
    is_expert = [True] * len(experts) + [False] * len(rollouts)
    prompts = [trace.prompt for trace in traces]
    folds = min(FOLDS, len({trace.prompt for trace in experts}), len({trace.prompt for trace in rollouts}))
    if min(len(experts), len(rollouts)) < MIN_TRACES or folds < 2:
        return Probe(math.nan, (), len(traces))
    by_token = token_features(traces, is_expert, set(special))
    of_text = [list(surface_features(trace.text, trace.finished).values()) for trace in traces]
    x = np.array([[*row, *tokens] for row, *tokens in zip(of_text, *by_token.values(), strict=True)], dtype=float)
    y = np.array(is_expert)
    scores = np.zeros(len(traces))
    for train, held_out in prompt_folds(is_expert, prompts, folds):
        if len(set(y[train])) < 2:  # all prompts of one class can be in the held-out fold
            return Probe(math.nan, (), len(traces))
        scores[held_out] = probe_model().fit(x[train], y[train]).decision_function(x[held_out])
    coefficients = probe_model().fit(x, y).named_steps["logisticregression"].coef_[0]
    responsible = _responsible([*LABELS, *by_token], x, is_expert, coefficients)
    return Probe(auroc(scores.tolist(), is_expert), responsible, len(traces))


def leak_warning(probe: Probe, others: str = "rollouts", *, mine: str = "experts") -> str | None:
    """One sentence if the probe is above `LEAK_BOUND`, with the features that reveal the first class; else None.

    Args:
        probe: of two classes of traces.
        others: what the second is called.
        mine: what the first is called.
    """
    if not probe.auroc > LEAK_BOUND:  # nan is not
        return None
    named = "; ".join(
        f"{LABELS.get(feature.name, feature.name)} {'higher' if feature.coefficient > 0 else 'lower'}, "
        f"AUROC {feature.auroc:.2f} alone"
        for feature in probe.features
    )
    return f"surface features alone distinguish {mine} from {others} with AUROC {probe.auroc:.2f} (in {mine}: {named})"


def probe_model() -> Pipeline:
    """The probe's classifier, not fitted: logistic regression on standardised features, classes weighted equally."""
    return make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))


def _responsible(
    names: list[str], x: np.ndarray, is_expert: Sequence[bool], coefficients: np.ndarray
) -> tuple[Feature, ...]:
    size = np.abs(coefficients)
    order = [index for index in np.argsort(-size, kind="stable") if size[index] > NAMED_SHARE * size.max()]
    return tuple(
        Feature(names[index], float(coefficients[index]), auroc(x[:, index].tolist(), is_expert))
        for index in order[:MAX_NAMED]
    )
