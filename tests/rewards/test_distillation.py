"""Distillation into a token head: learning, the reported fit, and a plain checkpoint."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification

from helpers.unloadable import unloadable
from tracereward.cli.app import app
from tracereward.commands.export import ExportOptions, run_export
from tracereward.errors import InputError, RunFailed
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.reports.verdicts import read_verdict, write_verdict
from tracereward.rewards.distillation import (
    Example,
    check_rows,
    distill,
    examples_of,
    measure,
    rewards_of,
    squared_error,
)
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.synthetic.arithmetic import generate
from tracereward.verdict import Comparison, Verdict


def build(folder, tokenizer, head, **settings) -> TokenRewardModel:
    torch.manual_seed(0)
    model = TokenRewardModel.from_backbone(
        str(folder), RewardSettings(head=head, **settings), tokenizer, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def examples(tokenizer):
    """Correct and wrong traces of 150 problems, labelled."""
    found = []
    for row in generate("misconception", 150, seed=3, mistake_rate=0.5):
        correct = row["completion"].endswith(f"#### {row['answer']}")
        ids = tuple(encode_completion(tokenizer, row["completion"]))
        prompt = tuple(encode_prompt(tokenizer, row["prompt"]))
        found.append(Example(where="", prompt=prompt, completion=ids, correct=correct))
        found.append(Example(where="", prompt=prompt, completion=(*ids[:-2], 20, ids[-1]), correct=False))
    return found


def test_student_learns_the_rewards_of_the_teacher(tiny_model_folder, tokenizer, examples, tmp_path):
    """On held-out prompts R2 is low for a hardly trained head and higher after training."""
    teacher = build(tiny_model_folder, tokenizer, "action", beta_clip=6.0, temperature=2.0, reward_form="logit")
    teacher.save_pretrained(tmp_path / "teacher")
    loaded = TokenRewardModel.from_pretrained(str(tmp_path / "teacher"))
    options = {"learning_rate": 3e-3, "token_budget": 1024}
    student, fit = distill(loaded, tmp_path / "teacher", examples, epochs=12, **options)
    _, barely = distill(loaded, tmp_path / "teacher", examples[:40], epochs=1, learning_rate=1e-6, token_budget=1024)
    assert barely.r2 < 0.2
    assert fit.r2 > 0.25
    assert fit.held_out == 60
    assert fit.traces == 240
    assert student.settings == dataclasses.replace(teacher.settings, head="token", reward_form="", temperature=1.0)

    student.save_pretrained(tmp_path / "student", "\nDistilled.\n")
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "student").eval()
    again = TokenRewardModel.from_pretrained(str(tmp_path / "student"))
    example = examples[0]
    (rewards,) = rewards_of(again, [example], 1024)
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([[*example.prompt, *example.completion]])).logits[0, :, 0]
    expected = logits[len(example.prompt) :].clamp(-6, 6)
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=0)


def test_fit_matches_its_definition(tiny_model_folder, tokenizer, examples):
    """R2 over supervised positions only, in numpy; the within-prompt AUROC of trace means."""
    teacher = build(tiny_model_folder, tokenizer, "action", granularity="step")
    student = build(tiny_model_folder, tokenizer, "token", granularity="step")
    test = examples[:24]
    fit = measure(teacher, student, test, trained=6, token_budget=512)
    y, f, newline = [], [], tokenizer.convert_tokens_to_ids("\n")
    wins = []
    before, after = rewards_of(teacher, test, 512), rewards_of(student, test, 512)
    for example, a, b in zip(test, before, after, strict=True):
        for t, token in enumerate(example.completion):
            if token == newline or t == len(example.completion) - 1:
                y.append(float(a[t]))
                f.append(float(b[t]))
    for first, second in zip(range(0, 24, 2), range(1, 24, 2)):
        if test[first].correct:
            wins.append(float(after[first].mean() > after[second].mean()))
    y, f = np.array(y), np.array(f)
    assert fit.r2 == pytest.approx(1 - ((y - f) ** 2).sum() / ((y - y.mean()) ** 2).sum(), abs=1e-5)
    assert fit.auroc_after == pytest.approx(np.mean(wins))
    assert (fit.traces, fit.held_out) == (6, 24)


def test_loss_covers_supervised_positions_only(tiny_model_folder, tokenizer, examples):
    student = build(tiny_model_folder, tokenizer, "token", granularity="sparse")
    chosen = examples[:5]
    targets = [torch.arange(len(e.completion), dtype=torch.float32) for e in chosen]
    with torch.no_grad():
        loss = squared_error(student, chosen, targets)
        last = [float(student(student.pack([e.prompt], [e.completion]))[0, -1]) for e in chosen]
    expected = np.mean([(a - float(t[-1])) ** 2 for a, t in zip(last, targets, strict=True)])
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("head", ["token", "airl"])
def test_token_classifier_is_not_trained(tiny_model_folder, tokenizer, examples, head):
    teacher = build(tiny_model_folder, tokenizer, head, temperature=2.0)
    student, fit = distill(teacher, tiny_model_folder, examples)
    assert fit.r2 == 1.0
    assert fit.auroc_before == fit.auroc_after
    assert student.settings.head == "token"


def test_rows_become_examples(tiny_model_folder, tokenizer):
    model = build(tiny_model_folder, tokenizer, "token")
    rows = [("rows.jsonl:1", {"prompt": "1 + 1 = ?\n", "completion": "1 + 1 = 2\n#### 2", "finished": False})]
    with pytest.raises(InputError, match="at least two prompts"):
        check_rows(rows)
    rows.append(("rows.jsonl:2", {"prompt": "2 + 1 = ?\n", "completion": "#### 3", "correct": True}))
    check_rows(rows)
    cut, ended = examples_of(rows, model)
    assert cut.completion == tuple(encode_completion(tokenizer, "1 + 1 = 2\n#### 2"))[:-1]
    assert (ended.completion, ended.correct) == (tuple(encode_completion(tokenizer, "#### 3")), True)
    with pytest.raises(InputError, match=r"rows\.jsonl:1: export needs one completion"):
        check_rows([("rows.jsonl:1", {"prompt": "1", "candidates": ["2"]})])
    with pytest.raises(InputError, match=r"rows\.jsonl:1: correct must be true or false"):
        check_rows([("rows.jsonl:1", {"prompt": "1", "completion": "2", "correct": "false"})])
    long = {"prompt": "1 + 1 = ?\n", "completion": "\n" * 200}
    with pytest.raises(InputError, match=r"rows\.jsonl:3: .* 201 completion tokens, the reward model reads 128"):
        examples_of([*rows, ("rows.jsonl:3", long)], model)


def test_divergence_raises_with_a_hint(tiny_model_folder, tokenizer, examples):
    """The parameters after the last step have no loss, so their rewards are checked."""
    teacher = build(tiny_model_folder, tokenizer, "action")
    for epochs in (1, 3):
        with pytest.raises(RunFailed, match="use a lower --learning-rate"):
            distill(teacher, tiny_model_folder, examples[:8], epochs=epochs, learning_rate=1e9, token_budget=10**6)
    with torch.no_grad():
        teacher.head.b.fill_(torch.nan)
    with pytest.raises(RunFailed, match="weights may be damaged"):
        distill(teacher, tiny_model_folder, examples[:8])


def test_command(tiny_model_folder, tokenizer, tmp_path):
    from typer.testing import CliRunner

    build(tiny_model_folder, tokenizer, "implicit").save_pretrained(tmp_path / "rm")
    data = tmp_path / "rows.jsonl"
    rows = generate("misconception", 10, seed=8)
    data.write_text("".join(json.dumps({**row, "correct": True}) + "\n" for row in rows))
    words = ["export", str(tmp_path / "rm"), "--data", str(data), "-o", str(tmp_path / "out"), "--epochs", "1"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["held_out"] == 2
    assert printed["auroc_before"] is None, "undefined if all are correct; JSON has no NaN"
    assert "Distilled from a reward model with head `implicit`" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(InputError, match="exists already"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    words[1] = str(unloadable(tmp_path / "rm", tmp_path / "bare"))  # the errors below come first
    words[5] = str(tmp_path / "more" / "out")
    for rate in ("0", "-1", "nan", "1e9"):
        with pytest.raises(InputError, match="--learning-rate must be above 0 and at most 1"):
            CliRunner().invoke(app, [*words, "--learning-rate", rate], catch_exceptions=False)
    data.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(InputError, match="at least two prompts"):
        CliRunner().invoke(app, words, catch_exceptions=False)


@pytest.mark.parametrize(("head", "kept"), [("token", True), ("implicit", False)])
def test_verdict_is_kept_if_the_rewards_are(tiny_model_folder, tokenizer, tmp_path, head, kept):
    build(tiny_model_folder, tokenizer, head).save_pretrained(tmp_path / "rm")
    comparison = Comparison(baseline="majority", difference=0.1, low=0.02, high=0.18)
    verdict = Verdict(method="vote", questions=40, outcome="better", comparisons=(comparison,), aurocs={})
    write_verdict(tmp_path / "rm", verdict)
    rows = generate("misconception", 10, seed=8)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**row, "correct": True}) + "\n" for row in rows))
    data, output = str(tmp_path / "rows.jsonl"), tmp_path / "out"
    run_export(ExportOptions(model=str(tmp_path / "rm"), data=data, output=output, epochs=1))
    assert read_verdict(output) == (verdict if kept else None)
