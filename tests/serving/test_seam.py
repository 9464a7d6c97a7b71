"""Requests at the seam of prompt and completion, by a reward model whose template opens the reasoning."""

import pytest

pytest.importorskip("fastapi_offline", reason="the packages of tracereward[serve] are not installed")
import torch

from helpers.chat_models import CHATML, save_chat_model
from helpers.served import assert_error, client_of, close
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.serving.schemas import Message
from tracereward.serving.service import Service, Settings

OPENS = CHATML.replace(
    "assistant\n{% endif", "assistant\n<think>\n{% if again is defined %}{{ again }}{% endif %}{% endif"
)
HEAD = "<|im_start|>user\n6 * 7?<|im_end|>\n<|im_start|>assistant\n<think>\n"
USER = {"role": "user", "content": "6 * 7?"}


def reward_model(folder, **settings) -> TokenRewardModel:
    path = save_chat_model(folder, OPENS)
    given = RewardSettings(head="token", beta_clip=100.0, **settings)
    model = TokenRewardModel.from_backbone(path, given, load_tokenizer(path), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return reward_model(tmp_path_factory.mktemp("seam"), template="chat")


def test_reasoning_of_messages_is_scored_behind_what_the_prompt_opened(model):
    answer = {"role": "assistant", "content": "42", "reasoning_content": "6 * 7 = 42"}
    expected = model.score([HEAD], ["6 * 7 = 42\n</think>\n\n42"])[0].rewards
    with client_of(model) as client:
        found = client.post("/pooling", json={"messages": [USER, answer]}).json()["data"][0]["data"]
    assert [reward for (reward,) in found] == close(expected)


def test_texts_steps_and_candidates_start_behind_it_too(model):
    steps = ["<think>\n6 * 7 = 42", "</think>", "42"]
    with client_of(model) as client:
        by_steps = client.post("/v1/score", json={"prompt": [USER], "steps": steps}).json()["results"][0]
        texts = ["<think>\n6 * 7", "6 * 7", "6 * 7<|im_end|>"]
        body = {"prompt": "6 * 7?", "candidates": texts, "finished": False}
        rewards = [one["reward"] for one in client.post("/v1/score", json=body).json()["results"]]
        begun = {"prompt": [USER, {"role": "assistant", "content": "6 *"}], "completion": " 7"}
        continued = client.post("/v1/score", json=begun).json()["results"][0]["reward"]
    assert by_steps["step_rewards"] == close(model.score_steps([HEAD], [["6 * 7 = 42", "</think>", "42"]])[0])
    cut, ended = (model.score([HEAD], ["6 * 7"], [end])[0].aggregate() for end in (False, True))
    assert rewards == close([cut, cut, ended])
    assert abs(cut - ended) > 1e-3
    assert continued == close(model.score([HEAD.removesuffix("<think>\n") + "6 *"], [" 7"])[0].aggregate())


def test_a_rendered_prompt_is_refused(model):
    with client_of(model) as client:
        response = client.post("/v1/score", json={"prompt": HEAD, "completion": "42"})
    assert_error(response, 400, "the prompt is rendered already", "invalid_input")


def test_variables_of_a_request_reach_the_template(model, tmp_path):
    """For a reward model of plain prompts they are the upstream's alone."""
    asked = [Message(**USER)]
    assert Service(model, Settings("rm")).render(asked, {"again": "Hm. "}) == f"{HEAD}Hm. "
    plain = Service(reward_model(tmp_path, template="plain"), Settings("rm"))
    assert plain.render(asked, {"again": "Hm. "}) == "6 * 7?"
