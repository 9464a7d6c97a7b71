"""Study of guided decoding: accuracy and sampled tokens of each method at each budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from filelock import FileLock

from studies.measures.equal_tokens import margin
from studies.setup import judging
from studies.setup.frozen import load_frozen
from studies.setup.site import TASK, Site
from tracereward.evaluate.guided import beam_shape, candidates
from tracereward.files import atomic_write_json, read_json, read_jsonl
from tracereward.generation.decoding import beam, reject, tilt
from tracereward.generation.guide import Guide, Guided
from tracereward.generation.params import SamplingParams
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.rewards.log_prob_scorer import LogProbs
from tracereward.rewards.records import Trace
from tracereward.selection import Candidate, ranking_curves
from tracereward.tasks.recipes import get_task

Row = dict[str, Any]
Points = list[tuple[float, float]]
BUDGETS = (1, 2, 4, 8, 16)
"""Sample budgets N, as in `evaluate.guided.compare`."""
SCORES: dict[str, tuple[str, ...]] = {
    "reward": ("beam", "reject", "tilt"),
    "reward_logprob": ("beam", "reject", "tilt"),
    "logprob": ("beam", "reject"),
}
"""Guided methods by score: the learned reward, the reward plus the policy's token log-prob, or, as a control, the
log-prob alone (for which tilting would only lower the temperature)."""
TILTED = {"reward": (1, 2, 4, 8), "reward_logprob": (1, 2, 4)}
"""Budgets of tilted sampling by score; each token costs forward passes of one or two more models."""
SHAPES: dict[str, Callable[[int], tuple[int, int]]] = {
    "square": beam_shape,
    "narrow": lambda budget: (1, budget),
    "wide": lambda budget: (max(1, budget // 2), min(2, budget)),
}
"""Beam width and expansions as functions of the budget."""
GRID: dict[str, list[Row]] = {
    "beam": [{"shape": shape, "lookahead": ahead} for ahead in (0, 1) for shape in SHAPES],
    "reject": [{"every": every} for every in (1, 2, 3, 4)],
    "tilt": [{"alpha": alpha, "top_k": top_k} for top_k in (2, 4) for alpha in (0.25, 0.5, 1.0, 2.0)],
}
"""Grid searched on validation questions."""
TUNED_AT = {"beam": 8, "reject": 16, "tilt": 2}
"""Sample budget of each grid search. Tilted samples are independent, so two are enough."""
TUNED_ON = 40
"""Seed whose validation questions select the settings of all seeds."""
ASKED = 200
"""Number of these questions."""
FEW = 20
"""Questions of a quick run."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One part's questions, plain samples of the SFT policy, and guides by an arm's reward model.

    Attributes:
        prompts, golds: prompt and reference answer of each question.
        guides: guides by score.
        samples: token ids of each question's samples, in sampling order.
        pool: the same samples as candidates; their reward has no log-prob added.
    """

    prompts: list[str]
    golds: list[str]
    guides: dict[str, Guide]
    samples: list[list[list[int]]]
    pool: list[list[Candidate]]

    @property
    def tokens(self) -> float:
        """Mean length of a plain sample."""
        lengths = [len(ids) for drawn in self.samples for ids in drawn]
        return sum(lengths) / len(lengths)

    def pool_rows(self) -> list[Row]:
        """Accuracy and tokens of each selection method among N = 1, 2, 4, ... plain samples."""
        curves = ranking_curves(self.pool, get_task(TASK).equal, seed=self.guides["reward"].sampling.seed)
        return [
            {"method": method, "budget": n, "accuracy": accuracy, "sampled_tokens": n * self.tokens}
            for method, points in curves.items()
            for n, accuracy, _, _ in points
        ]


def load_bench(site: Site, arm: str, part: str, n: int, *, asked: int | None = None) -> Bench:
    """The bench of one part's questions, or of its first `asked`, with `n` samples per question."""
    task = get_task(TASK)
    questions = read_jsonl(site.data(part))[: FEW if site.fast else asked]
    prompts = [row["prompt"] for row in questions]
    policy = judging.load_policy(site, "sft")
    scorer = load_frozen(site, arm)
    sampling = SamplingParams(max_new_tokens=site.world.completion, seed=site.seed, batch_size=512)
    guide = Guide(policy, load_tokenizer(str(site.run("init"))), scorer, sampling)
    own = LogProbs(policy, guide.tokenizer, scorer.settings)
    rows = judging.draw_samples(site, "sft", part, n)[: len(questions) * n]
    fields = ("prompt", "completion", "finished")
    traces = [scorer.encode(Trace(where="", **{name: row[name] for name in fields})) for row in rows]
    ids = [list(trace.completion) for trace in traces]
    rewards = guide.rewards(guide.encode([row["prompt"] for row in rows]), ids)
    flat = [
        Candidate(
            text=row["completion"],
            answer=task.extract(row["completion"]),
            reward=reward,
            logprob=row["logprob"],
            length=len(trace),
            correct=row["correct"],
        )
        for row, reward, trace in zip(rows, rewards, ids, strict=True)
    ]
    starts = range(0, len(rows), n)
    guides = {
        "reward": guide,
        "reward_logprob": replace(guide, reference=policy),
        "logprob": replace(guide, scorer=own),
    }
    return Bench(
        prompts=prompts,
        golds=[row["answer"] for row in questions],
        guides=guides,
        samples=[ids[start : start + n] for start in starts],
        pool=[flat[start : start + n] for start in starts],
    )


def points_of(rows: Sequence[Row], method: str) -> Points:
    """(tokens, accuracy) of one method's rows."""
    return [(row["sampled_tokens"], row["accuracy"]) for row in rows if row["method"] == method]


def guided(bench: Bench, score: str, method: str, setting: Row, *, budgets: Sequence[int]) -> list[Row]:
    """Accuracy and tokens of one guided method at each budget."""
    guide = bench.guides[score]
    if method == "tilt":
        return best_of(bench, guide, setting, budgets)["reward"]
    rows = []
    for budget in budgets:
        if method == "beam":
            width, expansions = SHAPES[setting["shape"]](budget)
            found = beam(guide, bench.prompts, width=width, expansions=expansions, lookahead=setting["lookahead"])
        else:
            found = reject(guide, bench.prompts, n=budget, every=setting["every"])
        rows.append({"budget": budget, **_first(found, bench.golds)})
    return rows


def best_of(bench: Bench, guide: Guide, setting: Row, budgets: Sequence[int]) -> dict[str, list[Row]]:
    """Accuracy and tokens of each selection method among N tilted samples, subsets of the largest budget's."""
    task = get_task(TASK)
    found = tilt(guide, bench.prompts, n=max(budgets), alpha=setting["alpha"], top_k=setting["top_k"])
    tokens = sum(traces[0].sampled_tokens for traces in found) / len(found) / max(budgets)
    curves = ranking_curves(candidates(found, bench.golds, task), task.equal, seed=guide.sampling.seed)
    return {
        method: [
            {"budget": n, "accuracy": accuracy, "sampled_tokens": n * tokens}
            for n, accuracy, _, _ in points
            if n in budgets
        ]
        for method, points in curves.items()
    }


def truncated(bench: Bench, tuning: Row) -> list[Row]:
    """Control for tilting: best of N samples with the same top-k and no reward in sampling."""
    top_k = GRID["tilt"][tuning["grids"]["reward"]["tilt"]["chosen"]]["top_k"]
    found = best_of(bench, bench.guides["reward"], {"alpha": 0.0, "top_k": top_k}, TILTED["reward"])
    return [{"method": "top-k", "score": score, **row} for score in TILTED for row in found[score]]


def _first(found: Sequence[Sequence[Guided]], golds: Sequence[str]) -> Row:
    """Accuracy of the first trace of each question, and mean tokens sampled per question."""
    task = get_task(TASK)
    right = [task.verify(traces[0].text, gold) for traces, gold in zip(found, golds, strict=True)]
    tokens = [traces[0].sampled_tokens for traces in found]
    return {"accuracy": sum(right) / len(right), "sampled_tokens": sum(tokens) / len(tokens)}


def tune(bench: Bench) -> Row:
    """Grid search for each score and method: all results, and the index of the best.

    The best has the largest margin over best-of-N by the same score at equal tokens, the first if tied. Accuracy alone
    would favour the setting that samples most.
    """
    plain, found = bench.pool_rows(), {}
    for score, methods in SCORES.items():
        for method in methods:
            tried = []
            for setting in GRID[method]:
                (row,) = guided(bench, score, method, setting, budgets=[TUNED_AT[method]])
                gain = margin((row["sampled_tokens"], row["accuracy"]), points_of(plain, score))
                tried.append({**setting, **row, "margin": gain})
            best = max(range(len(tried)), key=lambda index: tried[index]["margin"])
            found.setdefault(score, {})[method] = {"tried": tried, "chosen": best}
    return {"questions": len(bench.prompts), "seed": bench.guides["reward"].sampling.seed, "grids": found}


def tuned(site: Site, arm: str, n: int) -> Row:
    """`tune` on a site's validation questions; run once and stored with the reward model."""
    file = site.run(arm) / "guides.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            atomic_write_json(file, tune(load_bench(site, arm, "validation", n, asked=ASKED)))
    return read_json(file)


def measure(reward_of: Callable[[int], tuple[Site, str]], seed: int, part: str, n: int) -> Row:
    """The result of a cell.

    Args:
        reward_of: maps a seed to its site and the arm of its reward model.
        seed: seed of the cell.
        part: data part with the questions.
        n: plain samples per question.

    Returns:
        questions: their number; decoding: the grid search, and rows of all methods, guided ones with their ``score``.
    """
    tuning = tuned(*reward_of(TUNED_ON), n)
    bench = load_bench(*reward_of(seed), part, n)
    guide = bench.guides["reward"]
    alone = replace(guide, sampling=replace(guide.sampling, temperature=0.0))
    rows = [{"method": "greedy", "budget": 1, **_first(tilt(alone, bench.prompts, alpha=0.0, top_k=1), bench.golds)}]
    rows += bench.pool_rows()
    for score, methods in SCORES.items():
        for method in methods:
            setting = GRID[method][tuning["grids"][score][method]["chosen"]]
            found = guided(bench, score, method, setting, budgets=TILTED[score] if method == "tilt" else BUDGETS)
            rows += [{"method": method, "score": score, **row} for row in found]
    rows += truncated(bench, tuning)
    return {"questions": len(bench.prompts), "decoding": {"tuning": tuning, "rows": rows}}
