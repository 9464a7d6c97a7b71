"""Rollouts with `compile_rollouts`: one shape for the run, one compiled step, and the tokens of eager decoding.

On a CPU, where transformers compiles only if told to, and with a backend that records graphs and runs them eagerly;
what CUDA graphs gain is measured in benchmarks/rollouts.py.
"""

import pytest
import torch
from datasets import Dataset
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, CompileConfig

from tracereward.config import RewardConfig
from tracereward.demonstrations import encode_prompt
from tracereward.errors import InputError
from tracereward.rollouts import RolloutTrainer

PROMPTS = ["Question: 3 + 4?\nAnswer:\n", "Question: 1 + 2 + 3 + 4 + 5 + 6?\nAnswer:\n", "Question: 9?\nAnswer:\n"]


@pytest.fixture
def trainer(tiny_model_folder, tokenizer, tmp_path):
    def make(compiled):
        config = RewardConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            max_steps=3,
            learning_rate=0.0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            shuffle_dataset=False,
            gradient_checkpointing=False,
        )
        config.compile_rollouts = compiled  # refused without a GPU
        if compiled:
            config.cache_implementation = "static"
        seen = []

        def reward(completion_ids, **_):
            seen.append(completion_ids)
            return [0.0] * len(completion_ids)

        trainer = RolloutTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model_folder),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            processing_class=tokenizer,
        )
        return trainer, seen

    return make


def test_one_compiled_step_draws_the_tokens_of_eager_decoding(trainer):
    eager, expected = trainer(False)
    eager.train()
    compiled, found = trainer(True)
    longest = max(len(encode_prompt(eager.processing_class, prompt)) for prompt in PROMPTS)
    assert compiled.prompt_width == longest
    compiled.generation_config.compile_config = CompileConfig(backend="eager", mode=None, fullgraph=False)
    compiled.generation_config.compile_config._compile_all_devices = True
    graphs = []
    generate = compiled.model.generate

    def counted(*args, **kwargs):
        assert kwargs["input_ids"].shape == (4, longest)
        output = generate(*args, **kwargs)
        graphs.append(counters["stats"]["unique_graphs"])
        return output

    compiled.model.generate = counted
    torch._dynamo.reset()
    counters.clear()
    compiled.train()
    assert found == expected
    assert len(graphs) == 3
    assert graphs[0] > 0, "nothing was compiled"
    assert graphs[2] == graphs[1], "a later batch was compiled again"


def test_it_is_refused_where_it_would_do_nothing(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    with pytest.raises(InputError, match="CUDA"):
        RewardConfig(output_dir=str(tmp_path), compile_rollouts=True, report_to="none")
