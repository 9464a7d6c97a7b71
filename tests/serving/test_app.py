"""In-process `tracereward serve`: each endpoint against offline scoring."""

import base64
import struct

import numpy as np
import pytest

pytest.importorskip("fastapi_offline", reason="the packages of tracereward[serve] are not installed")
from scipy.special import expit

from helpers.served import assert_error, client_of, close, save_reward_model, traces
from tracereward.rewards.calibration import Calibration
from tracereward.rewards.first_error_rules import FirstErrorRule, suspicions
from tracereward.rewards.model import TokenRewardModel

TRACES = traces(6)
PROMPT = TRACES[0][0]
CANDIDATES = [completion for _, completion in TRACES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_reward_model(tmp_path_factory.mktemp("serving") / "rm", tokenizer)


@pytest.fixture(scope="module")
def model(folder):
    return TokenRewardModel.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def offline(model):
    """Scores of `CANDIDATES` as answers to `PROMPT`."""
    return model.score([PROMPT] * len(CANDIDATES), CANDIDATES)


@pytest.fixture(scope="module")
def served(model):
    with client_of(model) as client:
        yield client


# Scores


@pytest.mark.parametrize("finished", [True, False])
def test_score_of_a_completion(served, model, finished):
    body = {"prompt": PROMPT, "completion": CANDIDATES[1], "finished": finished}
    answer = served.post("/v1/score", json=body).json()
    [scores] = model.score([PROMPT], [CANDIDATES[1]], [finished])
    assert answer.keys() == {"model", "results", "usage"}
    assert answer["model"] == "rm"
    [result] = answer["results"]
    fields = {"index", "reward", "aggregates", "step_rewards", "tokens", "offsets", "token_rewards", "step_ends"}
    assert result.keys() == fields  # and no probability
    assert result["tokens"] == scores.tokens
    assert result["offsets"] == [list(pair) for pair in scores.offsets]
    assert result["token_rewards"] == close(scores.rewards)
    assert result["reward"] == close(sum(scores.rewards) / len(scores.rewards))
    assert result["step_rewards"] == close(scores.step_rewards())
    assert result["aggregates"] == close({how: scores.aggregate(how) for how in ("mean", "min", "last", "discounted")})
    prompt, completion = len(model.tokenizer(PROMPT)["input_ids"]), len(scores.tokens)
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def test_candidate_scores_keep_input_order(served, offline):
    answer = served.post("/v1/score", json={"model": "rm", "prompt": PROMPT, "candidates": CANDIDATES}).json()
    assert [result["index"] for result in answer["results"]] == list(range(len(CANDIDATES)))
    for result, scores in zip(answer["results"], offline, strict=True):
        assert result["token_rewards"] == close(scores.rewards)


def test_scores_of_steps(served, model):
    """Each step's reward is the mean of its own tokens; steps are joined by the model's delimiter."""
    steps = CANDIDATES[0].split("\n")
    answer = served.post("/v1/score", json={"prompt": PROMPT, "steps": steps}).json()
    [scores] = model.score([PROMPT], ["\n".join(steps)])
    expected, start = [], 0
    for step in steps:
        inside = [
            r for r, (a, b) in zip(scores.rewards, scores.offsets) if a < b and start <= a and b <= start + len(step)
        ]
        expected.append(sum(inside) / len(inside))
        start += len(step) + 1
    assert answer["results"][0]["step_rewards"] == close(expected)


def test_text_outside_the_vocabulary_is_400(served):
    """The arithmetic vocabulary has no letters; nothing is scored as ``<unk>``."""
    for field, given in (("completion", "seven"), ("candidates", [CANDIDATES[0], "seven"]), ("steps", ["x" * 90, "y"])):
        response = served.post("/v1/score", json={"prompt": PROMPT, field: given})
        assert_error(
            response, 400, rf"{field} [01]: all of the characters .* are not in the vocabulary", "invalid_input"
        )
    response = served.post("/v1/score", json={"prompt": "How many?", "completion": CANDIDATES[0]})
    assert_error(response, 400, "prompt: 88 % of the characters", "invalid_input")  # all but the question mark
    assert_error(served.post("/classify", json={"input": "seven"}), 400, "input 0: all of", "invalid_input")


def test_tokens_are_omitted_on_request(served):
    body = {"prompt": PROMPT, "completion": CANDIDATES[0], "tokens": False}
    [result] = served.post("/v1/score", json=body).json()["results"]
    assert result.keys() == {"index", "reward", "aggregates", "step_rewards"}


def test_messages_for_a_model_with_plain_template(served, offline):
    """The one user message is the prompt. Conversations that it could not have read in training are rejected."""
    user = {"role": "user", "content": PROMPT}
    answer = served.post("/v1/score", json={"prompt": [user], "completion": CANDIDATES[0]}).json()
    assert answer["results"][0]["token_rewards"] == close(offline[0].rewards)
    for messages in ([{"role": "system", "content": "Be brief."}, user], [user, {"role": "assistant", "content": "2"}]):
        response = served.post("/v1/score", json={"prompt": messages, "completion": "3"})
        assert_error(response, 400, "plain prompts", "invalid_input")
    response = served.post("/v1/score", json={"prompt": [{"role": "user", "content": ""}], "completion": "3"})
    assert_error(response, 400, "no tokens", "invalid_input")


def test_messages_for_a_model_with_chat_template(tmp_path, tokenizer):
    """Messages are rendered with the chat template, as in training; the assistant's last one is continued."""
    chatty = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    chatty.chat_template = "{% for m in messages %}{{ m.content }} = {% endfor %}"
    model = TokenRewardModel.from_pretrained(str(save_reward_model(tmp_path / "rm", chatty, template="chat")))
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    [expected] = model.score(["1 = 2"], ["3 + 4"])
    with client_of(model) as client:
        answer = client.post("/v1/score", json={"prompt": messages, "completion": "3 + 4"}).json()
    assert answer["results"][0]["token_rewards"] == close(expected.rewards)


def test_calibrated_model_returns_probabilities_and_suspected_errors(tmp_path, tokenizer, offline):
    """The rule's threshold lies between the traces' lowest means, so some have no suspected error: null."""
    calibration = Calibration("platt", slope=0.5, intercept=0.25, traces=20)
    steps = [suspicions(scores.by_step()) for scores in offline]
    threshold = float(np.mean(sorted(map(min, steps))[:2]))
    fitted = {"calibration": calibration, "first_error": FirstErrorRule(threshold=threshold)}
    calibrated = TokenRewardModel.from_pretrained(str(save_reward_model(tmp_path / "rm", tokenizer, **fitted)))
    expected = [float(expit(0.5 * scores.aggregate() + 0.25)) for scores in offline]
    with client_of(calibrated) as client:
        scores = client.post("/v1/score", json={"prompt": PROMPT, "candidates": CANDIDATES}).json()
        ranked = client.post("/v1/rerank", json={"query": PROMPT, "documents": CANDIDATES}).json()
    assert [result["probability"] for result in scores["results"]] == close(expected)
    marks = [next((n for n, reward in enumerate(of) if reward < threshold), None) for of in steps]
    assert [result["suspected_error"] for result in scores["results"]] == marks
    assert marks.count(None) == len(marks) - 1
    assert [result["relevance_score"] for result in ranked["results"]] == close(sorted(expected, reverse=True))


# Formats of other servers


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_rerank(served, offline, path):
    """Texts and objects are ranked best first and returned with all their fields."""
    documents = [text if index % 2 else {"text": text, "id": index} for index, text in enumerate(CANDIDATES)]
    body = {"model": "rm", "query": PROMPT, "documents": documents, "max_chunks_per_doc": None}
    answer = served.post(path, json=body).json()
    rewards = [scores.aggregate() for scores in offline]
    order = sorted(range(len(rewards)), key=lambda index: -rewards[index])
    assert [result["index"] for result in answer["results"]] == order
    assert [result["reward"] for result in answer["results"]] == close([rewards[i] for i in order])
    relevance = [float(expit(rewards[i])) for i in order]
    assert [result["relevance_score"] for result in answer["results"]] == close(relevance)
    assert [result["document"] for result in answer["results"]] == [
        {"text": CANDIDATES[i]} if i % 2 else documents[i] for i in order
    ]
    assert answer["object"] == "list"
    assert answer["id"].startswith("rerank-")
    few = served.post(path, json={**body, "top_n": 2, "return_documents": False}).json()["results"]
    assert [result["index"] for result in few] == order[:2]
    assert few[0].keys() == {"index", "relevance_score", "reward"}


def test_pooling_of_texts(served, model):
    """One row with one number per token, the first 0; expected values from the token ids."""
    texts = [PROMPT + CANDIDATES[0], PROMPT]
    answer = served.post("/pooling", json={"input": texts, "encoding_format": "float"}).json()
    for row, text in zip(answer["data"], texts, strict=True):
        ids = model.tokenizer(text)["input_ids"]
        [expected] = model.token_rewards([ids[:1]], [ids[1:]])
        assert [value for [value] in row["data"]] == close([0.0, *expected.tolist()])
        assert row["object"] == "pooling"
    total = sum(len(model.tokenizer(text)["input_ids"]) for text in texts)
    assert answer["usage"]["total_tokens"] == total
    [alone] = served.post("/pooling", json={"input": texts[1]}).json()["data"]
    assert [value for [value] in alone["data"]] == close([value for [value] in answer["data"][1]["data"]])
    assert_error(served.post("/pooling", json={"input": "7"}), 400, "single token", "invalid_input")


def test_pooling_and_classify_with_token_ids(served, model):
    """Results equal those of the text. A list of ids is one input, a list of lists several."""
    texts = [PROMPT + text for text in CANDIDATES[:2]]
    ids = [model.tokenizer(text)["input_ids"] for text in texts]
    for path, field in (("/pooling", "data"), ("/classify", "probs")):
        expected = [row[field] for row in served.post(path, json={"input": texts}).json()["data"]]
        many = served.post(path, json={"input": ids}).json()
        assert [row[field] for row in many["data"]] == [[close(number) for number in row] for row in expected]
        assert many["usage"]["total_tokens"] == sum(map(len, ids))
        [one] = served.post(path, json={"input": ids[1]}).json()["data"]
        assert one[field] == [close(number) for number in expected[1]]
    response = served.post("/pooling", json={"input": [ids[0], [3, len(model.tokenizer)]]})
    assert_error(response, 400, f"input 1: .* 0 to {len(model.tokenizer) - 1}", "invalid_input")


def test_pooling_as_base64(served):
    """Little-endian float32, one per token."""
    body = {"input": [PROMPT + CANDIDATES[0], PROMPT]}
    numbers = served.post("/pooling", json={**body, "encoding_format": "float"}).json()["data"]
    packed = served.post("/pooling", json={**body, "encoding_format": "base64"}).json()["data"]
    for one, other in zip(packed, numbers, strict=True):
        raw = base64.b64decode(one["data"], validate=True)
        assert struct.unpack(f"<{len(raw) // 4}f", raw) == close(tuple(value for [value] in other["data"]))


def test_pooling_and_classify_with_a_conversation(served, offline):
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": CANDIDATES[0]}]
    answer = served.post("/pooling", json={"messages": messages}).json()
    assert [value for [value] in answer["data"][0]["data"]] == close(offline[0].rewards)
    answer = served.post("/classify", json={"messages": messages}).json()
    expert = float(expit(offline[0].aggregate()))
    assert answer["data"][0]["probs"] == close([1 - expert, expert])
    response = served.post("/classify", json={"messages": messages[::-1]})
    assert_error(response, 422, "last message must be the assistant's")


def test_classify_texts(served, model):
    texts = [PROMPT + text for text in CANDIDATES]
    answer = served.post("/classify", json={"input": texts}).json()
    labels = set()
    for one, text in zip(answer["data"], texts, strict=True):
        ids = model.tokenizer(text)["input_ids"]
        reward = float(model.token_rewards([ids[:1]], [ids[1:]])[0].mean())
        assert one["probs"] == close([1 - float(expit(reward)), float(expit(reward))])
        assert one["label"] == ("expert" if reward > 0 else "policy")
        assert one["num_classes"] == 2
        labels.add(one["label"])
    assert labels == {"policy", "expert"}
