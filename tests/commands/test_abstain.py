"""`tracereward rerank --abstain`: which questions are not answered, in a file and in a stream, and what is refused."""

import shutil

from helpers.command_line import bench, command, refused  # noqa: F401
from helpers.tiny import rows
from tracereward.files import write_jsonl
from tracereward.rewards.abstention import Abstention
from tracereward.rewards.settings import write_fitted


def test_questions_under_the_threshold_are_not_answered(command, bench, tmp_path):
    model, samples, output = tmp_path / "reward_model", tmp_path / "samples.jsonl", tmp_path / "chosen.jsonl"
    shutil.copytree(bench.reward_model, model)
    write_jsonl(samples, [{**row, "completion": row["completion"]} for row in rows(bench.experts)])
    refused(command("rerank", model, samples, "--method", "reward", "--abstain", "0.2"), "calibrate")
    assert command("rerank", model, samples, "--method", "reward", "-o", output).code == 0
    rewards = sorted(row["reward"] for row in rows(output))
    middle = rewards[len(rewards) // 2]
    write_fitted(model, abstention=(Abstention(method="reward", questions=4, wrong=(middle,)),))
    for words in (["--overwrite"], ["--overwrite", "--stream"]):
        done = command("rerank", model, samples, "--method", "reward", "--abstain", "0.2", "-o", output, *words)
        assert done.code == 0, done.err
        found = rows(output)
        assert [row["abstained"] for row in found] == [row["reward"] <= middle for row in found]
        assert all(("reason" in row) is row["abstained"] for row in found)
    assert 0 < sum(row["abstained"] for row in found) < len(found)
    wrong = ["--method", "vote"], ["--method", "reward", "--aggregate", "min"]
    for words, part in zip(wrong, ("records of reward", "--aggregate mean"), strict=True):
        refused(command("rerank", model, samples, *words, "--abstain", "0.2"), part)
    refused(command("rerank", model, samples, "--method", "reward", "--abstain", "0.1"), "9 calibration questions")
