"""Step-level evaluation: scores against plain forward passes, and results for oracle and constant rewards."""

import copy
import itertools
import json
import math
import random
import re
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.paths import SHARED
from helpers.tiny import launcher
from tracereward.data.readers import read_rows
from tracereward.errors import InputError, RunFailed
from tracereward.evaluate import perturbation
from tracereward.evaluate.perturbation import changed_step, evaluate_perturbations
from tracereward.evaluate.step_data import StepTrace, read_step_traces, split_by_question
from tracereward.evaluate.steps import encode_steps, evaluate_steps, step_scores, step_tables
from tracereward.files import write_jsonl
from tracereward.modeling.steps import LINES, StepRule
from tracereward.reports.report import Report, write_report
from tracereward.rewards.first_error_rules import FirstErrorRule
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.records import Trace
from tracereward.rewards.settings import RewardSettings

NEWLINE = 3  # of the arithmetic tokenizer
PROCESSBENCH = SHARED / "processbench" / "math.jsonl.gz"


@pytest.fixture(scope="module")
def policy(tiny_model_folder):
    """A causal LM with non-uniform next-token distributions."""
    lm = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return lm.eval()


@pytest.fixture(scope="module")
def model(tiny_model_folder, tokenizer, policy):
    """A reward model with perturbed weights, different from the policy."""
    settings = RewardSettings(head="action", beta_clip=50.0)
    made = TokenRewardModel.from_backbone(str(tiny_model_folder), settings, tokenizer, dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made.eval()


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token per byte: a multi-byte character has several tokens."""
    ids = {piece: i for i, piece in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def wrong_equation(lines) -> int | None:
    """First wrong line of an arithmetic trace: a false equation, or an answer other than the last result."""
    result = None
    for n, line in enumerate(lines):
        if match := re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", line):
            a, operator, b, result = int(match[1]), match[2], int(match[3]), int(match[4])
            if {"+": a + b, "-": a - b, "*": a * b}[operator] != result:
                return n
        elif line != f"#### {result}":
            return n
    return None


class Oracle(TokenRewardModel):
    """A reward model with reward 1 for each token, but -5 in the first wrong line, the line's end included."""

    def compute_rewards(self, prompts, completions, options):
        rewards = []
        for ids in completions:
            line, lines = 0, self.tokenizer.decode(ids, skip_special_tokens=True).split("\n")
            wrong = wrong_equation(lines)
            rewards.append(torch.ones(len(ids)))
            for t, token in enumerate(ids):
                if line == wrong:
                    rewards[-1][t] = -5.0
                line += token == NEWLINE
        return rewards


class Constant(TokenRewardModel):
    """A reward model with the same reward for every token."""

    def compute_rewards(self, prompts, completions, options):
        return [torch.ones(len(ids)) for ids in completions]


def traces_of(rows, wrong_at: dict[int, int]) -> list[StepTrace]:
    """Arithmetic traces; `wrong_at` maps a row to the step whose result is made wrong."""
    traces = []
    for i, row in enumerate(rows):
        steps = row["completion"].split("\n")
        if i in wrong_at:
            left, _, right = steps[wrong_at[i]].partition(" = ")
            steps[wrong_at[i]] = f"{left} = {int(right) + 1}"
        group = "wrong" if i in wrong_at else "right"
        traces.append(StepTrace(f"rows:{i}", row["prompt"].strip(), steps, wrong_at.get(i), group))
    return traces


@pytest.fixture(scope="module")
def halves(experts):
    """Traces to evaluate and traces to fit on."""
    return traces_of(experts[:8], {0: 0, 1: 1, 2: 0, 3: 1}), traces_of(experts[8:], {0: 1, 1: 0})


# ---------- alignment ----------


@pytest.mark.parametrize("delimiter", ["\n", "\n\n", ". "])
def test_steps_have_the_tokens_that_overlap_them(byte_tokenizer, delimiter):
    """Also if a step contains the delimiter or multi-byte characters."""
    steps = ["ab\ncd", "é 日本", "1. 2. 3", "x"]
    text, spans = StepRule(delimiter).join(steps)
    encoded = encode_steps(byte_tokenizer, Trace(where="here", prompt="q", completion=text, spans=spans))
    written = [
        bytes(byte_tokenizer.decode([encoded.completion[t] for t in tokens]), "utf-8") for tokens in encoded.steps
    ]
    assert written == [step.encode() for step in steps]
    ends = [tokens[-1] for tokens in encoded.steps]
    gaps = [after[0] - end - 1 for end, after in zip(ends, encoded.steps[1:])]
    assert gaps == [len(delimiter)] * 3, "the delimiter's own tokens belong to no step"
    assert ends[-1] == len(encoded.completion) - 2, "nor does the end of the sequence"


def test_token_across_two_steps_belongs_to_both(tokenizer):
    """The arithmetic vocabulary has one token for " + ": a step that starts inside it gets that token too."""
    text = "12 + 9"
    encoded = encode_steps(tokenizer, Trace(where="here", prompt="q", completion=text, spans=[(0, 4), (4, 6)]))
    assert encoded.steps == [[0, 1], [1, 2]]


def test_step_without_a_token_raises(byte_tokenizer):
    with pytest.raises(InputError, match=r"here: step 1 .* has no token"):
        encode_steps(byte_tokenizer, Trace(where="here", prompt="q", completion="ab", spans=[(0, 2), (2, 2)]))


# ---------- scores ----------


@pytest.mark.parametrize("aggregate", ["mean", "min"])
def test_scores_match_plain_forward_passes(model, policy, tokenizer, halves, aggregate):
    """One unpadded trace at a time; a step's tokens are those between newlines."""
    traces, _ = halves
    encoded = []
    for trace in traces:
        text, spans = LINES.join(trace.steps)
        one = Trace(where=trace.where, prompt=trace.question + "\n", completion=text, spans=spans)
        encoded.append(encode_steps(tokenizer, one))
    scores = step_scores(model, encoded, aggregate, policy=policy, token_budget=60)
    assert list(scores) == [
        "reward",
        "reward_drop",
        "reward_rule",
        "logprob",
        "reward_logprob",
        "reward_logprob_drop",
        "logprob_drop",
        "entropy",
    ]
    combine = {"mean": statistics.fmean, "min": min}[aggregate]
    for i, (trace, one) in enumerate(zip(traces, encoded)):
        prompt = tokenizer(trace.question + "\n")["input_ids"]
        ids = tokenizer("\n".join(trace.steps))["input_ids"]
        assert one.completion == [*ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = policy(torch.tensor([prompt + ids])).logits[0].double()
        probs = logits.softmax(-1)[len(prompt) - 1 : -1]
        log_probs = [math.log(probs[t, token]) for t, token in enumerate(ids)]
        entropies = [-float((p * p.log()).sum()) for p in probs]
        [of_trace] = model.score([trace.question + "\n"], ["\n".join(trace.steps)])
        steps: list[list[int]] = [[]]
        for t, token in enumerate(ids):
            steps.append([]) if token == NEWLINE else steps[-1].append(t)
        assert len(steps) == len(trace.steps)
        ends = [of_trace.rewards[step[-1] + 1] for step in steps]  # of the line's end, and the trace's
        lows = [0.0, *(one - min(ends[:k]) for k, one in enumerate(ends) if k)]
        lowest = np.convolve(of_trace.rewards, np.ones(8) / 8, mode="valid").min()
        expected = {
            "reward": [combine([of_trace.rewards[t] for t in step]) for step in steps],
            "reward_rule": [lowest if k == np.argmin(lows) else math.inf for k in range(len(steps))],
            "logprob": [combine([log_probs[t] for t in step]) for step in steps],
            "entropy": [combine([-entropies[t] for t in step]) for step in steps],
        }
        for name, values in expected.items():
            assert scores[name][i] == pytest.approx(values, abs=1e-4), name
        drops = [0.0, *(one - before for before, one in itertools.pairwise(expected["reward"]))]
        assert scores["reward_drop"][i] == pytest.approx(drops, abs=1e-4)
        both = [a + b for a, b in zip(expected["reward"], expected["logprob"])]
        assert scores["reward_logprob"][i] == pytest.approx(both, abs=1e-4)
        down = [0.0, *(one - before for before, one in itertools.pairwise(both))]
        assert scores["reward_logprob_drop"][i] == pytest.approx(down, abs=1e-4)
        steps_down = [scores["logprob"][i][k] - scores["logprob"][i][k - 1] for k in range(1, len(steps))]
        assert scores["logprob_drop"][i] == pytest.approx([0.0, *steps_down], abs=1e-6)


# ---------- evaluation ----------


def test_oracle_reward_finds_every_first_error(model, tokenizer, policy, halves):
    traces, fit = halves
    oracle = Oracle(model.backbone, tokenizer, model.settings)
    result = evaluate_steps(oracle, traces, fit, policy=policy)
    assert (result["traces"], result["erroneous"], result["correct"]) == (8, 4, 4)
    assert (result["fit_traces"], result["left_out"], result["fit_left_out"]) == (4, 0, 0)
    for method in ("reward", "reward_rule"):
        found = result["methods"][method]
        assert -5 < found["threshold"] <= 1
        for name in ("f1", "acc_error", "acc_correct", "hit_at_1", "hit_within_1", "hit_at_1_normalised"):
            assert found[name] == 1.0, name
    lengths = [len(t.steps) for t in traces[:4]]
    constant = evaluate_steps(Constant(model.backbone, tokenizer, model.settings), traces, fit)
    assert list(constant["methods"]) == [
        "reward",
        "reward_drop",
        "reward_rule",
        "noise",
        "first_step",
        "random",
        "no_error",
    ]
    assert constant["methods"]["reward"]["f1"] == 0.0
    assert constant["methods"]["reward"]["hit_at_1"] == pytest.approx(statistics.fmean(1 / n for n in lengths))
    for methods in (result["methods"], constant["methods"]):
        assert (methods["first_step"]["acc_error"], methods["first_step"]["acc_correct"]) == (0.5, 0.0)
        assert methods["first_step"]["hit_at_1"] == 0.5
        assert (methods["no_error"]["acc_error"], methods["no_error"]["acc_correct"]) == (0.0, 1.0)
        assert methods["first_step"]["f1"] == methods["no_error"]["f1"] == 0.0
        assert methods["random"]["acc_error"] == pytest.approx(statistics.fmean(1 / (n + 1) for n in lengths))
        assert [methods[name]["threshold"] for name in ("first_step", "random", "no_error")] == [None] * 3
    added = {"logprob", "reward_logprob", "reward_logprob_drop", "logprob_drop", "entropy"}
    assert set(result["methods"]) - set(constant["methods"]) == added
    assert result["methods"]["noise"] == constant["methods"]["noise"], "the same random numbers"
    assert 0 < result["methods"]["noise"]["threshold"] < 1
    groups = result["groups"]
    assert (groups["wrong"]["erroneous"], groups["wrong"]["correct"]) == (4, 0)
    assert groups["wrong"]["methods"]["reward"]["acc_error"] == 1.0
    assert groups["right"]["methods"]["reward"]["hit_at_1"] is None
    assert groups["right"]["methods"]["reward"]["acc_correct"] == 1.0


def test_row_of_the_stored_rule_is_that_of_its_threshold(model, tokenizer, halves):
    """The oracle's tokens have reward -5 in the first wrong step, 1 elsewhere."""
    traces, fit = halves
    for threshold, found in ((0.9, (1.0, 1.0)), (1.1, (1.0, 0.0)), (-5.0, (0.0, 1.0))):
        settings = replace(model.settings, first_error=FirstErrorRule(threshold=threshold))
        result = evaluate_steps(Oracle(model.backbone, tokenizer, settings), traces, fit)["methods"]["rule"]
        assert (result["acc_error"], result["acc_correct"], result["threshold"]) == (*found, threshold)


def test_results_do_not_depend_on_batches_or_order(model, policy, halves):
    traces, fit = halves
    full = evaluate_steps(model, traces, fit, policy=policy)
    parts = evaluate_steps(model, traces[::-1], fit[::-1], policy=policy, token_budget=40)
    json.dumps(full, allow_nan=False)
    for name, values in full["methods"].items():
        for key, value in values.items():
            if not key.endswith("interval"):  # the bootstrap depends on the order
                assert parts["methods"][name][key] == pytest.approx(value, abs=1e-4), (name, key)


def test_long_traces_are_skipped_and_counted(model, policy, tokenizer, halves):
    traces, fit = halves
    long = StepTrace("rows:9", "1 + 1 = ?", ["1 + 1 = 2"] * 40, 3, "wrong")
    oracle = Oracle(model.backbone, tokenizer, model.settings)
    result = evaluate_steps(oracle, [*traces, long], [replace(long, question="2 + 2 = ?"), *fit])
    assert (result["left_out"], result["fit_left_out"], result["traces"], result["fit_traces"]) == (1, 1, 8, 4)
    assert result["positions"] == 128
    assert result["methods"]["reward"]["f1"] == 1.0
    [table, _] = step_tables(result)
    assert "longer than 128 positions: 1 of these traces and 1 of those to fit on." in table.note
    with pytest.raises(InputError, match="none of 1 traces fits into the model's 128 positions"):
        evaluate_steps(oracle, [long], fit)


def test_invalid_input_raises(model, halves):
    traces, fit = halves
    other = replace(traces[2], where="other:5", steps=["1 + 1 = 2"])  # another trace of the same question
    with pytest.raises(InputError, match=r"rows:2: .* same question, in other:5"):
        evaluate_steps(model, traces, [*fit, other])
    wrong = f"{fit[0].where}: the threshold needs erroneous and correct traces; from here on 2 and 0 fit into 128"
    with pytest.raises(InputError, match=wrong):
        evaluate_steps(model, traces, fit[:2])
    for few in (([], fit), (traces, [])):
        with pytest.raises(InputError, match=f"{len(few[0])} traces to evaluate and {len(few[1])} to fit"):
            evaluate_steps(model, *few)
    with pytest.raises(InputError, match="unknown aggregate 'max'"):
        evaluate_steps(model, traces, fit, aggregate="max")
    with pytest.raises(InputError, match="unknown task"):
        evaluate_steps(model, traces, fit, task="maths")
    with pytest.raises(InputError, match="rows:8: field 'options' is missing for task 'mmlu_pro'"):
        evaluate_steps(
            model, traces, traces_of([{"prompt": "1?", "completion": "1 + 1 = 2"}] * 9, {})[8:], task="mmlu_pro"
        )


def test_non_finite_scores_raise(model, tokenizer, policy, halves):
    class Damaged(Constant):
        def compute_rewards(self, prompts, completions, options):
            return [values / torch.tensor(0.0) for values in super().compute_rewards(prompts, completions, options)]

    damaged = Damaged(model.backbone, tokenizer, model.settings)
    with pytest.raises(RunFailed, match=r"rows:\d+: the model gives a reward that is not finite"):
        evaluate_steps(damaged, *halves)
    broken = copy.deepcopy(policy)
    broken.lm_head.weight.data[5] = math.nan
    with pytest.raises(RunFailed, match=r"rows:\d+: the model gives a log-prob that is not finite"):
        evaluate_steps(model, *halves, policy=broken)


@pytest.mark.parametrize("suite", ["processbench", "perturbation"])
def test_command_prints_names_without_markup(model, experts, suite, tmp_path):
    """Data may contain a closing tag of rich's markup or an emoji's name. Also rejects an unknown aggregate."""
    model.save_pretrained(tmp_path / "rm")
    rows = [*experts]
    if suite == "processbench":
        rows = [
            {"problem": t.question, "steps": t.steps, "label": -1 if t.first_error is None else t.first_error}
            for t in traces_of(experts, {n: n % 2 for n in range(0, 12, 2)})
        ]
        rows = [{**row, "generator": ("[/x]", ":smile:")[n // 2 % 2]} for n, row in enumerate(rows)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    words = ["evaluate", suite, tmp_path / "rm", tmp_path / "rows.jsonl", "-o", tmp_path / "out"]
    done = launcher()(*words)
    assert done.code == 0, done.err
    assert (tmp_path / "out" / f"{suite}.html").is_file()
    if suite == "processbench":
        assert "[/x]" in done.out
        assert ":smile:" in done.out
    done = launcher()(*words, "--aggregate", "mena")
    assert done.code == 2
    assert "did you mean 'mean'" in done.err
    assert "Loading" not in done.err


def test_tables_contain_the_results(model, tokenizer, policy, halves, tmp_path):
    traces, fit = halves
    result = evaluate_steps(Oracle(model.backbone, tokenizer, model.settings), traces, fit, policy=policy)
    [table, groups] = step_tables(result)
    assert [row[0] for row in table.rows][:4] == ["reward", "reward drop", "rule for the first error", "log-prob"]
    assert table.rows[0][1:5] == ["100.0", "[100.0, 100.0]", "100.0", "100.0"]
    assert table.note.startswith("8 traces, 4 of them with an error, of 8 questions; thresholds fitted on 4 others.")
    assert groups.rows[0][:4] == ["right", 0, 4, None]
    assert groups.rows[1][:4] == ["wrong", 4, 0, "100.0"]
    page = tmp_path / "report.html"
    write_report(page, Report(title="t", summary="s", command="c", tables=[table, groups]))
    assert "Where is the first error?" in page.read_text(encoding="utf-8")


def test_real_processbench_through_a_byte_model(byte_tokenizer):
    """An untrained model on the real set: counts add up, and baselines without a model match the file."""
    if not PROCESSBENCH.is_file():
        pytest.skip("ProcessBench is not in ../shared/data")
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1400,
    )
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(config).eval()
    model = TokenRewardModel(backbone, byte_tokenizer, RewardSettings(task="math", beta_clip=50.0)).eval()
    fit, traces = split_by_question(read_step_traces(str(PROCESSBENCH), "processbench", limit=100), 0.5)
    result = evaluate_steps(model, traces, fit, policy=backbone)
    assert result["traces"] + result["left_out"] == len(traces)
    assert result["fit_traces"] + result["fit_left_out"] == len(fit)
    assert result["left_out"] > 0
    assert result["erroneous"] >= 5
    numbers = {trace.where: trace for trace in traces}
    raw = [(numbers[where], row) for where, row in read_rows(str(PROCESSBENCH)) if where in numbers]
    words = "Problem: \nPut the final answer in \\boxed{}.\nSolution:\n"

    def size(row) -> int:
        """Bytes of prompt and trace, plus the end of the sequence."""
        text = words + row["problem"].strip() + "\n".join(step.strip() for step in row["steps"])
        return len(text.encode()) + 1

    kept = [row for _, row in raw if size(row) <= 1400]
    assert len(kept) == result["traces"]
    wrong = [row for row in kept if row["label"] >= 0]
    assert result["erroneous"] == len(wrong)
    assert result["methods"]["first_step"]["acc_error"] == pytest.approx(
        statistics.fmean(row["label"] == 0 for row in wrong)
    )
    assert result["methods"]["random"]["acc_error"] == pytest.approx(
        statistics.fmean(1 / (1 + len(row["steps"])) for row in wrong)
    )
    assert result["methods"]["no_error"]["f1"] == 0.0


# ---------- inserted errors ----------


def test_spans_of_steps_and_changed_step():
    text = "a b\n\n  cd \n \ne"
    assert [text[start:end] for start, end in LINES.spans(text)] == ["a b", "cd", "e"]
    assert [changed_step(LINES.spans(text), at) for at in (0, 3, 7, 8, len(text) - 1)] == [0, 0, 1, 1, 2]


def test_oracle_reward_finds_every_inserted_error(model, tokenizer, policy, experts):
    oracle = Oracle(model.backbone, tokenizer, model.settings)
    kinds = ("operator", "nearby_number", "number")
    result = evaluate_perturbations(oracle, experts, policy=policy, kinds=kinds)
    json.dumps(result, allow_nan=False)
    assert (result["traces"], result["left_out"], list(result["kinds"])) == (12, 0, list(kinds))
    for kind in kinds:
        of = result["kinds"][kind]
        assert (of["applied"], of["not_applicable"], of["left_out"]) == (12, 0, 0)
        reward = of["methods"]["reward"]
        assert (reward["hit_at_1"], reward["hit_at_1_normalised"]) == (1.0, 1.0), kind
        assert (reward["auroc"], reward["win_rate"], reward["win_rate_interval"]) == (1.0, 1.0, [1.0, 1.0])
        assert set(of["methods"]) == {"reward", "logprob"}
        assert of["methods"]["logprob"]["hit_at_1"] < 1.0
    [table] = perturbation.step_tables(result)
    assert table.rows[0] == [
        "operator",
        12,
        "reward",
        "100.0",
        "[100.0, 100.0]",
        "100.0",
        1.0,
        "100.0",
        "[100.0, 100.0]",
    ]


def test_constant_reward_is_at_chance(model, tokenizer, experts):
    result = evaluate_perturbations(Constant(model.backbone, tokenizer, model.settings), experts)
    for kind, of in result["kinds"].items():
        assert of["applied"] + of["not_applicable"] == 12
        reward = of["methods"]["reward"]
        assert reward["hit_at_1_normalised"] == pytest.approx(0, abs=1e-12), kind
        assert (reward["auroc"], reward["win_rate"]) == (0.5, 0.5)
    dropped = result["kinds"]["drop_step"]["methods"]["reward"]["hit_at_1"]
    kept = statistics.fmean(1 / row["completion"].count("\n") for row in experts)  # one step fewer than in the original
    assert dropped == pytest.approx(kept)


def test_trace_log_probs_are_means_over_tokens(model, policy, tokenizer, experts):
    """Win rate from plain forward passes over the originals and the same copies."""
    result = evaluate_perturbations(model, experts, policy=policy, kinds=["number"], seed=3)
    wins = []
    for index, row in enumerate(experts):
        changed = perturbation.perturb(row["completion"], random.Random(f"3 number {index}"), ["number"])
        means = []
        for text in (row["completion"], changed.text):
            prompt, ids = tokenizer(row["prompt"])["input_ids"], [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                log_probs = policy(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
            means.append(statistics.fmean(float(log_probs[len(prompt) - 1 + t, i]) for t, i in enumerate(ids)))
        wins.append(means[0] > means[1])
    assert 0 < sum(wins) < 12
    assert result["kinds"]["number"]["methods"]["logprob"]["win_rate"] == pytest.approx(statistics.fmean(wins))


def test_trace_rewards_use_the_aggregate_of_the_settings(model, tokenizer, experts):
    wins = {}
    for how in ("mean", "last"):
        one = TokenRewardModel(model.backbone, tokenizer, replace(model.settings, aggregate=how))
        one.head = model.head
        result = evaluate_perturbations(one, experts, kinds=["number"], seed=3)["kinds"]["number"]["methods"]["reward"]
        pairs = []
        for index, row in enumerate(experts):
            changed = perturbation.perturb(row["completion"], random.Random(f"3 number {index}"), ["number"])
            scores = one.score([row["prompt"]] * 2, [row["completion"], changed.text])
            pairs.append([of_trace.aggregate(how) for of_trace in scores])
        wins[how] = statistics.fmean(right > wrong for right, wrong in pairs)
        assert result["win_rate"] == pytest.approx(wins[how])
    assert wins["mean"] != wins["last"]


def test_traces_without_an_applicable_error(model, experts):
    """One step: nothing to drop or swap. A number outside the vocabulary: the copy has the same tokens."""
    rows = [{"prompt": "1 + 1 = ?\n", "completion": "#### 2", "answer": "2"}]
    result = evaluate_perturbations(model, rows, kinds=["drop_step", "swap_steps", "number"])
    for kind in ("drop_step", "swap_steps"):
        assert result["kinds"][kind] == {"applied": 0, "not_applicable": 1, "left_out": 0, "methods": {}}
    assert result["kinds"]["number"]["applied"] == 1
    [table] = perturbation.step_tables(result)
    assert table.rows[0][:3] == ["drop_step", 0, None]
    unknown = [{"prompt": "1 + 1 = ?\n", "completion": "#### 55555555", "answer": "2"}]
    of = evaluate_perturbations(model, unknown, kinds=["number"])["kinds"]["number"]
    assert (of["applied"], of["not_applicable"]) == (0, 1)
    long = [{"prompt": "1 + 1 = ?\n", "completion": "1 + 1 = 2\n" * 40 + "#### 2", "answer": "2"}]
    assert evaluate_perturbations(model, [*long, *experts], kinds=["number"])["left_out"] == 1
    with pytest.raises(InputError, match="none of 1 traces fits"):
        evaluate_perturbations(model, long)
    with pytest.raises(InputError, match="unknown perturbation 'numbers'"):
        evaluate_perturbations(model, experts, kinds=["numbers"])
