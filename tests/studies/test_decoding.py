"""Studies of guided decoding and self-correction: values computed by hand, and an end-to-end run."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch

from helpers.scripted_policy import END, EOS, A, B, C, Scripted, policy, words  # noqa: F401
from helpers.studies import WORLD, command, folders
from studies.cells import Place
from studies.definitions import STUDIES
from studies.measures import decoding, self_correction
from studies.measures.equal_tokens import accuracy_at, margin
from studies.pages import self_correction as correction_page
from studies.results_file import read_results
from studies.setup import judging
from studies.setup.settings import WORLDS
from tracereward.files import read_jsonl
from tracereward.generation.guide import Guide
from tracereward.generation.params import SamplingParams
from tracereward.generation.self_correction import self_correct, threshold_of
from tracereward.rewards.first_error_rules import LevelRule
from tracereward.rewards.log_prob_scorer import LogProbs
from tracereward.rewards.settings import RewardSettings

# ---------- equal tokens ----------


def test_accuracy_is_interpolated_between_budgets():
    """20 is half way from 10 to 40 in log tokens; 10 * 4 ** 0.25 is a quarter of the way."""
    points = [(40.0, 0.7), (10.0, 0.5), (160.0, 0.6)]
    assert accuracy_at(points, 20) == pytest.approx(0.6)
    assert accuracy_at(points, 10 * 4**0.25) == pytest.approx(0.55)
    assert accuracy_at(points, 80) == pytest.approx(0.65)
    assert [accuracy_at(points, tokens) for tokens in (3, 10, 40, 160)] == [0.5, 0.5, pytest.approx(0.7), 0.6]
    assert math.isnan(accuracy_at(points, 161))


def test_margin_is_over_best_baseline():
    steep, flat = [(10.0, 0.1), (40.0, 0.9)], [(10.0, 0.6), (40.0, 0.6)]
    assert margin((20, 0.8), steep, flat) == pytest.approx(0.2)
    assert margin((38, 0.8), steep, flat) == pytest.approx(0.8 - (0.1 + 0.8 * math.log(3.8) / math.log(4)))
    assert math.isnan(margin((41, 0.8), [(10.0, 0.1), (80.0, 0.9)], flat))


# ---------- self-correction ----------


def test_self_correction_summary():
    """Five traces: right and untouched, right and broken, wrong and fixed, two wrong (one suspected)."""
    before = [True, True, False, False, False]
    after = [True, False, True, False, False]
    row = self_correction.summary(before, after, [False, True, True, True, False], [10, 22, 30, 18, 20])
    assert row == {
        "accuracy": 0.4,
        "sampled_tokens": 20,
        "mended": pytest.approx(1 / 3),
        "broken": 0.5,
        "suspected_right": 0.5,
        "suspected_wrong": pytest.approx(2 / 3),
        "untouched": pytest.approx(0.4),
    }
    assert self_correction.summary([True], [True], [False], [10])["mended"] is None


@pytest.mark.parametrize(("share", "suspected"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_threshold_suspects_given_share(share, suspected):
    lowest = [-0.5, -3.0, 1.0, -1.0]
    assert sum(value < threshold_of(lowest, share) for value in lowest) == suspected


def test_detector_may_differ_from_judge(policy, words):
    """The judge scores all tokens equally; the detector scores tokens after the second newline low."""
    guide = Guide(policy, words, Scripted(words, lambda context: 1.0), SamplingParams(max_new_tokens=8, seed=5))
    detector = dataclasses.replace(guide, scorer=Scripted(words, lambda context: 1.0 - 2 * (context.count(END) > 1)))
    trace = [A, END, B, END, C, C, EOS]
    assert self_correct(guide, [[A]], [trace], rounds=1, k=1, rule=LevelRule(0.0))[0].cuts == []
    # The second step includes one low token: (1 - 1) / 2 is not under 0, the third step is.
    assert self_correct(guide, [[A]], [trace], rounds=1, k=1, rule=LevelRule(0.0), detector=detector)[0].cuts == [4]
    assert self_correct(guide, [[A]], [trace], rounds=2, k=1, rule=LevelRule(0.5), detector=detector)[0].cuts == [2, 2]


def test_detector_checks_replacement_traces(policy, words):
    """The judge prefers every new trace and suspects nothing; the detector suspects every first step."""
    trace = [A, END, B, END, C, C, EOS]
    judge = Scripted(words, lambda context: float(context != [A, *trace][: len(context)]))
    guide = Guide(policy, words, judge, SamplingParams(max_new_tokens=8))
    detector = dataclasses.replace(guide, scorer=Scripted(words, lambda context: -1.0))
    (found,) = self_correct(guide, [[A]], [trace], rounds=3, k=2, rule=LevelRule(0.0), detector=detector)
    assert found.cuts == [0, 0, 0]
    assert found.ids != trace


def test_log_probs_match_plain_forward_pass(policy, words):
    prompts, completions = [[A], [B, C, A, END]], [[B, END, C, EOS], [A, EOS]]
    scorer = LogProbs(policy, words, RewardSettings())
    for prompt, ids, values in zip(prompts, completions, scorer.token_rewards(prompts, completions), strict=True):
        with torch.no_grad():
            logits = policy(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(ids)), ids]
        assert values.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert scorer.token_rewards([], []) == []


# ---------- pages ----------


def pool(*curves: tuple[str, list[float]]) -> list[dict]:
    """Rows of N = 4, 8, 16 samples of ten tokens each."""
    return [
        {"method": method, "budget": n, "accuracy": accuracy, "sampled_tokens": 10.0 * n}
        for method, accuracies in curves
        for n, accuracy in zip((4, 8, 16), accuracies, strict=True)
    ]


CHOICES = (
    ("shortest", [0.5, 0.5, 0.5]),
    ("majority", [0.4, 0.5, 0.6]),
    ("logprob", [0.5, 0.5, 0.5]),
    ("reward", [0.6, 0.7, 0.8]),
    ("reward_logprob", [0.7, 0.75, 0.8]),
)


def row_of(page: str, start: str) -> list[str]:
    """Cells, without the first, of the only row that begins with the text."""
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_self_correction_page(tmp_path):
    results = []
    for accuracy, mended in ((0.8, 0.5), (0.8, None)):
        row = {"detector": "reward", "judge": "reward", "rounds": 1, "k": 2, "accuracy": accuracy, "mended": mended}
        row |= {"sampled_tokens": 56.0, "broken": 0.01, "suspected_right": 0.1, "suspected_wrong": 0.6}
        tried = [{"share": 0.5, "margin": 0.02}, {"share": 1.0, "margin": -0.01}]
        tuning = [{"detector": "reward", "judge": "reward", "tried": tried, "chosen": 0 if mended else 1}]
        found = {"tuning": tuning, "rows": [{**row, "untouched": 0.7}], "pool": pool(*CHOICES)}
        results.append({"arm": "frozen", "self_correction": found})
    page = "\n".join(correction_page.sections(tmp_path / "self-correction.md", results))
    assert (tmp_path / "self-correction.png").stat().st_size > 1000
    found = row_of(page, "detector reward, judge reward: r 1, k 2")
    # log(5.6 / 4) / log 2 = .4854 of the way from 60 to 70 %, and from 50 to 50.
    assert found[:4] == ["56 ± 0", "80.0 ± 0.0", "**+15.1 ± 0.0**", "**+30.0 ± 0.0**"]
    assert found[4:6] == ["undefined", "1.0 ± 0.0"]
    assert row_of(page, "detector reward, judge reward") == ["**+2.0 ± 0.0** (1)", "**-1.0 ± 0.0** (1)"]
    assert row_of(page, "majority") == ["40.0 ± 0.0", "50.0 ± 0.0", "60.0 ± 0.0"]


# ---------- from end to end ----------


TINY = dataclasses.replace(WORLD, validation=4, test=4, completion=21, unlabeled=8)


@pytest.fixture
def small(monkeypatch):
    """Both studies in a small world with few settings and budgets."""
    monkeypatch.setitem(WORLDS, "misconception", TINY)
    for name in ("decoding", "self-correction"):
        study = dataclasses.replace(STUDIES[name], worlds=("misconception",), seeds=(40,), samples=4)
        monkeypatch.setitem(STUDIES, name, study)
    grid = {"beam": [{"shape": "wide", "lookahead": 0}], "reject": [{"every": 1}]}
    monkeypatch.setattr(decoding, "GRID", {**grid, "tilt": [{"alpha": 0.5, "top_k": 2}]})
    monkeypatch.setattr(decoding, "TUNED_AT", {"beam": 2, "reject": 2, "tilt": 2})
    monkeypatch.setattr(decoding, "BUDGETS", (1, 2))
    monkeypatch.setattr(decoding, "TILTED", {"reward": (1, 2), "reward_logprob": (1, 2)})
    monkeypatch.setattr(
        decoding, "SCORES", {"reward": ("tilt",), "reward_logprob": ("reject", "tilt"), "logprob": ("beam",)}
    )
    monkeypatch.setattr(self_correction, "WAYS", (("logprob", "reward_logprob"),))
    monkeypatch.setattr(self_correction, "SHARES", (0.5, 1.0))
    monkeypatch.setattr(self_correction, "ROUNDS", 1)
    monkeypatch.setattr(self_correction, "DRAWS", (1, 2))
    monkeypatch.setattr(self_correction, "TUNED_AT", {"rounds": 1, "k": 1})


@pytest.mark.long
def test_decoding_studies_write_pages(small, monkeypatch, capsys, tmp_path):
    for name in ("decoding", "self-correction"):
        code, err = command(monkeypatch, capsys, name, *folders(tmp_path))
        assert code == 0, err
        page = (tmp_path / "pages" / f"{name}.md").read_text()
        assert "greedy accuracy" not in page  # no policies, so no table for them
        assert (tmp_path / "pages" / f"{name}.png").stat().st_size > 1000
    (found,) = read_results(tmp_path / "results" / "decoding.jsonl")
    assert found["questions"] == 4
    rows = {(row["method"], row.get("score"), row["budget"]): row for row in found["decoding"]["rows"]}

    # Recompute selection among all samples from the samples.
    site = Place(tmp_path / "work", tmp_path).site(TINY, 40)
    samples = read_jsonl(site.folder / "samples" / "sft-test-4.jsonl")
    groups = [samples[start : start + 4] for start in range(0, len(samples), 4)]
    best = [max(group, key=lambda row: row["logprob"])["correct"] for group in groups]
    assert rows["logprob", None, 4]["accuracy"] == pytest.approx(np.mean(best))
    assert rows["oracle", None, 4]["accuracy"] == np.mean([any(row["correct"] for row in group) for group in groups])
    assert rows["mean", None, 1]["sampled_tokens"] * 4 == pytest.approx(rows["mean", None, 4]["sampled_tokens"])
    guides = {("tilt", "reward"), ("tilt", "reward_logprob"), ("reject", "reward_logprob"), ("beam", "logprob")}
    controls = {("top-k", "reward"), ("top-k", "reward_logprob")}
    assert {(method, score) for method, score, _ in rows if score} == guides | controls

    # Greedy decoding equals that of `judging.greedy`.
    assert rows["greedy", None, 1]["accuracy"] == judging.greedy(site, "sft", "test")["accuracy"]

    (found,) = read_results(tmp_path / "results" / "self-correction.jsonl")
    first = found["self_correction"]["rows"][0]
    before = np.mean([group[0]["correct"] for group in groups])
    mended = 0.0 if first["mended"] is None else first["mended"]
    broken = 0.0 if first["broken"] is None else first["broken"]
    assert first["accuracy"] == pytest.approx(before * (1 - broken) + (1 - before) * mended)
    code, err = command(monkeypatch, capsys, "self-correction", *folders(tmp_path))
    assert code == 0, err
    assert re.search("1 of 1 cells are stored; running 0", err)
