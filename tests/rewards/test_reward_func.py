"""A reward model in TRL's GRPOTrainer, as a function and as a checkpoint folder: same rewards as `score`."""

import dataclasses

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from helpers.any_text import any_text  # noqa: F401
from helpers.chat_models import SPECIAL, byte_tokenizer, save_chat_model
from tracereward import as_reward_func
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings

STEPS, BATCH = 2, 8


def build(folder, tokenizer, head, **settings) -> TokenRewardModel:
    model = TokenRewardModel.from_backbone(str(folder), RewardSettings(head=head, **settings), tokenizer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


class Recorded(GRPOTrainer):
    """Records inputs and outputs of each reward computation."""

    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        ids = [list(row) for row in completion_ids_list]
        self.seen.append((list(prompts), list(completions), ids, rewards.clone()))
        return rewards


@pytest.fixture
def train(tiny_model_folder, tokenizer, experts, tmp_path):
    """Train two steps with the given reward functions; return the recorded calls."""

    def run(*funcs):
        config = GRPOConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=BATCH,
            num_generations=4,
            max_completion_length=10,
            max_steps=STEPS,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
            seed=1,
        )
        trainer = Recorded(
            model=AutoModelForCausalLM.from_pretrained(tiny_model_folder),
            reward_funcs=list(funcs),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in experts]),
            processing_class=tokenizer,
        )
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
        assert len(trainer.seen) == STEPS
        return trainer.seen

    return run


@pytest.mark.parametrize(
    ("head", "settings"),
    [("action", {"aggregate": "min", "beta_clip": 50.0}), ("implicit", {}), ("token", {"granularity": "step"})],
)
def test_function_returns_rewards_of_score(tiny_model_folder, tokenizer, train, head, settings):
    """Truncated traces get no end-of-sequence token, finished ones get one."""
    model = build(tiny_model_folder, tokenizer, head, **settings)
    eos = tokenizer.eos_token_id
    finished = []
    for prompts, completions, ids, rewards in train(as_reward_func(model)):
        # From TRL's ids: a finished completion has the end of sequence as its last token.
        ended = [row[-1] == eos for row in ids]
        scores = model.score(prompts, completions, finished=[end or not text for end, text in zip(ended, completions)])
        expected = [trace.aggregate(model.settings.aggregate) for trace in scores]
        assert rewards[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
        assert len({round(value, 4) for value in expected}) > BATCH // 2
        finished += ended
    assert not all(finished)


def test_token_head_folder_is_a_reward_model_for_trl(tiny_model_folder, tokenizer, train, tmp_path):
    """TRL's reward is the logit of the last text token: the aggregate `last` of an unfinished trace."""
    model = build(tiny_model_folder, tokenizer, "token", beta_clip=1e9, aggregate="last")
    model.save_pretrained(tmp_path / "rm")
    function = as_reward_func(model)
    for prompts, completions, ids, rewards in train(str(tmp_path / "rm"), function):
        stated = [index for index, text in enumerate(completions) if text]
        assert len(stated) > BATCH // 2
        texts = [prompts[i] for i in stated], [completions[i] for i in stated]
        expected = [trace.aggregate("last") for trace in model.score(*texts, finished=[False] * len(stated))]
        assert rewards[stated, 0].tolist() == pytest.approx(expected, abs=1e-4)
        assert rewards[:, 1].tolist() == pytest.approx(function(prompts, completions, ids), abs=1e-5)


def test_messages_are_rendered_and_empty_traces_are_scored(tiny_model_folder, tokenizer):
    """A rollout of only special tokens has no text and is unfinished; it must not stop training."""
    model = build(tiny_model_folder, tokenizer, "action")
    function, eos = as_reward_func(model), tokenizer.eos_token_id
    prompt, trace = "13 - 5 = ?\n", "13 - 5 = 8"
    ids = tokenizer(trace)["input_ids"]
    found = function(prompts=[prompt] * 3, completions=[trace, trace, ""], completion_ids=[ids, [*ids, eos], [0, 0]])
    cut, ended, empty = model.score([prompt] * 3, [trace, trace, ""], finished=[False, True, True])
    assert found == pytest.approx([t.aggregate() for t in (cut, ended, empty)], abs=1e-5)
    assert function([prompt], [trace]) == pytest.approx([ended.aggregate()], abs=1e-5)
    assert function([prompt], [trace], trainer_state=None, answer=["8"]) == function([prompt], [trace])

    tokenizer = model.tokenizer = type(tokenizer).from_pretrained(tiny_model_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    model.settings = dataclasses.replace(model.settings, template="chat")
    messages = [{"role": "user", "content": "13 - 5 = ?"}], [{"role": "assistant", "content": trace}]
    assert function([messages[0]], [messages[1]], [[*ids, eos]]) == pytest.approx([ended.aggregate()], abs=1e-5)


def test_policys_end_tokens_end_a_trace(tiny_model_folder, tokenizer, capsys):
    """A policy of another vocabulary, with two end-of-sequence tokens; without its tokenizer, ends are unknown."""
    model = build(tiny_model_folder, tokenizer, "action")
    words = ["13", "-", "5", "=", "8", " ", "<end>", "<turn>"]
    backend = Tokenizer(models.WordLevel({word: 100 - i for i, word in enumerate(words)}, unk_token="<end>"))
    backend.decoder = decoders.Fuse()
    policy = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", extra_special_tokens=["<turn>"], clean_up_tokenization_spaces=False
    )
    prompt, trace = "13 - 5 = ?\n", "13 - 5 = 8"
    ids = [policy.convert_tokens_to_ids(word) for word in ["13", " ", "-", " ", "5", " ", "=", " ", "8"]]
    ends = policy.convert_tokens_to_ids(["<end>", "<turn>"])
    assert policy.decode(ids) == trace
    cut, ended = (model.score([prompt], [trace], finished=[end])[0].aggregate() for end in (False, True))
    assert cut != pytest.approx(ended)
    sampled = [ids, [*ids, ends[0]], [*ids, ends[1]]]
    found = as_reward_func(model, policy)([prompt] * 3, [trace] * 3, sampled)
    assert found == pytest.approx([cut, ended, ended])
    assert "policy_tokenizer" not in capsys.readouterr().err
    assert as_reward_func(model)([prompt] * 3, [trace] * 3, sampled) == pytest.approx([ended] * 3)
    assert "policy_tokenizer" in capsys.readouterr().err
    own = tokenizer(trace)["input_ids"]
    more = type(tokenizer).from_pretrained(tiny_model_folder)
    more.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    model.tokenizer = more
    found = as_reward_func(model)([prompt] * 2, [trace] * 2, [[*own, len(more) - 1], own])
    assert found == pytest.approx([ended, cut])


def test_reasoning_tags_that_trl_drops_are_scored(tmp_path):
    """Where ``<think>`` is special, TRL's text of a rollout lacks it, and its ids have it."""
    special = (*SPECIAL, "<think>")
    policy_tokenizer = byte_tokenizer(special=special)
    folder = save_chat_model(tmp_path, None, special)
    model = build(folder, byte_tokenizer(special=special), "implicit", beta_clip=100.0)
    ids = policy_tokenizer.convert_tokens_to_ids(["<think>", "a", "b", "<|im_end|>"])
    text = policy_tokenizer.decode(ids, skip_special_tokens=True)
    assert text == "ab"
    expected = [score.aggregate() for score in model.score(["p", "p"], ["<think>ab", "ab"])]
    for given in (policy_tokenizer, None):
        found = as_reward_func(model, given)(["p", "p"], [text, text], [ids, ids[1:]])
        assert found == pytest.approx(expected, abs=1e-6)
    assert abs(expected[0] - expected[1]) > 1e-4
