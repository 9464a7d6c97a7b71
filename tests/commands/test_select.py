"""`tracereward select`: what is kept, and that TRL trains on it."""

import json
import math
import random
import sys

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from tracereward.cli.app import main
from tracereward.commands.partial_output import Output
from tracereward.commands.select import SelectOptions, run_select
from tracereward.data.keeping import Keeping
from tracereward.errors import InputError
from tracereward.files import read_jsonl, write_jsonl
from tracereward.synthetic.arithmetic import build_model, build_tokenizer


def row(question, text, reward, **more):
    return {"question": question, "prompt": f"{question} = ?\n", "completion": text, "reward": reward, **more}


ROWS = [
    row(1, "a #### 3", 0.5),
    row(1, "b #### 3", 0.9),
    row(1, "c #### 4", -0.5),
    row(1, "b  #### 3\n", 2.0),  # equal to the second but for white space: left out
    row(2, "d #### 5", -1.0),
    row(2, "e #### 6", -0.9),
    row(3, "f #### 7", 0.7),
]


@pytest.fixture
def select(tmp_path):
    """Runs the command on rows and returns what it wrote."""

    def run(rows, controls=False, **keeping):
        write_jsonl(tmp_path / "scored.jsonl", rows)
        output = Output(path=str(tmp_path / "out.jsonl"), resume=None, overwrite=True)
        data = str(tmp_path / "scored.jsonl")
        kept = Keeping(**keeping)
        run_select(SelectOptions(data=data, keeping=kept, controls=controls, task="arithmetic", output=output))
        return read_jsonl(tmp_path / "out.jsonl")

    return run


def texts(rows):
    return [one["completion"][0] for one in rows]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, "bef"),  # the best of each question, in the order of the questions
        ({"top": 2}, "baedf"),
        ({"top": 2, "threshold": 0.5}, "baf"),
        ({"share": 0.34}, "bf"),  # floor(.34 x 6) of all
        ({"top": 9, "share": 0.01}, "b"),
    ],
)
def test_traces(select, options, kept):
    assert "".join(texts(select(ROWS, **options))) == kept


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["b>c", "e>d"]),
        ({"margin": 0.5}, ["b>c"]),
        ({"answers": "same"}, ["b>a"]),
        ({"answers": "different", "top": 2}, ["b>c", "e>d"]),  # a has no other left
    ],
)
def test_pairs(select, options, expected):
    found = select(ROWS, format="dpo", **options)
    assert [f"{one['chosen'][0]}>{one['rejected'][0]}" for one in found] == expected
    labels = [(one["completion"][0], one["label"]) for one in select(ROWS, format="kto", **options)]
    assert labels == [(pair[i], i == 0) for pair in expected for i in (0, 2)]


def test_controls_have_the_same_size_and_use_no_reward(select, tmp_path, capsys):
    rng = random.Random(1)
    rows = []
    for question in range(30):
        right = rng.randrange(90)
        for index in range(6):
            answer = right if index < 3 else right + index  # three of six agree
            text = "1 + 1 = 2 " * rng.randint(1, 9) + f"#### {answer}"
            extra = {"logprob": -rng.random(), "answer": str(right)}
            rows.append(row(question, f"{index} {text}", len(text) / 10 + rng.random(), **extra))
    select(rows, top=2, controls=True)
    shown = capsys.readouterr().err
    by = {
        "random": None,
        "shortest": lambda one: -len(one["completion"]),
        "logprob": lambda one: one["logprob"],
    }
    for name, score in by.items():
        found = read_jsonl(tmp_path / f"out.{name}.jsonl")
        assert len(found) == 60
        if score is not None:
            value = {(one["prompt"], one["completion"]): score(one) for one in rows}
            for question in range(30):
                best = sorted(score(one) for one in rows if one["question"] == question)[-2:]
                prompt = f"{question} = ?\n"
                kept = sorted(value[prompt, one["completion"]] for one in found if one["prompt"] == prompt)
                assert kept == best
    majority = read_jsonl(tmp_path / "out.majority.jsonl")
    gold = {one["prompt"]: one["answer"] for one in rows}
    assert all(one["completion"].endswith(f"#### {gold[one['prompt']]}") for one in majority)
    assert "length in characters higher" in shown  # the reward was length
    assert "100.0" in next(line for line in shown.splitlines() if "majority" in line)


def test_bad_rows(select):
    with pytest.raises(InputError, match=r"scored\.jsonl.*2.*tracereward score"):
        select([ROWS[0], {"prompt": "x", "completion": "y"}])
    with pytest.raises(InputError, match="logprob"):
        select(ROWS, controls=True)
    with pytest.raises(InputError, match="nothing is kept"):
        select(ROWS, threshold=9.0)


def test_trl_trains_on_the_rows(select, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    build_model(tokenizer, seed=0, hidden_size=16, layers=1, heads=2).save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    chat = [{**one, "prompt": [{"role": "user", "content": one["prompt"]}]} for one in ROWS]
    common = {"output_dir": str(tmp_path / "run"), "max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False}
    SFTTrainer(
        model=model,
        args=SFTConfig(**common),
        train_dataset=Dataset.from_list(select(ROWS)),
    ).train()
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**common),
        train_dataset=Dataset.from_list(select(ROWS, format="dpo")),
    )
    trainer.train()
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    [first, *_] = select(chat, format="dpo")
    assert first["chosen"] == [{"role": "assistant", "content": ROWS[1]["completion"]}]
    assert json.dumps(first["prompt"]) == json.dumps(chat[0]["prompt"])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--margin", "1"], "--margin"),
        (["--answers", "same"], "--answers"),
        (["--format", "dpo", "--share", "0.5"], "--share"),
        (["--format", "kto", "--threshold", "0"], "--threshold"),
        (["--format", "ppo"], "sft"),
        (["--controls"], "-o FILE"),
    ],
)
def test_options_that_do_not_fit(words, named, monkeypatch, capsys, tmp_path):
    write_jsonl(tmp_path / "scored.jsonl", ROWS)
    monkeypatch.setattr(sys, "argv", ["tracereward", "select", str(tmp_path / "scored.jsonl"), *words])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert named in err
