"""Studies over shares of demonstrations: selected rows, and pages."""

import re

import pytest

from helpers.studies import page_of
from studies.setup import arms
from studies.setup.settings import WORLDS
from studies.setup.site import Site, choose_demonstrations
from tracereward.files import read_jsonl, write_jsonl
from tracereward.synthetic.arithmetic import splits
from tracereward.tasks.recipes import get_task


@pytest.fixture
def site(tmp_path):
    """Builds a site with data and no model."""
    world = WORLDS["checked"]
    parts = splits("checked", 5, 40, n_validation=20, n_test=30, n_unlabeled=50)
    (tmp_path / "data").mkdir()
    for part, rows in parts.items():
        write_jsonl(tmp_path / "data" / f"{part}.jsonl", rows)

    def build(**given) -> Site:
        found = Site(tmp_path, world, 5, **given)
        choose_demonstrations(found)
        return found

    return build


def test_reduced_demonstrations_are_prefix_with_own_folder(site):
    few, everything = site(experts=10), site()
    assert read_jsonl(few.data(few.demonstrations)) == read_jsonl(everything.data("experts"))[:10]
    assert few.run("sft") != everything.run("sft")
    assert few.run("base") == everything.run("base")
    assert (few.sft["per_device_train_batch_size"], everything.sft["per_device_train_batch_size"]) == (10, 25)
    assert arms.prompts(few).dataset_name == str(few.data("experts-10"))


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 4), (0.25, 10)])
def test_corrupt_demonstrations_are_wrong_new_and_counted(site, share, count):
    found = site(corrupt=share)
    rows, experts = read_jsonl(found.data(found.demonstrations)), read_jsonl(found.data("experts"))
    assert len(rows) == 40
    assert rows[count:] == experts[count:]
    task = get_task("arithmetic")
    assert [task.verify(row["completion"], row["answer"]) for row in rows] == [False] * count + [True] * (40 - count)
    used = {
        row["prompt"] for part in ("experts", "validation", "test", "unlabeled") for row in read_jsonl(found.data(part))
    }
    assert not used & {row["prompt"] for row in rows[:count]}
    assert len({row["prompt"] for row in rows}) == 40


def cell(arm, seed, accuracy, auroc, best, chosen="start", updates=1):
    """A cell with the fields that a page reads. AUROC of log-prob .6; accuracy of majority .5, log-prob best-of .7,
    shortest .85 with 10 % and .9 with more."""
    labels = {
        "mean sample": 0.45,
        "shortest": 0.85 if arm.endswith(" 10") else 0.9,
        "oracle@8": 0.95,
        "majority@8": 0.5,
        "log-prob best-of-8": 0.7,
        "reward best-of-8": best,
        "reward + log-prob best-of-8": 0.9,
    }
    ranking = {
        "accuracy": {label: [value, 0.0, 1.0] for label, value in labels.items()},
        "logprob_auroc_within_prompt": 0.6,
        "reward_auroc_within_prompt": auroc,
        "reward_logprob_auroc_within_prompt": None,
        "reward_r": 0.25,
    }
    common = {"world": "checked", "kind": "irl", "split": "test", "samples": 8, "questions": 30, "seconds": 3600}
    rest = {"machine": "a machine", "torch": "2", "trl": "1", "fast": False, "collapsed": seed == 1, "distinct": 1.0}
    learned = {"ranking": ranking, "stopped": None, "chosen": chosen, "options": {"discriminator_updates": updates}}
    policy = {"kind": "policy", "options": {"policy": "sft"}, "collapsed": False}
    own = policy if arm.startswith("SFT") else learned
    return {**common, **rest, **own, "arm": arm, "seed": seed, "accuracy": accuracy}


def test_page_compares_curves_to_sft_with_same_share(tmp_path):
    rows = [
        *(cell("SFT @ 10", seed, accuracy, None, None) for seed, accuracy in ((0, 0.4), (1, 0.6))),
        *(cell("SFT @ 100", seed, 0.8, None, None) for seed in (0, 1)),
        *(cell("IRL @ 10", seed, accuracy, 0.7, 0.8) for seed, accuracy in ((0, 0.5), (1, 0.8))),
        *(cell("IRL @ 100", seed, 0.9, 0.9, 0.6, "checkpoint-25") for seed in (0, 1)),
        *(cell("frozen @ 10", seed, 0.1, 0.75, 0.7, updates=0) for seed in (0, 1)),
    ]
    page = page_of(tmp_path, rows)
    assert (tmp_path / "x.png").stat().st_size > 1000
    # IRL - SFT at 10 %: +10 and +20 points, t(1, .975) = 12.706, half = 12.706 * 7.0711 / sqrt(2).
    assert "| IRL, 10 % | 65.0 ± 190.6 | +15.0 ± 63.5 |  | 1/2 | 2/2 |" in page
    assert "| IRL, 100 % | 90.0 ± 0.0 | **+10.0 ± 0.0** | +25.0 ± 190.6 | 1/2 | 0/2 |" in page
    assert "| SFT, 100 % | 80.0 ± 0.0 |  | +30.0 ± 127.1 |  |  |" in page
    assert not re.search(r"^\| frozen, 10 % \| \d+\.\d ±", page.split("8 samples of the SFT policy")[0], re.MULTILINE)
    ranked = "0.250 ± 0.000 | {} | **+20.0 ± 0.0** | **+5.0 ± 0.0** |"
    assert "| IRL, 10 % | 0.600 ± 0.000 | 0.700 ± 0.000 | undefined | " + ranked.format("**+10.0 ± 0.0**") in page
    assert "| frozen, 10 % | 0.600 ± 0.000 | 0.750 ± 0.000 | undefined | " + ranked.format("+0.0 ± 0.0") in page
    assert "| 10 % | 45.0 ± 0.0 | 50.0 ± 0.0 | 70.0 ± 0.0 | 85.0 ± 0.0 | 95.0 ± 0.0 |" in page
    assert "| 100 % | 45.0 ± 0.0 | 50.0 ± 0.0 | 70.0 ± 0.0 | 90.0 ± 0.0 | 95.0 ± 0.0 |" in page
    assert "Greedy accuracy of each arm" not in page
    assert "| arm | greedy accuracy |" not in page
