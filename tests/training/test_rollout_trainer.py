"""`compile_rollouts`: one shape for the run, one compiled step, and the tokens of eager decoding.

The tests run on a CPU, where transformers compiles only on request, with a backend that records graphs and runs them
eagerly. benchmarks/rollouts.py measures the gain of CUDA graphs.
"""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, CompileConfig
from trl import GRPOTrainer

from tracereward.errors import InputError
from tracereward.generation import sampling
from tracereward.generation.params import SamplingParams
from tracereward.modeling.tokenization import encode_prompt
from tracereward.training.config import RewardConfig
from tracereward.training.rollout_trainer import RolloutTrainer

PROMPTS = ["Question: 3 + 4?\nAnswer:\n", "Question: 1 + 2 + 3 + 4 + 5 + 6?\nAnswer:\n", "Question: 9?\nAnswer:\n"]


@pytest.fixture
def trainer(tiny_model_folder, tokenizer, tmp_path):
    def make(compiled, bf16=False, peft=None, temperature=1.0):
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
            bf16=bf16,
            temperature=temperature,
        )
        config.compile_rollouts = compiled  # refused without a GPU
        if compiled:
            config.cache_implementation = "static"
        seen = []

        def reward(completion_ids, **_):
            seen.append(completion_ids)
            return [float(sum(ids) % 7) for ids in completion_ids]

        trainer = RolloutTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model_folder),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            processing_class=tokenizer,
            peft_config=peft,
        )
        return trainer, seen

    return make


def test_compiled_step_samples_the_tokens_of_eager_decoding(trainer):
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


@pytest.mark.parametrize("peft", [None, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")])
def test_bfloat16_rollouts_come_from_a_cast_copy_of_the_current_policy(trainer, tiny_model_folder, peft):
    """Autocast mixes dtypes of keys and values, which a static cache cannot hold, so a bfloat16 copy samples."""
    # An untrained model's logits are nearly equal: at temperature 1 other weights would sample the same tokens.
    made, found = trainer(True, bf16=True, peft=peft, temperature=0.02)
    made.args.learning_rate = 0.05  # the policy of each batch differs
    expected = []
    generate = made._generate_single_turn

    def compared(prompt_ids, *args, **kwargs):
        state = torch.get_rng_state()
        sampled = generate(prompt_ids, *args, **kwargs)
        assert all(p.dtype == torch.float32 for p in made.model.parameters())
        policy = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
        policy = (policy if peft is None else get_peft_model(policy, peft)).to(torch.bfloat16).eval()
        policy.load_state_dict(made.model.state_dict())
        ids = torch.tensor(prompt_ids)
        assert torch.equal(made.half(ids).logits, policy(ids).logits)
        torch.set_rng_state(state)
        config = made.generation_config
        output = policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        expected.append([list(row) for row in output[:, ids.size(1) :].tolist()])
        return sampled

    made._generate_single_turn = compared
    before = copy.deepcopy(made.model.state_dict())
    made.train()
    assert any(not torch.equal(value, before[name]) for name, value in made.model.state_dict().items())
    assert len(found) == 3
    for sampled, full in zip(found, expected, strict=True):
        assert [row[: len(ids)] for row, ids in zip(full, sampled, strict=True)] == sampled


def test_fixed_shape_chunks_sample_the_same_tokens(tiny_model_folder, tokenizer, monkeypatch):
    """As on a GPU in a long run: prompts padded to the longest, the last chunk filled up, a static cache."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    params = SamplingParams(max_new_tokens=6, temperature=0.0, batch_size=2)
    expected = list(sampling.sample(model, tokenizer, PROMPTS, params))
    shapes, generate = [], model.generate

    def seen(*args, **kwargs):
        shapes.append((kwargs["input_ids"].shape, kwargs["generation_config"].cache_implementation))
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", seen)
    monkeypatch.setattr(sampling, "_compiles", lambda _, steps: steps == 12)
    found = list(sampling.sample(model, tokenizer, PROMPTS, params))
    longest = max(len(encode_prompt(tokenizer, prompt)) for prompt in PROMPTS)
    assert shapes == [((2, longest), "static")] * 2
    assert [[sample.ids for sample in chunk] for chunk in found] == [[s.ids for s in chunk] for chunk in expected]


def test_sharded_policy_is_refused(trainer, monkeypatch):
    init = GRPOTrainer.__init__

    def sharded_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(GRPOTrainer, "__init__", sharded_init)
    with pytest.raises(InputError, match="each GPU"):
        trainer(True)


def test_compile_rollouts_without_cuda_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    with pytest.raises(InputError, match="CUDA"):
        RewardConfig(output_dir=str(tmp_path), compile_rollouts=True, report_to="none")
