"""`tracereward sample --guide` and `tracereward correct`: rows, summaries and errors."""

import dataclasses
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.scripted_policy import WORDS, word_tokenizer
from helpers.tiny import launcher, rows, trap
from helpers.unloadable import unloadable
from tracereward.cli import app
from tracereward.commands import questions
from tracereward.commands.correct import correction_summary
from tracereward.errors import RunFailed
from tracereward.evaluate.guided import POOL_METHODS, Comparison, beam_shape, candidates, compare
from tracereward.files import write_jsonl
from tracereward.generation.decoding import beam, reject, tilt
from tracereward.generation.guide import Guide, Guided
from tracereward.generation.params import SamplingParams
from tracereward.generation.self_correction import self_correct
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.rewards.first_error_rules import LevelRule
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.synthetic.arithmetic import build_model
from tracereward.tasks.recipes import get_task

ONE = Comparison(budgets=(1,), alpha=0.0, top_k=4)
ORIGIN = {"command", "data", "model", "--reward-model", "--reference"} | {
    "--task",
    "--max-new-tokens",
    "--temperature",
    "--top-p",
    "--seed",
}
"""Keys of ``NAME.part.json`` of both commands; outputs of earlier versions must remain resumable."""
FIELDS = {"question", "prompt", "completion", "answer", "extracted", "correct", "finished", "length", "logprob"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_model_folder, tokenizer, experts):
    """Rows, a reward model, and a policy and a reward model that cannot be loaded."""
    folder = tmp_path_factory.mktemp("guided")
    write_jsonl(folder / "experts.jsonl", experts[:3])
    settings = RewardSettings(task="arithmetic", head="token")
    reward_model = TokenRewardModel.from_backbone(str(tiny_model_folder), settings, tokenizer)
    with torch.no_grad():
        head = reward_model.head_weight
        head.copy_(torch.linspace(-1, 1, head.numel()).view_as(head))
    reward_model.save_pretrained(folder / "reward_model")
    unloadable(tiny_model_folder, folder / "bare")
    unloadable(folder / "reward_model", folder / "bare_reward_model")
    words = word_tokenizer(WORDS, r"[abc\n]")
    build_model(words, seed=0, hidden_size=16, layers=1, heads=2).save_pretrained(folder / "other")
    words.save_pretrained(folder / "other")
    return SimpleNamespace(
        folder=folder,
        model=tiny_model_folder,
        experts=folder / "experts.jsonl",
        reward_model=folder / "reward_model",
    )


def guide_of(bench, tokenizer, reference=None, **changed) -> Guide:
    scorer = TokenRewardModel.from_pretrained(str(bench.reward_model))
    policy = AutoModelForCausalLM.from_pretrained(bench.model)
    sampling = SamplingParams(**{"max_new_tokens": 16, "seed": 3, **changed})
    return Guide(policy, tokenizer, scorer, sampling, reference=reference)


METHODS = {
    "beam": lambda guide, prompts: beam(guide, prompts, width=2, expansions=2, lookahead=1),
    "reject": lambda guide, prompts: reject(guide, prompts, n=4, keep=2),
    "tilt": lambda guide, prompts: tilt(guide, prompts, n=2, alpha=2.0, top_k=3),
}


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("beam", ["--beam", 2, "--expansions", 2, "--lookahead", 1]),
        ("reject", ["-n", 4, "--keep", 2]),
        ("tilt", ["-n", 2, "--alpha", 2, "--top-k", 3]),
    ],
)
def test_guided_samples_have_rewards(bench, experts, tokenizer, tmp_path, method, given):
    common = ["--task", "arithmetic", "--data", bench.experts, "--max-new-tokens", 16, "--seed", 3]
    words = ["sample", bench.model, *common, "--guide", method, "--reward-model", bench.reward_model, *given]
    done = launcher()(*words, "-o", tmp_path / "guided.jsonl", "--batch-size", 4)
    assert done.code == 0, done.err
    found = rows(tmp_path / "guided.jsonl")
    assert {row["question"] for row in found} == {0, 1, 2}
    # One call in Python gives the same as the command's chunks of one question.
    guide, task = guide_of(bench, tokenizer), get_task("arithmetic")
    prompts = [row["prompt"] for row in experts[:3]]
    expected = METHODS[method](guide, prompts)
    assert [row["completion"] for row in found] == [trace.text for traces in expected for trace in traces]
    for row, trace in zip(found, [trace for traces in expected for trace in traces], strict=True):
        assert row.keys() == {*FIELDS, "reward", "sampled_tokens"}
        assert (row["question"], row["prompt"]) == (trace.prompt, prompts[trace.prompt])
        assert (row["length"], row["sampled_tokens"]) == (len(trace.ids), trace.sampled_tokens)
        assert row["correct"] == task.verify(row["completion"], row["answer"])
        (scores,) = guide.scorer.score_ids([tokenizer(row["prompt"])["input_ids"]], [trace.ids])
        assert row["reward"] == pytest.approx(scores.aggregate("mean"), abs=1e-5)


def test_correct_reads_the_output_of_sample(bench, tokenizer, tmp_path):
    common = ["--max-new-tokens", 16, "--seed", 3]
    data = ["--task", "arithmetic", "--data", bench.experts]
    done = launcher()("sample", bench.model, *data, *common, "-n", 2, "-o", tmp_path / "samples.jsonl")
    assert done.code == 0, done.err
    given = rows(tmp_path / "samples.jsonl")
    given[1] |= {"completion": f"#### {given[1]['answer']}", "finished": True, "correct": True}
    write_jsonl(tmp_path / "samples.jsonl", given)
    words = ["correct", bench.model, tmp_path / "samples.jsonl", "--reward-model", bench.reward_model]
    words += [*common, "--rounds", 2, "-k", 3, "--threshold", 0.2]
    done = launcher()(*words, "-o", tmp_path / "corrected.jsonl")
    assert done.code == 0, done.err
    found = rows(tmp_path / "corrected.jsonl")
    guide = guide_of(bench, tokenizer)
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in given]
    traces = [encode_completion(tokenizer, row["completion"], row["finished"]) for row in given]
    expected = self_correct(guide, prompts, traces, rounds=2, k=3, rule=LevelRule(0.2))
    assert any(result.cuts for result in expected)
    task = get_task("arithmetic")
    for row, before, result in zip(found, given, expected, strict=True):
        assert row.keys() == {*FIELDS, "correct_before", "reward", "reward_before", "cuts", "sampled_tokens"}
        assert (row["question"], row["prompt"], row["answer"]) == (
            before["question"],
            before["prompt"],
            before["answer"],
        )
        assert row["correct_before"] == task.verify(before["completion"], before["answer"])
        assert row["correct"] == task.verify(row["completion"], row["answer"])
        assert (row["cuts"], row["sampled_tokens"], row["length"]) == (
            result.cuts,
            result.sampled_tokens,
            len(result.ids),
        )
        assert row["reward"] == pytest.approx(result.reward, abs=1e-5)
        assert row["reward"] >= row["reward_before"]
    assert found[1]["correct_before"]
    assert correction_summary(found) in done.err


def test_correct_by_log_prob_cuts_the_given_share_of_traces(bench, tokenizer, tmp_path):
    """By hand: mean log-prob of each line; the lowest line of half of the traces."""
    common = ["--max-new-tokens", 16, "--seed", 3]
    given = [
        {"prompt": "1 + 2 = ?\n", "completion": text, "answer": "3"}
        for text in ("1 + 2 = 3\n#### 3", "2 + 2 = 4\n#### 4", "1 + 1 = 2\n2 + 1 = 3\n#### 3", "7 - 2 = 5\n#### 5")
    ]
    write_jsonl(tmp_path / "rows.jsonl", given)
    policy = AutoModelForCausalLM.from_pretrained(bench.model)
    lowest, cuts = [], []
    for row in given:
        prompt = tokenizer(row["prompt"])["input_ids"]
        trace = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = policy(torch.tensor([prompt + trace])).logits[0].double()
        values = logits.log_softmax(-1)[range(len(prompt) - 1, len(prompt) + len(trace) - 1), trace]
        ends = [i + 1 for i, token in enumerate(trace) if tokenizer.decode([token]) == "\n"]
        bounds = list(zip([0, *ends], [*ends, len(trace)]))
        means = [float(values[start:end].mean()) for start, end in bounds]
        lowest.append(min(means))
        cuts.append(list(zip((start for start, _ in bounds), means)))
    threshold = sorted(lowest)[2]
    expected = [next((start for start, mean in steps if mean < threshold), None) for steps in cuts]
    assert sum(cut is not None for cut in expected) == 2
    words = ["correct", bench.model, tmp_path / "rows.jsonl", "--reward-model", bench.reward_model, *common]
    # --reference changes the rewards, but not where a trace is cut.
    words += ["--rounds", 1, "-k", 2, "--suspect", "logprob", "--share", 0.5, "--reference", bench.model]
    done = launcher()(*words, "-o", tmp_path / "corrected.jsonl")
    assert done.code == 0, done.err
    assert [row["cuts"] for row in rows(tmp_path / "corrected.jsonl")] == [[] if c is None else [c] for c in expected]


def test_reference_log_prob_is_added_to_rewards(bench, tokenizer, experts, tmp_path):
    words = [
        "sample",
        bench.model,
        "--task",
        "arithmetic",
        "--data",
        bench.experts,
        "--max-new-tokens",
        16,
        "--seed",
        3,
    ]
    words += ["--guide", "reject", "-n", 2, "--reward-model", bench.reward_model, "--reference", bench.model]
    done = launcher()(*words, "-o", tmp_path / "guided.jsonl")
    assert done.code == 0, done.err
    lm = AutoModelForCausalLM.from_pretrained(bench.model)
    guide = guide_of(bench, tokenizer, reference=lm)
    found = [traces[0] for traces in reject(guide, [row["prompt"] for row in experts[:3]], n=2)]
    prompt_ids = [tokenizer(row["prompt"])["input_ids"] for row in experts[:3]]
    for row, trace, prompt in zip(rows(tmp_path / "guided.jsonl"), found, prompt_ids, strict=True):
        (scores,) = guide.scorer.score_ids([prompt], [trace.ids], reference=lm)
        (alone,) = guide.scorer.score_ids([prompt], [trace.ids])
        assert row["completion"] == trace.text
        assert row["reward"] == pytest.approx(scores.aggregate(), abs=1e-5)
        assert row["reward"] < alone.aggregate() - 0.1


# ---------- the comparison ----------


@pytest.mark.parametrize(
    ("budget", "shape"), [(1, (1, 1)), (2, (1, 2)), (4, (2, 2)), (7, (2, 3)), (8, (2, 4)), (16, (4, 4)), (64, (8, 8))]
)
def test_beam_shape_of_a_budget(budget, shape):
    assert beam_shape(budget) == shape


def test_comparison_matches_the_separate_methods(bench, experts, tokenizer):
    """Each row is recomputed by its method; the answers make one of the sampled traces correct."""
    task = get_task("arithmetic")
    guide = guide_of(bench, tokenizer, max_new_tokens=8)
    prompts = [row["prompt"] for row in experts[:3]]
    plain = tilt(guide, prompts, n=2, alpha=0.0, top_k=99)
    golds = [task.extract(traces[0].text) or "1" for traces in plain]
    comparison = Comparison(budgets=(1, 2), alpha=1.5, top_k=4, threshold=0.0)
    found = compare(guide, prompts, golds, task=task, comparison=comparison)
    table = {(r["method"], r["budget"]): r for r in found}
    assert len(table) == 1 + 12 + 13
    for (method, budget), found in (
        (("beam", 2), beam(guide, prompts, width=1, expansions=2)),
        (("reject", 2), reject(guide, prompts, n=2)),
        (("tilt", 2), tilt(guide, prompts, n=2, alpha=1.5, top_k=4)),
        (("reward", 2), plain),
        (("logprob", 2), [sorted(traces, key=lambda trace: -trace.logprob) for traces in plain]),
        (
            ("reward_logprob", 2),
            [sorted(traces, key=lambda trace: -trace.reward - trace.logprob) for traces in plain],
        ),
        (("majority", 1), tilt(guide, prompts, n=1, alpha=0.0, top_k=99)),
    ):
        expected = [float(task.verify(traces[0].text, gold)) for traces, gold in zip(found, golds, strict=True)]
        assert table[method, budget]["right"] == expected
        assert table[method, budget]["sampled_tokens"] == sum(traces[0].sampled_tokens for traces in found) / 3
    verified = [[task.verify(trace.text, gold) for trace in traces] for traces, gold in zip(plain, golds, strict=True)]
    assert table["oracle", 2]["right"] == [float(any(right)) for right in verified]
    prompt_ids = guide.encode(prompts)
    single = [traces[0] for traces in tilt(guide, prompts, n=1, alpha=0.0, top_k=99)]
    corrected = self_correct(guide, prompt_ids, [trace.ids for trace in single], rounds=1, k=1, rule=LevelRule(0.0))
    tokens = sum(c.sampled_tokens + s.sampled_tokens for c, s in zip(corrected, single, strict=True)) / 3
    assert table["self_correct", 2]["sampled_tokens"] == tokens


def test_reward_that_includes_log_prob_has_no_log_prob_baselines(bench, experts, tokenizer):
    guide = guide_of(bench, tokenizer, max_new_tokens=4)
    guide = dataclasses.replace(guide, reference=guide.policy)
    found = compare(guide, [experts[0]["prompt"]], ["1"], task=get_task("arithmetic"), comparison=ONE)
    assert not {row["method"] for row in found} & {"reward_logprob", "reward_logprob_vote"}


def test_non_finite_reward_stops_the_comparison(bench, experts, tokenizer):
    guide = guide_of(bench, tokenizer, max_new_tokens=4)
    with torch.no_grad():
        for parameter in guide.scorer.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(RunFailed, match="the model gives a reward that is not finite"):
        list(compare(guide, [experts[0]["prompt"]], ["1"], task=get_task("arithmetic"), comparison=ONE))


def test_candidate_order_is_independent_of_the_reward():
    """Ties of a vote go to the first candidate, so the best by reward must be first no more often than by chance."""
    common = {"prompt": 0, "ids": [1], "finished": True, "logprob": 0.0, "sampled_tokens": 8}
    traces = [Guided(**common, text=text, reward=reward) for text, reward in (("a", 2.0), ("b", 1.0))]
    rows = candidates([traces] * 400, ["1"] * 400, get_task("arithmetic"))
    assert 150 < sum(row[0].reward == 2.0 for row in rows) < 250


def test_evaluate_guided_command(bench, refused, tmp_path):
    words = ["evaluate", "guided", bench.model, "--reward-model", bench.reward_model, "--task", "arithmetic"]
    words += ["--max-new-tokens", 8, "--budget", 2, "--threshold", 0, "--data"]
    done = launcher()(*words, bench.experts, "--json", "-o", tmp_path / "evaluation")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result == json.loads((tmp_path / "evaluation" / "guided.json").read_text(encoding="utf-8"))
    assert result["questions"] == 3
    methods = ["greedy", *POOL_METHODS, "beam", "reject", "tilt", "self_correct"]
    assert [row["method"] for row in result["rows"]] == methods
    for row in result["rows"]:
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
    write_jsonl(tmp_path / "open.jsonl", [{"prompt": "1 + 1 = ?\n"}])
    assert "no gold answer" in refused(*words, tmp_path / "open.jsonl")
    assert "at temperature 0" in refused(*words, bench.experts, "--temperature", 0)


def test_correction_summary_by_hand():
    def row(before, after, tokens=10, gain=0.0):
        return {
            "correct_before": before,
            "correct": after,
            "sampled_tokens": tokens,
            "reward": gain,
            "reward_before": 0.0,
        }

    found = [
        row(True, True, 0),
        row(True, False, gain=1.0),
        row(False, True, gain=0.5),
        row(False, False),
        row(True, True),
    ]
    assert correction_summary(found) == (
        "5 traces, 2 changed, 40 tokens sampled; of 5 with a known answer 3 right before, 3 right after "
        "(1 repaired, 1 broken)"
    )
    assert correction_summary([row(None, None)]) == "1 traces, 0 changed, 10 tokens sampled"


@pytest.fixture
def ended(monkeypatch, capsys):
    """`ended(code, word, ...)` runs the command line in this process, checks its exit code and returns its output."""

    def run(code: int, *argv: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["tracereward", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            app.main()
        captured = capsys.readouterr()
        assert end.value.code == code, captured.err
        return SimpleNamespace(out=captured.out, err=captured.err)

    return run


@pytest.fixture
def refused(ended):
    """`refused(word, ...)` runs the command line, checks that it fails and returns the error message."""

    def run(*argv: object) -> str:
        printed = ended(2, *argv)
        assert printed.out == ""
        assert "Traceback" not in printed.err
        return printed.err

    return run


@pytest.fixture
def ran(ended):
    """`ran(word, ...)` runs the command line successfully and returns its stderr."""
    return lambda *argv: ended(0, *argv).err


def killed(words: list[object], output: Path) -> bytes:
    """Kill a command just before its output is renamed; the origin file of its rows."""
    assert launcher()(*words, output, trap=trap("rename", output.name)).code == -signal.SIGKILL
    return output.with_name(output.name + ".part.json").read_bytes()


def test_resuming_with_other_arguments_is_refused(bench, ran, refused, tmp_path):
    output = tmp_path / "guided.jsonl"
    common = ["--task", "arithmetic", "--data", bench.experts, "--max-new-tokens", 4, "--guide", "tilt", "-n", 2]
    words = ["sample", bench.model, *common, "--reward-model", bench.reward_model]
    killed([*words, "-o"], output)
    words += ["-o", output, "--resume"]
    assert "--alpha (1.0, now 2.0)" in refused(*words, "--alpha", 2)
    assert "--alpha (1.0, now none)" in refused(*[{"tilt": "reject"}.get(word, word) for word in words])
    assert f"--reference (none, now {bench.model})" in refused(*words, "--reference", bench.model)
    message = refused(*[{bench.reward_model: bench.folder / "bare_reward_model"}.get(word, word) for word in words])
    assert f"--reward-model ({bench.reward_model}, now " in message
    lines = (tmp_path / "guided.jsonl.part").read_text().splitlines(keepends=True)
    (tmp_path / "guided.jsonl.part").write_text(lines[0] + '{"prompt": "1"}\n')
    assert "guided.jsonl.part:2: not a row that this command wrote" in refused(*words)
    (tmp_path / "guided.jsonl.part").write_text("".join(lines))
    ran(*words, "--batch-size", 2)  # does not change rows
    correct = ["correct", bench.model, output, "--reward-model", bench.reward_model, "--max-new-tokens", 4, "-k", 1]
    correct += ["--threshold", 0]
    killed([*correct, "-o"], tmp_path / "corrected.jsonl")
    correct += ["-o", tmp_path / "corrected.jsonl", "--resume"]
    assert "--rounds (3, now 1); --threshold (0.0, now 0.5)" in refused(*correct, "--threshold", 0.5, "--rounds", 1)
    write_jsonl(output, rows(output)[1:])
    assert f"data ({output}: the same name, other content)" in refused(*correct)


@pytest.mark.parametrize("words", [["--guide", "beam", "--beam", 2, "--expansions", 2], ["--guide", "tilt", "-n", 2]])
def test_interrupted_guided_samples_are_resumed(bench, ran, tmp_path, words):
    """Chunks of one question; a question with possibly incomplete rows is sampled again, with the same result."""
    common = ["--task", "arithmetic", "--data", bench.experts, "--max-new-tokens", 12, "--batch-size", 2]
    words = ["sample", bench.model, *common, "--reward-model", bench.reward_model, *words, "-o"]
    made_of = killed(words, tmp_path / "full.jsonl")
    assert json.loads(made_of).keys() == ORIGIN | {"--guide", "--split", "--limit", "--template"} | (
        {"--beam", "--expansions", "--lookahead"} if "beam" in words else {"-n", "--alpha", "--top-k"}
    )
    ran(*words, tmp_path / "full.jsonl", "--overwrite")
    full = (tmp_path / "full.jsonl").read_bytes()
    lines = full.splitlines(keepends=True)
    assert len(lines) == 6
    for written, done in ((0, 0), (1, 0), (3, 1), (4, 1), (5, 2), (6, 2)):
        output = tmp_path / f"{written}.jsonl"
        tail = lines[written][:20] if written < 6 else b""
        output.with_name(output.name + ".part").write_bytes(b"".join(lines[:written]) + tail)
        output.with_name(output.name + ".part.json").write_bytes(made_of)
        assert f"resuming after {done} questions" in ran(*words, output, "--resume")
        assert output.read_bytes() == full, written
    assert "is finished" in ran(*words, tmp_path / "full.jsonl", "--resume")


def test_interrupted_correct_is_resumed(bench, ran, tmp_path):
    """Chunks of two; the threshold and the summary cover all rows."""
    data = ["--task", "arithmetic", "--data", bench.experts, "--max-new-tokens", 12]
    ran("sample", bench.model, *data, "-n", 2, "-o", tmp_path / "samples.jsonl")
    words = ["correct", bench.model, tmp_path / "samples.jsonl", "--reward-model", bench.reward_model]
    words += ["--max-new-tokens", 12, "--share", 0.5, "--batch-size", 4, "-k", 2, "--rounds", 1, "-o"]
    made_of = killed(words, tmp_path / "full.jsonl")
    assert json.loads(made_of).keys() == ORIGIN | {"--rounds", "-k", "--suspect", "--threshold", "--share"}
    summary = ran(*words, tmp_path / "full.jsonl", "--overwrite").splitlines()[-1]
    assert "6 traces, " in summary
    full = (tmp_path / "full.jsonl").read_bytes()
    lines = full.splitlines(keepends=True)
    for written, done in ((1, 0), (2, 2), (5, 4), (6, 6)):
        output = tmp_path / f"{written}.jsonl"
        output.with_name(output.name + ".part").write_bytes(b"".join(lines[:written]) + b'{"torn')
        output.with_name(output.name + ".part.json").write_bytes(made_of)
        resumed = ran(*words, output, "--resume").splitlines()
        assert f"resuming after {done} rows" in resumed[0]
        assert resumed[-1] == summary
        assert output.read_bytes() == full, written


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--guide", "beem"], "unknown guide 'beem': did you mean 'beam'?"),
        (["--guide", "beam", "--alpha", 2], "--alpha is an option of --guide tilt, not of beam"),
        (["--guide", "beam", "-n", 2], "-n is an option of --guide reject and tilt, not of beam"),
        (["--guide", "tilt", "--top-k", 2, "--beam", 3], "--beam is an option of --guide beam, not of tilt"),
        (["--guide", "reject", "-n", 2, "--keep", 5], "--keep 5: only -n 2 traces are sampled"),
        (["--guide", "tilt", "--alpha", "nan"], "--alpha must be a finite number"),
        (["--guide", "reject", "--resume"], "--resume needs --output"),
        (
            ["--guide", "tilt", "--temperature", 0],
            "at temperature 0 all samples are the same: --guide tilt would sample 8",
        ),
        (["--guide", "tilt", "--template", "chat"], "was trained on prompts by --template plain, not chat"),
        (["--beam", 3], "need --guide"),
        ([], "need --guide"),
    ],
)
def test_invalid_options_of_guided_sampling(bench, refused, given, message):
    words = ["sample", bench.folder / "bare", "--task", "arithmetic", "--data", bench.experts]
    assert message in refused(*words, "--reward-model", bench.folder / "bare_reward_model", *given)


def test_incompatible_models_are_refused(bench, refused, monkeypatch):
    monkeypatch.setattr(questions, "check_texts", lambda *_: None)  # the other tokenizer lacks the questions' words
    data = ["--task", "arithmetic", "--data", bench.experts, "--guide", "beam"]
    words = ["sample", bench.folder / "bare", *data]
    assert "--guide needs --reward-model" in refused(*words)
    assert "is not a reward model" in refused(*words, "--reward-model", bench.model)
    bare = ["--reward-model", bench.folder / "bare_reward_model"]
    assert "another tokenizer than the reward model" in refused("sample", bench.folder / "other", *data, *bare)
    assert "no such model folder" in refused("sample", bench.folder / "absent", *data, *bare)
    correct = ["correct", bench.folder / "other", bench.experts, "--threshold", 0]
    assert "another tokenizer than the reward model" in refused(*correct, *bare)


@pytest.mark.parametrize(
    ("row", "given", "message"),
    [
        ({"prompt": "1 + 1 = ?\n", "steps": ["1 + 1 = 2"]}, [], "rows.jsonl:1: correct needs a completion in each row"),
        ({"prompt": "1 + 1 = ?\n"}, [], "rows.jsonl:1: needs a completion"),
        ({"prompt": "1 + 1 = ?\n", "completion": "2"}, ["--temperature", 0], "-k is 4: at temperature 0"),
        ({"prompt": "1 + 1 = ?\n", "completion": "2"}, ["--task", "arithmetik"], "did you mean 'arithmetic'?"),
        ({"prompt": "1 + 1 = ?\n", "completion": "2"}, ["--suspect", "length"], "suspect"),
        ({"prompt": "1 + 1 = ?\n", "completion": "2"}, ["--threshold", "nan"], "--threshold must be a number"),
        ({"prompt": "1 + 1 = ?\n", "completion": "2"}, ["--suspect", "logprob"], "give --share 0.2"),
        ({"prompt": "1 + 1 = ?\n", "completion": "2"}, [], "no rule for the first error: fit one"),
        ({"prompt": "1 + 1 = ?\n", "completion": "2"}, ["--share", 0.2, "--threshold", 0], "give one of them"),
    ],
)
def test_invalid_input_of_correct(bench, refused, tmp_path, row, given, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    words = ["correct", bench.folder / "bare", tmp_path / "rows.jsonl"]
    assert message in refused(*words, "--reward-model", bench.folder / "bare_reward_model", *given)


def test_length_limit_beyond_the_reward_model_is_refused(bench, refused):
    words = ["sample", bench.model, "--task", "arithmetic", "--data", bench.experts, "--guide", "reject"]
    assert "the reward model reads 128" in refused(*words, "--reward-model", bench.reward_model)
