"""Read-outs of logged traces: cross-fitted scores of a pool and what they choose, and scorers without a reward."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from studies.setup.logged_pool import LoggedPool
from tracereward.metrics import auroc, bootstrap_interval, length_matched_auroc
from tracereward.selection import Candidate, fit_vote_temperature, outcomes, ranking_curves
from tracereward.training.label_rules import LabelRule, labels_of
from tracereward.training.loss_weights import balance_weights
from tracereward.training.readout import Examples, Readout, best_readout, cross_fit, fold_numbers
from tracereward.verdict import compared

FOLDS = 5
SEED = 0  # of folds, sampled pairs and random subsets
GOLD = "gold"
"""In place of a label rule: the pool's own labels, an upper line."""
INNER = 5  # folds within the training folds, which choose layers and penalty


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of learning a reward from the pool.

    Attributes:
        experts: ``human``, the questions' own solutions, or ``strongest``, the model most often right on the training
            folds.
        rule: ``positives/negatives``, see `label_rules`, or `GOLD`.
        loss: ``pairwise`` or ``bce``.
        joined: whether the experts' traces are among the positives; rules on agreement have others.
        balance: of `balance_weights`.
        layers: what cross-validation may choose: ``one``, the ``mean`` of all, or ``any`` of these, as in `fit`.
    """

    experts: str = "human"
    rule: str = "agreeing/disagreeing"
    loss: str = "pairwise"
    joined: bool = True
    balance: str = "none"
    layers: str = "one"

    @property
    def name(self) -> str:
        """All that it is in words."""
        parts = [self.experts, self.rule, self.loss]
        parts += [] if self.joined else ["without expert traces"]
        parts += {"one": [], "mean": ["mean of layers"], "any": ["layer or mean"]}[self.layers]
        return ", ".join([*parts, *([] if self.balance == "none" else [f"balanced by {self.balance}"])])


RULES = ("expert/all", "expert/disagreeing", "agreeing/disagreeing")
MAIN = Arm()
"""Its curves are measured."""


def has_solutions(pool: LoggedPool) -> bool:
    """Whether questions have solutions of their own."""
    return bool((pool.models == "").any())


def arms(solutions: bool) -> list[Arm]:
    """The study's arms; without solutions the only experts are the strongest model."""
    who = ("human", "strongest") if solutions else ("strongest",)
    found = [Arm(experts=one, rule=rule, loss=loss) for one in who for rule in RULES for loss in ("pairwise", "bce")]
    found += [Arm(experts=one, joined=False) for one in who]
    found += [Arm(experts=e, joined=j, layers=read) for e in who for j in (True, False) for read in ("mean", "any")]
    found += [Arm(experts=who[0], balance="model")]
    return found + [Arm(experts=who[0], rule=GOLD, loss=loss) for loss in ("pairwise", "bce")]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One outer fold: questions to learn from and questions to test on.

    Attributes:
        train: (N,) bool, the traces of the former, demonstrations included.
        test: (N,) bool, the candidates of the latter.
        accuracy: of each model on the questions to learn from.
    """

    train: np.ndarray
    test: np.ndarray
    accuracy: Mapping[str, float]

    @property
    def ranked(self) -> list[str]:
        """The models, the most accurate first."""
        return sorted(self.accuracy, key=lambda name: (-self.accuracy[name], name))

    def members(self, pool: LoggedPool, which: str) -> np.ndarray:
        """(N,) bool, the candidates of ``all`` models, or of the ``weaker`` half by accuracy."""
        names = self.ranked if which == "all" else self.ranked[len(self.ranked) - len(self.ranked) // 2 :]
        return np.isin(pool.models, names)


def outer_folds(pool: LoggedPool) -> list[Fold]:
    """Folds by question, at random."""
    number = question_folds(pool.asked)
    found = []
    for fold in range(FOLDS):
        test = number[pool.questions] == fold
        found.append(Fold(train=~test, test=test & (pool.models != ""), accuracy=accuracies(pool, ~test)))
    return found


def some_questions(count: int, at_most: int) -> np.ndarray:
    """The numbers of `at_most` of `count` questions, at random."""
    return np.random.default_rng((SEED, at_most)).permutation(count)[:at_most]


def question_folds(count: int) -> np.ndarray:
    """(Q,) the fold that tests on each of Q questions."""
    return np.random.default_rng(SEED).permutation(count) % FOLDS


def accuracies(pool: LoggedPool, train: np.ndarray) -> dict[str, float]:
    """Share of right traces of each model among the traces in `train`, (N,) bool."""
    names = np.unique(pool.models[pool.models != ""])
    return {str(name): float(pool.correct[(pool.models == name) & train].mean()) for name in names}


def labelled(pool: LoggedPool, fold: Fold, arm: Arm) -> tuple[np.ndarray, Examples]:
    """The traces that an arm learns from in a fold: their indices and labels."""
    expert = "" if arm.experts == "human" else fold.ranked[0]
    questions, index = _matched(pool, expert)
    rows: list[tuple[int, bool]] = []
    for question in questions:
        places = [index[id(row)] for row in question.candidates]
        if not fold.train[places[0]]:
            continue
        if arm.rule == GOLD:
            labels: Sequence[bool | None] = [bool(pool.correct[i]) for i in places]
        else:
            positives, negatives = arm.rule.split("/")
            labels = labels_of(question, LabelRule(positives, negatives), pool.task)  # type: ignore[arg-type]
        rows += [(row["index"], True) for row in question.demonstrations if arm.joined]
        rows += [(i, label) for i, label in zip(places, labels, strict=True) if label is not None]
    chosen, labels = np.array([i for i, _ in rows]), [label for _, label in rows]
    numbers, models = pool.questions[chosen], [str(name) or None for name in pool.models[chosen]]
    weights = np.array(balance_weights(labels, numbers.tolist(), models, arm.balance))
    kept = weights > 0
    return chosen[kept], Examples(labels=np.array(labels)[kept], questions=numbers[kept], weights=weights[kept])


@functools.lru_cache(maxsize=8)
def _matched(pool: LoggedPool, expert: str):
    return pool.matched(expert)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The read-out of one fold, and its score of all candidates.

    Attributes:
        readout: layers, penalty and heads.
        scores: (N,) standardised on the training folds; those of a training question are by the inner fold's head that
            has not seen it.
        traces: number of traces learned from.
    """

    readout: Readout
    scores: np.ndarray
    traces: int


def fit_fold(pool: LoggedPool, fold: Fold, arm: Arm, questions: np.ndarray | None = None) -> Fitted:
    """Fit an arm's read-out on a fold's training questions.

    Args:
        pool: the traces.
        fold: the questions to learn from.
        arm: labels and loss.
        questions: learn from these of them only.
    """
    chosen, examples = labelled(pool, fold, arm)
    if questions is not None:
        kept = np.isin(examples.questions, questions)
        chosen, examples = chosen[kept], examples[kept]
    states = pool.states[chosen]
    tried = cross_fit(states, pool.layers, examples, arm.loss, folds=INNER, seed=SEED)
    allowed = [one for one in tried if arm.layers in ("any", "mean" if len(one.layers) > 1 else "one")]
    found = best_readout(allowed, states, pool.layers, examples)
    inner = dict(zip(examples.questions.tolist(), fold_numbers(examples, INNER, SEED).tolist(), strict=True))
    unseen = np.array([inner.get(question, -1) for question in pool.questions.tolist()])
    scores = standardised(_cross_scores(pool, found, unseen), pool, fold)
    return Fitted(readout=found, scores=scores, traces=len(chosen))


def _cross_scores(pool: LoggedPool, found: Readout, unseen: np.ndarray) -> np.ndarray:
    """(N,) scores by the head, or by that of the inner fold in `unseen` where it is not -1."""
    scores = pool.scores(found.layers, found.weight)
    for number, head in enumerate(found.folds):
        here = unseen == number
        scores[here] = pool.scores(found.layers, head)[here]
    return scores


def standardised(values: np.ndarray, pool: LoggedPool, fold: Fold) -> np.ndarray:
    """`values` minus the mean of the training candidates', over their standard deviation."""
    known = values[fold.train & (pool.models != "")]
    return (values - known.mean()) / (known.std() or 1.0)


def free_scores(pool: LoggedPool, fold: Fold) -> dict[str, np.ndarray]:
    """(N,) scores that need no reward: log-prob, shortness, and how often the model is right on the training folds."""
    by_model = np.array([fold.accuracy.get(name, 0.0) for name in pool.models])
    found = {"log-prob": pool.log_probs.astype(float), "shortest": -pool.lengths.astype(float), "which model": by_model}
    return {name: standardised(values, pool, fold) for name, values in found.items()}


def reward_scores(pool: LoggedPool, fold: Fold, fitted: Fitted) -> dict[str, np.ndarray]:
    """(N,) scores that use a reward: alone, with log-prob, and less its model's mean on the training folds."""
    log_prob = free_scores(pool, fold)["log-prob"]
    means = {name: fitted.scores[fold.train & (pool.models == name)].mean() for name in fold.accuracy}
    level = np.array([means.get(name, 0.0) for name in pool.models])
    return {
        "reward": fitted.scores,
        "reward + log-prob": fitted.scores + log_prob,
        "reward - its model's mean": fitted.scores - level,
    }


def candidates_of(pool: LoggedPool, members: np.ndarray, scores: np.ndarray) -> list[list[Candidate]]:
    """The candidates among `members`, by question, with a score as their reward and log-probs as given."""
    groups: dict[int, list[Candidate]] = {}
    for i in np.flatnonzero(members):
        candidate = Candidate(
            text="",
            answer=pool.rows[i].answer,
            reward=float(scores[i]),
            length=int(pool.lengths[i]),
            correct=bool(pool.correct[i]),
            model=str(pool.models[i]),
        )
        groups.setdefault(int(pool.questions[i]), []).append(candidate)
    return [groups[question] for question in sorted(groups)]


Values = dict[str, dict[int, float]]
"""Measure -> question -> value."""


def by_question(pool: LoggedPool, fold: Fold, which: str, scores: np.ndarray, *, tuned: bool = True) -> Values:
    """What a score achieves on each test question of a fold.

    AUROC within the question (where it has right and wrong candidates), whether the best-of-N candidate is right, and
    whether the weighted vote is, untuned and, if `tuned`, with the temperature that is best on the training folds.
    """
    members = fold.members(pool, which)
    equal = equality(pool)
    test = candidates_of(pool, members & fold.test, scores)
    temperature = 1.0
    methods = {"best": "reward", "vote": "vote"}
    if tuned:
        temperature = fit_vote_temperature(candidates_of(pool, members & fold.train, scores), equal)
        methods["tuned vote"] = "softmax_vote"
    numbers = sorted(set(pool.questions[members & fold.test].tolist()))
    values: Values = {
        "auroc": {
            number: auroc([c.reward for c in group], [bool(c.correct) for c in group])
            for number, group in zip(numbers, test, strict=True)
            if len({c.correct for c in group}) == 2
        }
    }
    for name, method in methods.items():
        found = outcomes(test, method, equal, temperature=temperature)
        values[name] = dict(zip(numbers, found, strict=True))
    return values


def scoreless(pool: LoggedPool, fold: Fold, which: str) -> dict[str, dict[int, float]]:
    """Whether each test question is right by majority, at best, and at random."""
    members = fold.members(pool, which) & fold.test
    test = candidates_of(pool, members, np.zeros(len(members)))
    numbers = sorted(set(pool.questions[members].tolist()))
    return {
        method: dict(zip(numbers, outcomes(test, method, equality(pool)), strict=True))
        for method in ("majority", "oracle", "mean")
    }


@functools.lru_cache(maxsize=8)
def equality(pool: LoggedPool):
    """The task's comparison of two answers, remembered."""
    return functools.lru_cache(maxsize=None)(pool.task.equal)


def interval(values: Sequence[float]) -> list[float]:
    """Mean and 95 % bootstrap interval over questions."""
    return [round(value, 5) for value in (float(np.mean(values)), *bootstrap_interval(values))]


def paired(name: str, mine: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """The mean difference on the same questions, with its 95 % interval: of right answers `verdict.compared`'s."""
    shared = sorted(mine.keys() & other.keys())
    ours, theirs = [mine[i] for i in shared], [other[i] for i in shared]
    if name == "auroc":
        return interval([a - b for a, b in zip(ours, theirs, strict=True)])
    one = compared("", ours, theirs)
    return [round(value, 5) for value in (one.difference, one.low, one.high)]


AGAINST = {"auroc": "log-prob", "best": "log-prob", "vote": "majority", "tuned vote": "majority"}
"""What each measure is compared with."""


def summary(values: Values, free: Mapping[str, Values]) -> dict[str, list[float]]:
    """Each measure, and its difference to `AGAINST`; of the tuned vote also that to log-prob's.

    Args:
        values: of a score.
        free: of log-prob, and under ``majority`` of each measure.
    """
    found = {}
    for name, of_measure in values.items():
        found[name] = interval([of_measure[i] for i in sorted(of_measure)])
        found[f"{name} difference"] = paired(name, of_measure, free[AGAINST[name]][name])
    found["tuned vote over log-prob's"] = paired("vote", values["tuned vote"], free["log-prob"]["tuned vote"])
    return found


def merged(parts: Sequence[Values]) -> Values:
    """The values of all folds."""
    return {name: {k: v for part in parts for k, v in part[name].items()} for name in parts[0]}


@dataclass(frozen=True, kw_only=True)
class Free:
    """Values without a reward, for ``all`` models and for the ``weaker`` ones: score -> measure -> question."""

    scores: dict[str, dict[str, Values]]
    methods: dict[str, dict[str, dict[int, float]]]

    def baselines(self, which: str) -> dict[str, Values]:
        """Log-prob's values, and majority's as those of each vote."""
        majority = self.methods[which]["majority"]
        return {**self.scores[which], "majority": {"vote": majority, "tuned vote": majority}}


def measure_free(pool: LoggedPool, folds: Sequence[Fold]) -> Free:
    """All values that need no reward."""
    scores: dict[str, dict[str, Values]] = {}
    methods = {}
    for which in ("all", "weaker"):
        of_folds = [free_scores(pool, fold) for fold in folds]
        scores[which] = {
            name: merged([by_question(pool, fold, which, of[name]) for fold, of in zip(folds, of_folds, strict=True)])
            for name in of_folds[0]
        }
        methods[which] = merged([scoreless(pool, fold, which) for fold in folds])
    return Free(scores=scores, methods=methods)


def matched(pool: LoggedPool, folds: Sequence[Fold], which: str, scores: Sequence[np.ndarray]) -> float:
    """AUROC at matched length of all test candidates."""
    chosen = [fold.members(pool, which) & fold.test for fold in folds]
    joined = np.concatenate([values[here] for values, here in zip(scores, chosen, strict=True)])
    correct = np.concatenate([pool.correct[here] for here in chosen])
    lengths = np.concatenate([pool.lengths[here] for here in chosen])
    return round(length_matched_auroc(joined.tolist(), correct.tolist(), lengths.tolist()), 5)


def free_row(pool: LoggedPool, folds: Sequence[Fold], free: Free) -> dict[str, Any]:
    """The result of all that needs no reward."""
    pools = {}
    for which in ("all", "weaker"):
        of_folds = [free_scores(pool, fold) for fold in folds]
        pools[which] = {
            name: {
                **summary(values, free.baselines(which)),
                "length-matched": matched(pool, folds, which, [of[name] for of in of_folds]),
            }
            for name, values in free.scores[which].items()
        }
        for method, values in free.methods[which].items():
            pools[which][method] = {"best": interval([values[i] for i in sorted(values)])}
    return {"arm": "no reward", "method": "none", "pools": pools}


def arm_row(pool: LoggedPool, folds: Sequence[Fold], free: Free, arm: Arm) -> dict[str, Any]:
    """Fit an arm on all folds and measure it on the questions that each has not seen."""
    fitted = [fit_fold(pool, fold, arm) for fold in folds]
    scores = [reward_scores(pool, fold, one) for fold, one in zip(folds, fitted, strict=True)]
    pools = {}
    for which in ("all", "weaker"):
        pools[which] = {}
        for name in scores[0]:
            values = merged([by_question(pool, fold, which, of[name]) for fold, of in zip(folds, scores, strict=True)])
            pools[which][name] = {
                **summary(values, free.baselines(which)),
                "length-matched": matched(pool, folds, which, [of[name] for of in scores]),
            }
    return {
        "arm": arm.name,
        "method": "readout",
        **asdict(arm),
        "folds": len(folds),
        "traces": int(np.mean([one.traces for one in fitted])),
        "chosen": [[_layers(one.readout), one.readout.penalty] for one in fitted],
        "pools": pools,
    }


def _layers(readout: Readout) -> int | list[int]:
    """Its layer, or the list of them."""
    return readout.layers[0] if len(readout.layers) == 1 else list(readout.layers)


SIZES = (25, 50, 100, 200, 400)
REPEATS = 3


def question_curve(pool: LoggedPool, folds: Sequence[Fold], free: Free, arm: Arm) -> list[dict[str, Any]]:
    """The main measures by the number of questions to learn from, mean over random subsets; see `summary`."""
    points = []
    for size in SIZES:
        runs: list[dict[str, dict[str, Values]]] = []
        for repeat in range(REPEATS):
            parts: list[dict[str, dict[str, Values]]] = []
            for number, fold in enumerate(folds):
                questions = np.unique(pool.questions[fold.train])
                if size >= len(questions):
                    return points
                chosen = np.random.default_rng((SEED, size, repeat, number)).permutation(questions)[:size]
                scores = reward_scores(pool, fold, fit_fold(pool, fold, arm, chosen))
                parts.append(
                    {
                        which: {name: by_question(pool, fold, which, scores[name]) for name in CURVES}
                        for which in ("all", "weaker")
                    }
                )
            runs.append({w: {n: merged([part[w][n] for part in parts]) for n in CURVES} for w in ("all", "weaker")})
        for which in ("all", "weaker"):
            for name in CURVES:
                values = _averaged([run[which][name] for run in runs])
                point = {"questions": size, "pool": which, "score": name}
                points.append({**point, **summary(values, free.baselines(which))})
    return points


CURVES = ("reward", "reward + log-prob")
"""Scores whose curves are measured."""


def _averaged(runs: Sequence[Values]) -> Values:
    """The mean over runs, question by question."""
    return {name: {i: float(np.mean([run[name][i] for run in runs])) for i in runs[0][name]} for name in runs[0]}


def size_curves(pool: LoggedPool, folds: Sequence[Fold], arm: Arm) -> dict[str, Any]:
    """`ranking_curves` of the test questions of all folds, by the number of candidates of a question."""
    fitted = [fit_fold(pool, fold, arm) for fold in folds]
    found = {}
    for which in ("all", "weaker"):
        questions = []
        for fold, one in zip(folds, fitted, strict=True):
            log_prob = free_scores(pool, fold)["log-prob"]
            members = fold.members(pool, which) & fold.test
            of_log_prob = candidates_of(pool, members, log_prob)
            for group, others in zip(candidates_of(pool, members, one.scores), of_log_prob, strict=True):
                questions.append([replace(c, logprob=d.reward) for c, d in zip(group, others, strict=True)])
        curves = ranking_curves(questions, equality(pool), seed=SEED)
        found[which] = {method: [[round(value, 5) for value in point] for point in curves[method]] for method in SHOWN}
    return found


SHOWN = ("majority", "logprob", "logprob_vote", "reward", "vote", "reward_logprob_vote", "oracle")
"""Methods whose curves over N are kept."""
