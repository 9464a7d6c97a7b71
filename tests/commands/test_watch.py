"""`tracereward watch` with a tiny reward model: figures by numpy, what is planted, the page, refusals."""

import json
import shutil

import numpy as np
import pytest
import yaml

from helpers.command_line import bench, command, refused  # noqa: F401
from tracereward.files import write_jsonl
from tracereward.synthetic.arithmetic import generate


def period(seed: int, count: int = 24) -> list[dict]:
    """Two traces of each question."""
    rows = generate("misconception", count, seed=seed)
    return [row for row in rows for _ in range(2)]


@pytest.fixture(scope="module")
def data(bench):
    """Two periods that share half of their questions, another without answers, and a run folder."""
    folder = bench.folder / "watch"
    folder.mkdir()
    before = period(21)
    now = [*before[:24], *period(22, 12)]
    mute = [{**row, "completion": row["completion"].rpartition("\n####")[0]} for row in now]
    for name, rows in (("before", before), ("now", now), ("mute", mute), ("few", before[:8])):
        write_jsonl(folder / f"{name}.jsonl", rows)
    shutil.copytree(bench.reward_model, folder / "run" / "reward_model")
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump({"demonstrations": str(bench.experts)}))
    return folder


def test_figures_are_numpys_and_the_page_has_the_ten_that_moved_most(command, data):
    for name in ("before", "now"):
        model, scored = data / "run" / "reward_model", data / f"{name}.scored.jsonl"
        assert command("score", model, data / f"{name}.jsonl", "-o", scored).code == 0
    argv = ("watch", data / "now.scored.jsonl", "--reference", data / "run", "--before", data / "before.scored.jsonl")
    done = command(*argv, "-o", data / "page.html")
    assert done.code == 0, done.err
    assert "scoring 12 experts" in done.err  # the periods have their scores
    stored = json.loads((data / "page.json").read_text())
    assert (stored["against"], stored["traces"]) == ("before", {"experts": 12, "before": 48, "now": 48})
    assert stored["questions"] == {"experts": 12, "before": 24, "now": 24}
    old, new = (
        [json.loads(line) for line in (data / f"{name}.scored.jsonl").read_text().splitlines()]
        for name in ("before", "now")
    )
    features = {one["name"]: one for one in stored["features"]}
    # Two traces a question: the mean over questions is that over traces.
    for name, value in (
        ("reward", lambda row: row["reward"]),
        ("tokens", lambda row: len(row["token_rewards"])),
        ("characters", lambda row: len(row["completion"])),
        ("no_answer", lambda row: "####" not in row["completion"]),
    ):
        for side, rows in (("before", old), ("now", new)):
            assert features[name][side] == pytest.approx(np.mean([value(row) for row in rows])), name
    rewards = [row["reward"] for row in new]
    assert stored["reward_quantiles"]["now"]["0.25"] == pytest.approx(np.quantile(rewards, 0.25))
    means = {row["prompt"]: np.mean([r["reward"] for r in old if r["prompt"] == row["prompt"]]) for row in old}
    change = [row["reward"] - means.get(row["prompt"], np.mean(list(means.values()))) for row in new]
    order = sorted(range(len(new)), key=lambda n: (-abs(change[n]), n))[:10]
    page = (data / "page.html").read_text()
    shown = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert sum(len(question["traces"]) for question in shown["questions"]) == 10
    assert {question["prompt"] for question in shown["questions"]} == {new[n]["prompt"] for n in order}
    assert f"{change[order[0]]:+.2f}".replace("-", "") in page.replace("−", "")
    refused(command(*argv, "-o", data / "page.html"), "exists already")


def test_the_experts_are_the_reference_without_a_period_before(command, data):
    """The run's experts against themselves: nothing differs but the number of traces."""
    experts = yaml.safe_load((data / "run" / "config.yaml").read_text())["demonstrations"]
    done = command("watch", experts, "--reference", data / "run", "--fail-on-drift")
    assert done.code == 0, done.err
    assert "No difference from the experts" in done.err
    assert "mean reward +0.00 SD of theirs" in done.err


def test_unreadable_answers_are_found(command, data, tmp_path):
    words = ("watch", data / "mute.jsonl", "--reference", data / "run", "--before", data / "now.jsonl")
    done = command(*words, "--fail-on-drift", "-o", tmp_path / "page.html")
    assert done.code == 3, done.err
    stored = json.loads((tmp_path / "page.json").read_text())
    (silent,) = (one for one in stored["features"] if one["name"] == "no_answer")
    assert (silent["before"], silent["now"]) == (0, 1)
    assert "no_answer" in stored["drifted"]
    assert "share whose answer cannot be read higher" in done.err
    assert command(*words).code == 0  # it is said, and stops nothing


def test_refusals(command, bench, data, tmp_path):
    model = data / "run" / "reward_model"
    shutil.copytree(bench.bare_reward, tmp_path / "alone" / "reward_model")
    alone = tmp_path / "alone"
    refused(command("watch", data / "now.jsonl", "--reference", alone), "does not say which experts", "--before")
    refused(command("watch", data / "few.jsonl", "--reference", model), "few.jsonl: 4 questions; a comparison needs 10")
    refused(command("watch", data / "now.jsonl", "--reference", data / "nothing"), "nothing")
    refused(command("watch", data / "now.jsonl", "--reference", model, "-o", tmp_path / "x.json"), "name the page")
    mixed = [json.loads(line) for line in (data / "now.jsonl").read_text().splitlines()]
    mixed[3] |= {"token_rewards": [0.0]}
    write_jsonl(tmp_path / "mixed.jsonl", mixed)
    refused(
        command("watch", tmp_path / "mixed.jsonl", "--reference", model), "mixed.jsonl:1: no scores, but other rows"
    )
    gone = tmp_path / "gone"
    shutil.copytree(bench.bare_reward, gone / "reward_model")
    (gone / "config.yaml").write_text(yaml.safe_dump({"dataset_name": str(tmp_path / "moved.jsonl")}))
    refused(command("watch", data / "now.jsonl", "--reference", gone), "moved.jsonl", "--experts names another file")
