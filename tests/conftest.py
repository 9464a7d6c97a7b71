"""Fixtures: the arithmetic tokenizer, a saved untrained tiny Llama, and a dozen demonstrations."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the processes that tests start: pytest itself runs several

import pytest
import torch
from hypothesis import settings

from helpers.unloadable import guard_weights
from tracereward.synthetic.arithmetic import build_model, build_tokenizer, generate

torch.set_num_threads(1)
# Deterministic examples without a deadline: neither chance nor load on the machine may fail a test.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(scope="session", autouse=True)
def _guarded_weights():
    """See `helpers.unloadable`."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        guard_weights(monkeypatch)
        yield


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory, tokenizer):
    """Path of a saved untrained tiny Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    build_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def experts():
    """Twelve right rows of the misconception world."""
    return generate("misconception", 12, seed=11)
