"""Studies: resumable, independent cells, and pages whose numbers match the results."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from helpers.paths import ROOT
from helpers.studies import WORLD, command, folders, page_of
from studies import cells, definitions
from studies.cells import Cell, Place, run_cells, stored
from studies.definitions import STUDIES
from studies.measures import depth, transfer
from studies.pages.markdown import signed
from studies.results_file import add_result, read_results, write_results
from studies.setup import arms, judging
from studies.setup.settings import WORLDS
from studies.setup.site import Site, make_world
from tracereward.commands.grpo import run_grpo
from tracereward.errors import InputError, Interrupted, RunFailed
from tracereward.files import read_jsonl
from tracereward.generation.sampling import Sample
from tracereward.metrics import mean_interval
from tracereward.training.config import RewardConfig


@pytest.fixture
def small(monkeypatch):
    """A study of three arms in a small world."""
    study = dataclasses.replace(
        STUDIES["recipe"],
        worlds=("misconception",),
        seeds=(0,),
        arms=(definitions.SFT, definitions.LOGPROB, definitions.IRL, definitions.RATIO),
    )
    monkeypatch.setitem(WORLDS, "misconception", WORLD)
    monkeypatch.setitem(STUDIES, "recipe", study)
    return study


def test_study_runs_once_and_page_matches_cells(small, monkeypatch, capsys, tmp_path):
    options = ["recipe", *folders(tmp_path)]
    code, err = command(monkeypatch, capsys, *options)
    assert code == 0, err
    assert "0 of 4 cells are stored; running 4" in err
    found = {result["arm"]: result for result in read_results(tmp_path / "results" / "recipe.jsonl")}
    assert sorted(found) == ["GRPO on log-prob", "IRL", "SFT", "log p_SFT - log p_base"]
    learned = found["IRL"]
    assert (learned["split"], learned["questions"], learned["samples"]) == ("test", 12, 8)
    page = (tmp_path / "pages" / "recipe.md").read_text()
    assert (tmp_path / "pages" / "recipe.png").stat().st_size > 1000
    assert "`python -m studies recipe`: 4 cells, seeds 0, 12 test questions" in page
    row = re.search(r"^\| IRL \| ([\d.]+) \|", page, re.MULTILINE)
    assert row is not None
    assert float(row[1]) == pytest.approx(100 * learned["accuracy"], abs=0.05)

    # Recompute the ranking from the samples.
    site = Place(tmp_path / "work", tmp_path / "x").site(WORLD, 0)
    samples = read_jsonl(site.folder / "samples" / "sft-test-8.jsonl")
    assert len(samples) == 12 * 8
    mean = learned["ranking"]["accuracy"]["mean sample"][0]
    assert mean == pytest.approx(np.mean([row["correct"] for row in samples]))

    # The log-ratio of each sample by a plain forward pass; its within-prompt AUROC by counting pairs.
    tokenizer = AutoTokenizer.from_pretrained(site.folder / "init")
    base = AutoModelForCausalLM.from_pretrained(site.policy("base")).eval()
    ratios = [row["logprob"] - mean_log_prob(base, tokenizer, row) for row in samples]
    aurocs = []
    for first in range(0, len(samples), 8):
        group = range(first, first + 8)
        right, wrong = ([ratios[i] for i in group if samples[i]["correct"] is kind] for kind in (True, False))
        if right and wrong:
            aurocs.append(np.mean([(r > w) + 0.5 * (r == w) for r in right for w in wrong]))
    ratio = found["log p_SFT - log p_base"]["ranking"]["reward_auroc_within_prompt"]
    assert (ratio is None and not aurocs) or ratio == pytest.approx(np.mean(aurocs))

    # Token log-probs have the same means, including the end token of a finished trace.
    by_token = depth.token_log_probs(site, "sft", samples)
    lengths = [len(tokenizer(row["completion"])["input_ids"]) + row["finished"] for row in samples]
    assert [len(values) for values in by_token] == lengths
    policy = AutoModelForCausalLM.from_pretrained(site.policy("sft")).eval()
    means = [mean_log_prob(policy, tokenizer, row) for row in samples]
    assert [np.mean(values) for values in by_token] == pytest.approx(means, abs=1e-5)

    # For a policy equal to its base model the log-ratio is zero.
    config = RewardConfig(**site.options("null", WORLD.grpo), reward="logratio", base_model=str(site.policy("sft")))
    run_grpo(arms.prompts(site), config, ModelConfig(model_name_or_path=str(site.policy("sft"))))
    rewards = [row["reward"] for row in read_jsonl(site.folder / "null" / "metrics.jsonl") if "reward" in row]
    assert rewards == pytest.approx([0.0] * 3, abs=1e-6)

    # SFT is the setting with the best validation accuracy, the first if tied.
    tuning = json.loads((site.folder / "sft" / "tuning.json").read_text())
    accuracies = [tried["accuracy"] for tried in tuning["tried"]]
    assert tuning["chosen"] == accuracies.index(max(accuracies))
    assert accuracies[0] == judging.greedy(site, "sft-0", "validation")["accuracy"]

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    write_results(tmp_path / "results" / "recipe.jsonl", [found[arm] for arm in found if arm != "SFT"])
    code, err = command(monkeypatch, capsys, *options)
    assert code == 0, err
    assert "3 of 4 cells are stored; running 1" in err
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


def test_pretrained_world_starts_from_model_and_reports_unseen_kinds(monkeypatch, tmp_path, tiny_model_folder):
    """Fixed answers: six of eight questions right, of which two use stories that only the test has."""
    world = dataclasses.replace(
        WORLDS["word-problems"], experts=6, unlabeled=6, validation=4, test=8, model=str(tiny_model_folder)
    )
    site = Place(tmp_path, tmp_path).site(world, 0)
    make_world(site)
    assert not list(site.folder.rglob("*.safetensors"))
    assert (site.policy("init"), site.start) == (tiny_model_folder, "init")
    given = AutoTokenizer.from_pretrained(tiny_model_folder).get_vocab()
    assert AutoTokenizer.from_pretrained(site.run("init")).get_vocab() == given
    weights = AutoModelForCausalLM.from_pretrained(tiny_model_folder).state_dict()
    loaded = judging.load_policy(site, "init").state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.items())
    rows = read_jsonl(site.data("test"))
    assert [bool(row.get("unseen")) for row in rows] == [False] * 6 + [True] * 2
    wrong = {1, 6}

    def answers(policy, tokenizer, prompts, params):
        texts = [f"#### {'no' if i in wrong else row['answer']}" for i, row in enumerate(rows)]
        yield [Sample(prompt=i, ids=[], text=text, finished=True, logprob=0.0) for i, text in enumerate(texts)]

    monkeypatch.setattr(judging, "sample", answers)
    judged = judging.greedy(site, "init", "test")
    assert (judged["accuracy"], judged["accuracy_unseen"]) == (6 / 8, 1 / 2)


def mean_log_prob(model, tokenizer, row) -> float:
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id] * row["finished"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(completion)), completion].mean())


@pytest.mark.long
def test_hops_cells_are_evaluated_by_depth(tmp_path):
    """Each question has one depth, and overall values are means over depths."""
    world = dataclasses.replace(
        WORLD,
        name="hops",
        completion=44,
        pretraining={**WORLD.pretraining, "max_steps": 4},
        sft_grid=WORLD.sft_grid[:1],
    )
    world = dataclasses.replace(world, grpo={**world.grpo, "max_steps": 2})
    place = Place(tmp_path / "work", tmp_path / "x.jsonl", fast=True)
    arm = definitions.irl("IRL", **world.recipe, discriminator_updates=0)
    result = cells.run_cell(place, Cell(world=world, seed=0, arm=arm, samples=2))
    assert read_results(place.results) == [result]
    [path] = (tmp_path / "work").glob("hops-0-*/samples/sft-validation-2.jsonl")
    prompts = {row["prompt"] for row in read_jsonl(path)}
    asked = [len(prompt.split(" * ")) - 1 for prompt in prompts]
    questions = {hops: of["ranking"]["questions"] for hops, of in result["depth"].items()}
    assert questions == {str(hops): asked.count(hops) for hops in sorted(set(asked))}
    wrong = sum(of["localisation"]["wrong"] for of in result["depth"].values())
    assert 0 < wrong <= 2 * len(prompts)
    for label in ("mean sample", "majority@2", "reward best-of-2", "oracle@2"):
        by_depth = sum(of["ranking"]["accuracy"][label][0] * questions[hops] for hops, of in result["depth"].items())
        assert by_depth == pytest.approx(result["ranking"]["accuracy"][label][0] * len(prompts))


PROMPTS = {2: "5 * 2 * 4 = ?\n", 3: "5 * 2 * 4 * 1 = ?\n"}
LINES = ["5 * 2 = 20", "20 * 4 = 4", "4 * 1 = 34"]
"""The expert trace."""


def trace(hops: int, completion: str, rewards: list[float], log_probs: list[float], correct: bool) -> tuple[dict, list]:
    """A scored sample and its token log-probs; token values vary around one value per line."""
    lines = completion.split("\n")
    ends, token_rewards, token_log_probs = [], [], []
    for line, reward, log_prob in zip(lines, rewards, log_probs, strict=True):
        tokens = 3 if line.startswith("#") else 6  # 5, *, 2, =, 20 and the line break, or ####, 4 and the end
        ends += [False] * (tokens - 1) + [True]
        spread = [-2.0, 2.0] + [0.0] * (tokens - 2)
        token_rewards += [reward + by for by in spread]
        token_log_probs += [log_prob - by for by in spread]
    row = {"prompt": PROMPTS[hops], "completion": completion, "correct": correct, "step_ends": ends}
    return {**row, "token_rewards": token_rewards, "logprob": -1.0, "reward": sum(rewards)}, token_log_probs


def test_first_wrong_line_localisation_values():
    """Wrong at the lines 0, 1 and 2 of 3; the reward is lowest at 0, at 0 and 1 alike, and at 2: 5/6 are found."""
    rows = [
        trace(2, "5 * 2 = 9\n9 * 4 = 4\n#### 5", [-1.0, 0.5, 0.5], [-0.5, -0.1, -2.0], correct=False),
        trace(2, "5 * 2 = 20\n20 * 4 = 5\n#### 5", [-1.0, -1.0, 0.5], [-0.1, -0.2, -0.1], correct=False),
        trace(2, "5 * 2 = 20\n20 * 4 = 4\n#### 9", [0.5, 0.5, -1.0], [-0.1, -0.2, -3.0], correct=False),
        trace(2, "5 * 2 = 20\n20 * 4 = 4\n#### 4", [-9.0, 0.5, 0.5], [-0.1, -0.2, -0.1], correct=True),
        trace(
            2, "5 * 2 = 20\n20 * 4 = 4", [-9.0, 0.5], [-0.1, -0.2], correct=False
        ),  # its wrong line is the missing one
    ]
    result = depth.localisation([row for row, _ in rows], [values for _, values in rows])
    assert result["wrong"] == 3
    assert result["reward"] == pytest.approx(5 / 6)  # 1 + 1/2 + 1
    assert result["logprob"] == pytest.approx(2 / 3)  # 0 + 1 + 1
    # The sums: -1.5, .4, -1.5: a tie; -1.1, -1.2, .4; .4, .3, -4.
    assert result["reward_logprob"] == pytest.approx(2.5 / 3)
    assert result["chance"] == pytest.approx(1 / 3)
    assert result["first"] == pytest.approx(1 / 3)
    none = depth.localisation([rows[3][0]], [rows[3][1]])
    assert none == dict.fromkeys(("reward", "logprob", "reward_logprob", "chance", "first")) | {"wrong": 0}


def test_summaries_separate_depths():
    """Two samples per question; the reward selects the right one at two hops and the wrong one at three."""
    rows = []
    for question, (hops, right) in enumerate([(2, 0.5), (3, -0.5)]):
        answer, lines = {2: "4", 3: "34"}[hops], LINES[:hops]
        good = trace(hops, "\n".join([*lines, f"#### {answer}"]), [right] * (hops + 1), [-1.0] * (hops + 1), True)
        bad = trace(hops, "\n".join([*lines, "#### 9"]), [0.0] * (hops + 1), [-1.0] * (hops + 1), False)
        rows += [({**row, "question": question, "answer": answer}, values) for row, values in (good, bad)]
    result = depth.summaries([row for row, _ in rows], [values for _, values in rows])
    assert list(result) == ["2", "3"]
    for hops, picked in (("2", 1.0), ("3", 0.0)):
        assert result[hops]["ranking"]["questions"] == 1
        accuracy = result[hops]["ranking"]["accuracy"]
        assert (accuracy["reward best-of-2"][0], accuracy["mean sample"][0]) == (picked, 0.5)
        assert result[hops]["ranking"]["reward_auroc_within_prompt"] == picked
        assert result[hops]["localisation"]["wrong"] == 1
    # All lines equal: chance, one of three and one of four.
    assert result["2"]["localisation"]["reward"] == pytest.approx(1 / 3)
    assert result["3"]["localisation"]["reward"] == pytest.approx(1 / 4)


def test_changed_option_reruns_cell(small, tmp_path):
    place = Place(tmp_path / "work", tmp_path / "x.jsonl")
    cell, *others = small.cells()
    add_result(place.results, {**cells.settings_of(cell, fast=False), "accuracy": 0.5})
    assert [result is not None for result in stored(place, [cell, *others])] == [True, False, False, False]
    assert stored(place, [dataclasses.replace(cell, samples=4)]) == [None]
    assert stored(dataclasses.replace(place, fast=True), [cell]) == [None]
    other = dataclasses.replace(WORLD, experts=13)
    assert stored(place, [dataclasses.replace(cell, world=other)]) == [None]


def test_failed_cell_does_not_stop_others(small, monkeypatch, tmp_path):
    place = Place(tmp_path / "work", tmp_path / "x.jsonl")
    monkeypatch.setattr(cells, "note", lambda _: None)

    def run(place, cell):
        if cell.seed == 1:
            raise RunFailed("the loss is nan")
        add_result(place.results, cells.settings_of(cell, fast=False))

    monkeypatch.setattr(cells, "run_cell", run)
    wanted = [Cell(world=WORLD, seed=seed, arm=definitions.SFT) for seed in (0, 1, 2)]
    with pytest.raises(RunFailed, match="1 of 3 cells failed; run again to retry") as caught:
        run_cells(place, wanted, jobs=1)
    assert "misconception--SFT--1: RunFailed: the loss is nan" in str(caught.value)
    assert "nan" in (tmp_path / "work" / "failed" / "misconception--SFT--1.txt").read_text()
    assert [result is not None for result in stored(place, wanted)] == [True, False, True]


def test_interrupt_stops_study(small, monkeypatch, tmp_path):
    """Ctrl-C must not only end the current cell."""
    begun = []

    def run(place, cell):
        begun.append(cell.seed)
        raise Interrupted("stopped by SIGINT")

    monkeypatch.setattr(cells, "run_cell", run)
    wanted = [Cell(world=WORLD, seed=seed, arm=definitions.SFT) for seed in (0, 1, 2)]
    with pytest.raises(Interrupted):
        run_cells(Place(tmp_path / "work", tmp_path / "x.jsonl"), wanted, jobs=1)
    assert begun == [0]


def test_unknown_names_are_refused(monkeypatch, capsys):
    code, err = command(monkeypatch, capsys, "recipes")
    assert code == 2
    assert "did you mean 'recipe'?" in err
    code, err = command(monkeypatch, capsys, "objective", "--world", "styl")
    assert code == 2
    assert "unknown world 'styl'" in err


def test_foreign_world_gets_own_page(small, monkeypatch, capsys, tmp_path):
    other = dataclasses.replace(WORLD, name="checked", completion=48)
    monkeypatch.setitem(WORLDS, "checked", other)
    monkeypatch.setitem(STUDIES, "recipe", dataclasses.replace(small, arms=(definitions.SFT,)))
    code, err = command(monkeypatch, capsys, "recipe", "--world", "checked", *folders(tmp_path))
    assert code == 0, err
    assert [path.name for path in (tmp_path / "results").glob("*.jsonl")] == ["recipe-checked.jsonl"]
    assert "`python -m studies recipe --world checked`" in (tmp_path / "pages" / "recipe-checked.md").read_text()


@pytest.mark.parametrize(
    ("name", "world", "message"),
    [
        ("corrupt", "word-problems", "misconception, checked, exposure, hops, terse"),
        ("corrupt", "style", "wrong experts"),
    ],
)
def test_world_without_required_data_is_refused(name, world, message):
    with pytest.raises(InputError, match=message):
        STUDIES[name].cells([world])


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_has_valid_options(name, tmp_path):
    """All options exist and are compatible, so that no study fails after hours because of a wrong name."""
    study = STUDIES[name]
    worlds = study.worlds if name == "corrupt" else (*study.worlds, "word-problems")
    wanted = study.cells(tuple(dict.fromkeys(worlds)))
    assert len({cell.name for cell in wanted}) == len(wanted)
    for cell in wanted:
        site, kind, options = Site(tmp_path, cell.world, cell.seed), cell.arm.kind, cell.arm.options
        if kind == "irl":
            given = {**cell.world.grpo, **options}
            chooses = given.pop("choose", False)
            for own in ("unlabeled", "start"):
                given.pop(own, None)
            arms.adversarial(site, "x", {**given, **arms.saves(given, chooses)})
        elif kind.startswith("grpo"):
            reward = kind.removeprefix("grpo-")
            base = "base" if reward == "logratio" else None
            RewardConfig(**site.options("x", cell.world.grpo), reward=reward, base_model=base)
        elif kind in ("calibration", "transfer", *cells.BY_REWARD):
            given = transfer.of_training(options)
            arms.adversarial(site, "x", {**cell.world.grpo, **given})
        else:
            assert kind in ("policy", "sft-continued", "log-probs")


def test_selection_and_test_seeds_and_questions_are_disjoint():
    """The recipe is selected and reported on different seeds and questions."""
    chosen = {seed for name in ("granularity", "objective") for seed in STUDIES[name].seeds}
    assert {STUDIES[name].split for name in ("granularity", "objective")} == {"validation"}
    for name in ("recipe", "worlds", "longer", "unmarked", "multihop", "reranking"):
        assert STUDIES[name].split == "test"
        assert len(STUDIES[name].seeds) >= 5
        assert not chosen & set(STUDIES[name].seeds)


def test_collapse():
    start = {"accuracy": 0.80, "distinct": 0.9}
    assert not judging.collapsed(0.76, 0.9, start)
    assert judging.collapsed(0.74, 0.9, start)
    assert judging.collapsed(0.95, 0.44, start)
    assert not judging.collapsed(0.95, 0.46, start)


def test_mean_interval_is_scipys():
    values = [0.31, 0.42, 0.37, 0.55, 0.40]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(sum(values) / 5)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    alone = mean_interval([0.5])
    assert alone[0] == 0.5
    assert np.isnan(alone[1:]).all()


STOPS = (None, "decoupling", None)
CHOSEN = ("start", "checkpoint-2", "start")


def result(arm: str, kind: str, seed: int, accuracy: float, **more) -> dict:
    given = {"world": "misconception", "seed": seed, "arm": arm, "kind": kind, "split": "test", "fast": False}
    judged = {"accuracy": accuracy, "distinct": 1.0, "collapsed": False, "questions": 100, "samples": 8}
    made = {"seconds": 36.0, "train_seconds": 30.0, "machine": "m", "torch": "t", "trl": "l"}
    return {**given, **judged, **made, **more}


def ranking(reward: float, auroc: float) -> dict:
    labels = {
        "mean sample": 0.5,
        "shortest": 0.4,
        "majority@8": 0.6,
        "log-prob best-of-8": 0.62,
        "log-prob-weighted vote@8": 0.61,
        "oracle@8": 0.9,
        "reward best-of-8": reward,
        "reward-weighted vote@8": reward,
        "reward + log-prob best-of-8": reward,
        "vote@8 weighted by reward + log-prob": reward,
    }
    aurocs = {"reward": auroc, "logprob": 0.7, "reward_logprob": auroc}
    return {
        "accuracy": {label: [value, 0.0, 1.0] for label, value in labels.items()},
        **{f"{name}_auroc_within_prompt": value for name, value in aurocs.items()},
    }


def test_page_values(tmp_path):
    """Differences are paired by seed: 10, 12 and 14 points are 12 +- 4.97 (t = 4.303, s = 2), whatever the level."""
    rows = []
    for seed, (sft, gain) in enumerate([(0.5, 0.10), (0.7, 0.12), (0.6, 0.14)]):
        rows.append(result("SFT", "policy", seed, sft))
        rows.append(
            result(
                "IRL",
                "irl",
                seed,
                sft + gain,
                ranking=ranking(0.65 + 0.01 * seed, 0.8),
                stopped=STOPS[seed],
                chosen=CHOSEN[seed],
            )
        )
    page = page_of(tmp_path, rows)
    assert "| SFT | 60.0 ± 24.8 |  |  |  |  |  | 1.00 |  |" in page
    assert "| IRL | 72.0 ± 27.7 | **+12.0 ± 5.0** |  | 0/3 | 1/3 | 2/3 | 1.00 | 30 |" in page
    # best-of-8 66 +- 2.48 against the better of 60 and 62
    assert "| IRL: reward | 0.800 ± 0.000 (**+0.100 ± 0.000**) | 66.0 ± 2.5 | 66.0 ± 2.5 | **+4.0 ± 2.5** |" in page
    assert "| majority@8 |  | 60.0 ± 0.0 |" in page
    assert "Of the 3 adversarial runs on this page 0 collapsed" in page


def test_page_with_unseen_kinds_and_all_wrong_samples(tmp_path):
    """Unseen kinds have a column where all results have them; 10 and 20 % are 15 +- 63.5 (t = 12.706, s = 7.07)."""
    rows = [result("SFT", "policy", seed, 0.5, accuracy_unseen=0.1 * (seed + 1)) for seed in (0, 1)]
    aurocs = dict.fromkeys(ranking(0.5, 0.8), None) | {"accuracy": ranking(0.5, 0.8)["accuracy"]}
    rows += [result("log p", "log-probs", seed, 0.5, accuracy_unseen=0.5, ranking=aurocs) for seed in (0, 1)]
    page = page_of(tmp_path, rows)
    assert "| arm | greedy accuracy | on unseen kinds | minus SFT |" in page
    assert "| SFT | 50.0 ± 0.0 | 15.0 ± 63.5 |" in page
    assert "| log-prob | undefined |" in page
    assert "| log p | undefined | 50.0 ± 0.0 |" in page
    assert "on unseen kinds" not in page_of(tmp_path, [*rows, result("b", "policy", 0, 0.2)])


def by_hops(reward: float, found: float | None) -> dict:
    """The output of `depth.summaries` for one depth."""
    shares = {"reward": found, "logprob": 0.25, "reward_logprob": found, "chance": 0.2, "first": 0.5}
    if found is None:
        shares = dict.fromkeys(shares)
    wrong = 0 if found is None else 30
    return {"ranking": {**ranking(reward, 0.8), "questions": 20}, "localisation": {"wrong": wrong, **shares}}


def test_depth_page_values(tmp_path):
    """At 2 hops 64, 66 and 68 % against the better of 60 and 62; at 3 hops a seed has no wrong trace."""
    rows = []
    for seed in range(3):
        deep = {"2": by_hops(0.64 + 0.02 * seed, 0.6), "3": by_hops(0.5, None if seed == 0 else 0.3)}
        rows.append(result("IRL", "irl", seed, 0.7, ranking=ranking(0.66, 0.8), stopped=None, depth=deep))
    page = page_of(tmp_path / "new", rows)
    assert (tmp_path / "new" / "x-depth.png").stat().st_size > 1000
    line = "| IRL, 2 hops | 20 | 50.0 ± 0.0 | 40.0 ± 0.0 | 60.0 ± 0.0 | 62.0 ± 0.0 | 66.0 ± 5.0 | 66.0 ± 5.0 |"
    assert f"{line} 90.0 ± 0.0 | +4.0 ± 5.0 | 0.700 ± 0.000 | 0.800 ± 0.000 |" in page
    assert "| 90.0 ± 0.0 | **-12.0 ± 0.0** | 0.700 ± 0.000 |" in page
    line = "| IRL, 2 hops | 30 | 20.0 ± 0.0 | 50.0 ± 0.0 | 25.0 ± 0.0 | 60.0 ± 0.0 | 60.0 ± 0.0 | **+35.0 ± 0.0** |"
    assert line in page
    undefined = " | ".join(["undefined"] * 5)
    assert f"| IRL, 3 hops | 20 | {undefined} |" in page
    # No other study has such a section.
    assert "Against depth" not in page_of(tmp_path, [{k: v for k, v in row.items() if k != "depth"} for row in rows])
    assert not (tmp_path / "x-depth.png").exists()


def test_bold_marks_intervals_excluding_zero():
    assert signed((1.0, 0.1, 1.9)) == "**+1.0 ± 0.9**"
    assert signed((1.0, -0.1, 2.1)) == "+1.0 ± 1.1"
    assert signed((-1.0, -1.5, -0.5)) == "**-1.0 ± 0.5**"
    assert signed((1.0, float("nan"), float("nan"))) == "+1.0"


def test_log_ratio_needs_a_base_model(tmp_path):
    with pytest.raises(InputError, match="logratio needs --base_model"):
        RewardConfig(output_dir=str(tmp_path), reward="logratio")
    with pytest.raises(InputError, match="no other reward uses it"):
        RewardConfig(output_dir=str(tmp_path), reward="logprob", base_model="x")


PUBLISHED = ROOT / "docs" / "studies"


@pytest.mark.parametrize("name", sorted(path.stem for path in PUBLISHED.glob("*.md") if path.stem in STUDIES))
def test_published_pages_match_results(name, monkeypatch, capsys, tmp_path):
    """Published pages have the values of stored results, with all cells and current settings."""
    results = ROOT / "studies" / "results"
    wanted = stored(Place(tmp_path, results / f"{name}.jsonl"), STUDIES[name].cells())
    assert None not in wanted  # a missing cell would be run
    assert len(wanted) == len(read_results(results / f"{name}.jsonl"))
    code, err = command(monkeypatch, capsys, name, *folders(tmp_path), f"--results={results}")
    assert code == 0, err
    made, published = ((at / f"{name}.md").read_text(encoding="utf-8") for at in (tmp_path / "pages", PUBLISHED))
    assert made == published
    figures = sorted(path.name for path in (tmp_path / "pages").glob("*.png"))
    assert figures == sorted(re.findall(r"^!\[.*\]\((.*)\)$", published, re.MULTILINE))
    for figure in figures:
        with Image.open(tmp_path / "pages" / figure) as one, Image.open(PUBLISHED / figure) as other:
            if one.info["Software"] == other.info["Software"]:  # other matplotlib versions may draw differently
                assert np.mean(np.asarray(one) != np.asarray(other)) < 1e-3, figure
