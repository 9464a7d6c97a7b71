"""A policy remembers how its prompts were made: training stores it, and what follows uses it and says so."""

import json
from types import SimpleNamespace

import pytest

from helpers.chat_models import CHATML, SWITCH, save_chat_model
from tracereward import as_reward_func
from tracereward.cli.app import app
from tracereward.cli.training_options import parse
from tracereward.commands.grpo import run_grpo
from tracereward.commands.prepared import inherit
from tracereward.commands.questions import Questions, in_force, load_questions
from tracereward.commands.sample_guided import check_template
from tracereward.commands.score import score_rows
from tracereward.commands.sft import run_sft
from tracereward.commands.train import run_train
from tracereward.errors import InputError
from tracereward.files import read_json, write_jsonl
from tracereward.modeling.policy_settings import PolicySettings, remembered
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import read_settings
from tracereward.runs.job import Job
from tracereward.runs.same_run import resolved

OFF = {"enable_thinking": False}
ROWS = [{"prompt": f"{n} + 1?", "completion": f"#### {n + 1}", "answer": str(n + 1)} for n in range(8)]
HEAD = "<|im_start|>user\n0 + 1?<|im_end|>\n<|im_start|>assistant\n"
QUIET = f"{HEAD}<think>\n\n</think>\n\n"
SHORT = ["--max_completion_length", "12", "--max_steps", "1", "--save_steps", "1", "--report_to", "none"]
SHORT += ["--per_device_train_batch_size", "4", "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`sft` with a variable of the template, then `train` of its policy, which is not told of either."""
    folder = tmp_path_factory.mktemp("remembers")
    model = save_chat_model(folder / "start", "{{ strftime_now('%d %b %Y') }}" + SWITCH)
    data = folder / "rows.jsonl"
    write_jsonl(data, ROWS)
    given = ["--dataset_name", str(data), *SHORT]
    chat = ["--template", "chat", "--chat_template_kwargs", json.dumps(OFF)]
    options = parse("sft", ["--model_name_or_path", model, "--output_dir", str(folder / "sft"), *chat, *given])
    run_sft(*options)
    policy = str(folder / "sft/policy")
    loop = ["--num_generations", "2", "--discriminator_warmup_updates", "1", "--warmup_rollouts", "2"]
    options = parse("train", ["--model_name_or_path", policy, "--output_dir", str(folder / "train"), *loop, *given])
    run_train(*options)
    return SimpleNamespace(folder=folder, model=model, data=str(data), policy=policy, given=given)


def test_every_model_of_a_run_has_the_settings(made):
    """The policies, a checkpoint, the reward model; the inherited options are in config.yaml."""
    expected = {"task": "generic", "template": "chat", "chat_template_kwargs": OFF, "date": "2024-07-26"}
    for name in ("sft/policy", "train/policy", "sft/checkpoints/checkpoint-1", "train/reward_model"):
        stored = read_json(made.folder / name / "tracereward.json")
        assert {key: stored[key] for key in expected} == expected, name
    config = (made.folder / "train/config.yaml").read_text()
    assert "template: chat\n" in config
    assert "chat_template_kwargs:\n  enable_thinking: false\n" in config
    assert remembered(made.policy) == PolicySettings(**expected)
    assert remembered(made.model) is None
    assert remembered(str(made.folder / "train/reward_model")) is None
    assert read_settings(made.folder / "train/reward_model").rendering == remembered(made.policy).rendering


def test_another_template_does_not_resume(made):
    argv = ["--output_dir", str(made.folder / "sft"), "--resume"]
    with pytest.raises(InputError, match=r"has a run with other options \(chat_template_kwargs: .* before, \{\} now"):
        run_sft(*parse("sft", [*argv, "--chat_template_kwargs", "{}"]))
    with pytest.raises(InputError, match="chat_template_kwargs"):
        run_sft(*parse("sft", [*argv, "--template", "plain"]))


def test_questions_are_asked_as_in_training(made, capsys):
    asked = in_force(Questions(data=made.data), made.policy)
    assert load_questions(asked, made.policy)[1][0] == f"26 Jul 2024{QUIET}"
    said = capsys.readouterr().err
    assert f"as {made.policy} was trained: --task generic --template chat --chat_template_kwargs" in said
    assert in_force(asked, made.policy) is asked
    assert capsys.readouterr().err == ""
    # What is given wins, and is said.
    plain = in_force(Questions(data=made.data, template="plain"), made.policy)
    assert (plain.template, plain.chat_template_kwargs) == ("plain", {})
    assert f"--template plain as given, and {made.policy} was trained with --template chat" in capsys.readouterr().err
    assert load_questions(plain, made.policy)[1][0] == "0 + 1?"
    aloud = in_force(Questions(data=made.data, chat_template_kwargs={}), made.policy)
    assert load_questions(aloud, made.policy)[1][0] == f"26 Jul 2024{HEAD}"
    # A model that remembers nothing: as in earlier versions.
    old = in_force(Questions(data=made.data), made.model)
    assert (old.task, old.template, dict(old.chat_template_kwargs)) == ("generic", "plain", {})
    assert "template_date" not in old.options
    assert capsys.readouterr().err.count(made.model) == 0


def test_guided_prompts_are_the_reward_models(made, capsys):
    reward_model = str(made.folder / "train/reward_model")
    judge = read_settings(reward_model)
    followed = in_force(Questions(data=made.data), made.model, judge)
    assert (followed.template, followed.chat_template_kwargs, followed.task) == ("chat", OFF, "generic")
    assert "as the reward model was trained: --template chat" in capsys.readouterr().err
    check_template(reward_model, followed)
    for given, problem in (
        (Questions(template="plain", chat_template_kwargs={}), "by --template chat, not plain"),
        (Questions(template="chat", chat_template_kwargs={}), "--chat_template_kwargs .*enable_thinking"),
    ):
        with pytest.raises(InputError, match=problem):
            check_template(reward_model, given)


def test_rewards_are_of_the_same_prompts(made):
    """In training, by `score` and by the function for TRL: the rendered prompt is one text."""
    model = TokenRewardModel.from_pretrained(str(made.folder / "train/reward_model"))
    row = {"prompt": ROWS[0]["prompt"], "completion": "#### 1"}
    by_hand = model.score([f"26 Jul 2024{QUIET}"], ["#### 1"])[0].aggregate()
    assert next(iter(score_rows(model, [("f:1", row)])))["reward"] == pytest.approx(by_hand, abs=1e-6)
    asked = [{"role": "user", "content": row["prompt"]}]
    assert as_reward_func(model)([asked], ["#### 1"]) == pytest.approx([by_hand], abs=1e-6)
    assert as_reward_func(model)([f"26 Jul 2024{QUIET}"], ["#### 1"]) == pytest.approx([by_hand], abs=1e-6)
    # An end mark that only this tokenizer has: it is in no text from which an answer is read.
    [scored] = score_rows(model, [("f:1", {**row, "completion": "#### 1<stop>", "finished": False})])
    assert (scored["completion"], scored["reward"]) == ("#### 1", pytest.approx(by_hand, abs=1e-6))


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["sample", "MODEL", "--template", "plain", "--chat-template-kwargs", '{"a": 1}'], "need --template chat"),
        (["sample", "MODEL", "--template", "chat", "--chat-template-kwargs", '{"a": 1}'], "does not read a; remove it"),
        (["sample", "MODEL", "--chat-template-kwargs", "[1]"], "must be a JSON object"),
        (["evaluate", "policy", "MODEL", "--chat-template-kwargs", "{a"], "not valid JSON"),
    ],
)
def test_variables_without_effect_are_refused(made, argv, problem):
    words = [made.model if word == "MODEL" else word for word in argv]
    with pytest.raises(InputError, match=problem):
        app([*words, "--data", made.data], standalone_mode=False)


def test_variables_of_training_without_effect_are_refused(made, tmp_path):
    argv = ["--model_name_or_path", made.model, "--output_dir", str(tmp_path / "run"), *made.given]
    with pytest.raises(InputError, match=r"--chat_template_kwargs .*has no effect: it needs --template chat"):
        run_sft(*parse("sft", [*argv, "--chat_template_kwargs", json.dumps(OFF)]))
    model = save_chat_model(tmp_path / "model", CHATML)
    argv = ["--model_name_or_path", model, "--output_dir", str(tmp_path / "run"), "--template", "chat", *made.given]
    argv += ["--chat_template_kwargs", json.dumps(OFF)]
    for command, more in (
        (run_sft, []),
        (run_grpo, ["--num_generations", "2"]),
        (run_train, ["--num_generations", "2"]),
    ):
        with pytest.raises(InputError, match="does not read enable_thinking"):
            command(*parse(command.__name__.removeprefix("run_"), [*argv, *more]))


@pytest.mark.parametrize("command", ["sft", "grpo", "train"])
def test_variables_are_stored_as_a_mapping(made, command):
    """TRL's option is a text on the command line: resumed from a file, it is the same."""
    argv = ["--model_name_or_path", made.model, "--template", "chat", "--num_generations", "2", *made.given]
    argv = [word for word in argv if command != "sft" or word not in ("--num_generations", "2")]
    data, config, model, _ = parse(command, [*argv, "--chat_template_kwargs", json.dumps(OFF)])
    inherit(data, config, model)
    assert resolved(Job(kind=command, data=data, config=config, model=model))["chat_template_kwargs"] == OFF


def test_damaged_settings_are_named(tmp_path):
    for text in ("{", '{"kind": "policy", "template": "chatt"}', '{"kind": "policy", "chat_template_kwargs": 3}'):
        (tmp_path / "tracereward.json").write_text(text)
        with pytest.raises(InputError, match=r"tracereward\.json is damaged"):
            remembered(str(tmp_path))
