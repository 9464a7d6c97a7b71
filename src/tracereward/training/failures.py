"""Rules that detect three failures of adversarial training in the logged rows.

All rules compare two windows: the last `w` values of a series, and any window of `w` values that ends before these
begin. "Significantly" always compares Welch's statistic with a quantile of Student's t,

    mean(a) - mean(b) > t(level, n - 1) sqrt(k (s_a^2 / n_a + s_b^2 / n_b)),        n = min(n_a, n_b),

one-sided, s^2 with n - 1 in the denominator; n - 1 is the smallest number of degrees of freedom that Welch's formula
can give, and needs no division. For the change that raises the alarm, k = (1 + r) / (1 - r), where r is the
autocorrelation of neighbouring values: a policy drifts, and correlated values carry less evidence. Elsewhere k = 1. An
alarm also requires a material change, because with enough steps any drift is significant.

`w` is `window`, or half of the series' values if there are fewer than two windows. Missing, None and non-finite values
are skipped, so the windows of a rarely logged series span many steps. The other series of a rule are read in the rows
of the same windows. The rules are stateless, so a resumed run reaches the same result.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.special import stdtrit

WINDOW = 20  # reduces a batch's noise to a quarter; two fit in the shortest runs, of 50 steps
MIN_VALUES = 8  # in a window; with fewer, Student's t only detects changes that no run survives
# Rules are evaluated at each step, against all earlier windows. At this level 3 of 1,480 simulated healthy runs of 300
# steps gave a false alarm, with white noise or autocorrelation 0.5; with 0.8 one run of three did.
ALARM_LEVEL = 1e-5
MAX_AUTOCORRELATION = 0.9  # a standard error is at most 4.4 times that of independent values
RISE_LEVEL = 0.01  # for what must have risen with the change that raises the alarm: an ordinary test is enough
EXCUSE_LEVEL = 0.05  # for what excuses a change: a run that may be improving is not stopped
MASTERED = 0.9  # with so many correct answers, traces may be alike and the few wrong ones hard to distinguish

DIVERSITY_FALL = 0.25  # in distinct completions: two of a group of eight
DIVERSITY_FACTOR = 0.5  # for groups with low initial diversity: a loss of half
AUROC_FALL = 0.05  # smaller falls do not affect what is learned
EXCESS_LOST = 0.5  # share of the AUROC's excess over chance, 0.5
CORRECT_FALL = 0.1  # ten of a hundred answers: in healthy runs, windows of 20 batches differ by nearly as much
CORRECT_LOST = 0.5  # share of the correct answers: no useful reward causes that
NOISE_FACTOR = 4.0  # in variance: the token rewards swing twice as far
NOISE_FLOOR = 0.01  # standard deviation 0.1 log-odds: less is too small to affect a policy

REWARD, CORRECT = "reward", "rewards/correct/mean"
WITHIN, PERTURBATION = "monitor/within_prompt_auroc", "monitor/perturbation_auroc"
DISTINCT, NOISE, SPREAD = "monitor/distinct_share", "monitor/token_noise", "monitor/reward_std"

Row = Mapping[str, float | None]


@dataclass(frozen=True)
class Failure:
    """A failure: its name, the step of the last row, and a one-sentence reason with the figures."""

    name: str
    step: int
    reason: str


def detect(history: Sequence[Row], window: int = WINDOW) -> Failure | None:
    """The failure at the end of `history`, if any: mode collapse, then decoupling, then token noise.

    Args:
        history: logged rows with `step`. Rows of one step are merged. A row whose step is earlier than the previous
            one's starts a resumed run, which replaces the later rows. Rows without a step are skipped.
        window: values in a window.
    """
    return mode_collapse(history, window) or decoupling(history, window) or token_noise(history, window)


def mode_collapse(history: Sequence[Row], window: int = WINDOW) -> Failure | None:
    """Mode collapse: the policy generates the same few traces because they are rewarded.

    An earlier window e and the last one, r, with

        distinct_r < max(distinct_e - 0.25, 0.5 distinct_e), and lower significantly (`ALARM_LEVEL`),
        reward_r above reward_e significantly (`RISE_LEVEL`),
        correct_r not above correct_e significantly (`EXCUSE_LEVEL`), and mean correct_r < 0.9.

    A healthy policy also becomes less diverse, but is then correct more often. Without gold answers only the factor 0.5
    applies.
    """
    steps, columns = _columns(history)
    distinct, correct = columns[DISTINCT], columns[CORRECT]

    def material(earlier: np.ndarray) -> np.ndarray:
        half = DIVERSITY_FACTOR * earlier
        return np.maximum(earlier - DIVERSITY_FALL, half) if _known(correct) else half

    for earlier, recent in _fallen(distinct, window, material):
        if _rose(columns[REWARD], earlier, recent, RISE_LEVEL) and not _excused(correct, earlier, recent):
            reason = (
                f"distinct completions of a prompt fell from {_change(distinct, earlier, recent, steps)}, while the "
                f"reward rose from {_change(columns[REWARD], earlier, recent)}"
                f"{_meanwhile('correct answers', correct, earlier, recent)}"
            )
            return Failure("mode_collapse", int(steps[-1]), reason)
    return None


def decoupling(history: Sequence[Row], window: int = WINDOW) -> Failure | None:
    """Decoupling: the reward no longer tracks correctness. An earlier window e and the last one, r, with either

        auroc_r < auroc_e - max(0.05, 0.5 (auroc_e - 0.5)), and lower significantly (`ALARM_LEVEL`),
        correct_r not above correct_e significantly (`EXCUSE_LEVEL`), and mean correct_r < 0.9,

    or

        correct_r < correct_e - 0.1, and lower significantly (`ALARM_LEVEL`),
        reward_r above reward_e significantly (`RISE_LEVEL`), or correct_r < 0.5 correct_e, whatever the reward did.

    A policy that ends its traces too early may lose nearly all correct answers while the reward falls only a little.
    `auroc` is the AUROC within a prompt. As a policy approaches its experts this AUROC falls to chance, as expected,
    but correctness rises. Without gold answers, `auroc` is that of experts against their perturbed copies, and there is
    no second condition.
    """
    steps, columns = _columns(history)
    correct, reward = columns[CORRECT], columns[REWARD]
    name, auroc = ("AUROC within a prompt", columns[WITHIN])
    if not _known(correct):
        name, auroc = ("AUROC of experts against their perturbed copies", columns[PERTURBATION])
    for earlier, recent in _fallen(auroc, window, lambda e: e - np.maximum(AUROC_FALL, EXCESS_LOST * (e - 0.5))):
        if not _excused(correct, earlier, recent):
            reason = (
                f"{name} fell from {_change(auroc, earlier, recent, steps)}"
                f"{_meanwhile('correct answers', correct, earlier, recent)}"
            )
            return Failure("decoupling", int(steps[-1]), reason)
    for earlier, recent in _fallen(correct, window, lambda e: e - CORRECT_FALL):
        rose = _rose(reward, earlier, recent, RISE_LEVEL)
        if rose or _mean(correct, recent) < CORRECT_LOST * _mean(correct, earlier):
            reason = (
                f"correct answers fell from {_change(correct, earlier, recent, steps)}, while the reward "
                f"{'rose' if rose else 'went'} from {_change(reward, earlier, recent)}"
            )
            return Failure("decoupling", int(steps[-1]), reason)
    return None


def token_noise(history: Sequence[Row], window: int = WINDOW) -> Failure | None:
    """Token noise: token rewards vary within correct traces, without a better AUROC.

    An earlier window e and the last one, r, with

        noise_r > max(4 noise_e, 0.01), and above 4 noise_e significantly (`ALARM_LEVEL`),
        noise_r / std_r^2 > 4 noise_e / std_e^2, std that of the trace rewards, where it is logged,
        auroc_r (within the prompt) not above auroc_e significantly (`EXCUSE_LEVEL`).

    The second line is needed because doubling the scale of a reward quadruples all variances without adding noise. The
    first is needed because std falls as the rollouts of a good policy become alike.
    """
    steps, columns = _columns(history)
    noise, auroc, spread = columns[NOISE], columns[WITHIN], columns[SPREAD]
    # A fall of the negative is a rise.
    for earlier, recent in _fallen(-noise, window, lambda e: np.minimum(NOISE_FACTOR * e, -NOISE_FLOOR), NOISE_FACTOR):
        old, new = (
            _mean(noise, earlier),
            _mean(noise, recent),
        )  # if spread is not logged, the comparison with nan below is False
        in_scale = new * _mean(spread, earlier) ** 2 <= NOISE_FACTOR * old * _mean(spread, recent) ** 2
        if not in_scale and not _rose(auroc, earlier, recent, EXCUSE_LEVEL):
            reason = (
                "the variance of token rewards inside correct traces rose from "
                f"{_change(noise, earlier, recent, steps)}"
                f"{_meanwhile('AUROC within a prompt', auroc, earlier, recent)}"
            )
            return Failure("token_noise", int(steps[-1]), reason)
    return None


def _columns(history: Sequence[Row]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps, and one array per series, nan where there is no value."""
    rows: dict[int, dict[str, float | None]] = {}
    for row in history:
        step = row.get("step")
        if step is None:
            continue
        while rows and next(reversed(rows)) > step:
            rows.popitem()
        rows.setdefault(int(step), {}).update(row)
    keys = (REWARD, CORRECT, WITHIN, PERTURBATION, DISTINCT, NOISE, SPREAD)
    columns = {key: np.array([_finite(row.get(key)) for row in rows.values()], dtype=float) for key in keys}
    return np.array(list(rows)), columns


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan


def _fallen(
    series: np.ndarray, window: int, bound: Callable[[np.ndarray], np.ndarray], factor: float = 1.0
) -> Iterator[tuple[slice, slice]]:
    """Row ranges (earlier window, last window) of all pairs with a fall, the largest fall first.

    A fall: the last mean is below `bound` of the earlier mean, and significantly below `factor` times the earlier mean.
    """
    places = np.flatnonzero(np.isfinite(series))
    size = min(window, len(places) // 2)
    if size < MIN_VALUES:
        return
    windows = sliding_window_view(series[places], size)
    mean, variance = windows.mean(1), windows.var(1, ddof=1) / size
    earlier = slice(0, len(windows) - size)  # those that do not overlap the last
    fall = factor * mean[earlier] - mean[-1]
    r = autocorrelation(series[places])
    error = np.sqrt((1 + r) / (1 - r) * (factor**2 * variance[earlier] + variance[-1]))
    alarm = (mean[-1] < bound(mean[earlier])) & (fall > _quantile(ALARM_LEVEL, size) * error)
    recent = slice(int(places[-size]), int(places[-1]) + 1)
    for start in sorted(np.flatnonzero(alarm), key=lambda start: -fall[start]):
        yield slice(int(places[start]), int(places[start + size - 1]) + 1), recent


def autocorrelation(values: np.ndarray) -> float:
    """Correlation r of neighbouring values, in [0, `MAX_AUTOCORRELATION`], estimated from the differences d.

    1 + 2 sum_t d_t d_(t+1) / sum_t d_t^2. A first-order autoregression's differences have correlation -(1 - r) / 2. A
    trend or a single step hardly changes them, but would make the values themselves look correlated.
    """
    d = np.diff(values)
    power = float(d @ d)
    if power == 0:
        return 0.0
    return min(max(1 + 2 * float(d[:-1] @ d[1:]) / power, 0.0), MAX_AUTOCORRELATION)


def _quantile(level: float, count: int) -> float:
    """Upper `level` quantile of Student's t with count - 1 degrees of freedom."""
    return -float(stdtrit(count - 1, level))


def _rose(series: np.ndarray, earlier: slice, recent: slice, level: float) -> bool:
    """Whether the recent mean is significantly above the earlier one; False with fewer than two values."""
    old, new = (values[np.isfinite(values)] for values in (series[earlier], series[recent]))
    count = min(len(old), len(new))
    if count < 2:
        return False
    error = math.sqrt(old.var(ddof=1) / len(old) + new.var(ddof=1) / len(new))
    return bool(new.mean() - old.mean() > _quantile(level, count) * error)


def _excused(correct: np.ndarray, earlier: slice, recent: slice) -> bool:
    """Whether answers are correct more often than before, or nearly always."""
    return _mean(correct, recent) >= MASTERED or _rose(correct, earlier, recent, EXCUSE_LEVEL)


def _known(series: np.ndarray) -> bool:
    return bool(np.isfinite(series).any())


def _mean(series: np.ndarray, rows: slice) -> float:
    values = series[rows][np.isfinite(series[rows])]
    return float(values.mean()) if len(values) else math.nan


def _change(series: np.ndarray, earlier: slice, recent: slice, steps: np.ndarray | None = None) -> str:
    """The two means and their steps: ``0.91 (steps 3 to 22) to 0.40 (steps 81 to 100)``."""
    texts = []
    for rows in (earlier, recent):
        where = "" if steps is None else f" (steps {steps[rows][0]} to {steps[rows][-1]})"
        texts.append(f"{_mean(series, rows):.3g}{where}")
    return " to ".join(texts)


def _meanwhile(name: str, series: np.ndarray, earlier: slice, recent: slice) -> str:
    """The change of a second series for the reason; empty if it is not logged."""
    if math.isnan(_mean(series, earlier)) or math.isnan(_mean(series, recent)):
        return ""
    return f"; {name} went from {_change(series, earlier, recent)}"
