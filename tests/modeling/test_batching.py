"""Batches of sequences, token dropout and chunked log-probs."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from tracereward.modeling import log_probs as log_probs_module
from tracereward.modeling.batching import hide_tokens, pack, token_budget_batches
from tracereward.modeling.log_probs import completion_log_probs

# ---------- batches ----------


@given(
    groups=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 4)), max_size=12),
    budget=st.integers(1, 120),
)
def test_batches_contain_each_group_once_within_the_budget(groups, budget):
    """Padded tokens are sequences times the longest; only a single group may exceed the budget."""
    lengths, sizes = [length for length, _ in groups], [size for _, size in groups]
    batches = list(token_budget_batches(lengths, budget, sizes))
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(groups)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)

    def padded(batch):
        return max(lengths[i] for i in batch) * sum(sizes[i] for i in batch)

    assert all(padded(batch) <= budget or len(batch) == 1 for batch in batches)
    # No batch was closed too early: the next group would not have fitted.
    assert all(padded([*one, two[0]]) > budget for one, two in itertools.pairwise(batches))


def test_batches_by_hand():
    """10 * (1 + 2) = 30 fits exactly; with sizes of 1 the third fits too; equal lengths keep their order."""
    assert list(token_budget_batches([4, 10, 9], 30, [1, 1, 2])) == [[1, 2], [0]]
    assert list(token_budget_batches([4, 10, 9], 29, [1, 1, 2])) == [[1], [2, 0]]
    assert list(token_budget_batches([4, 10, 9], 30)) == [[1, 2, 0]]
    assert list(token_budget_batches([5, 5, 50, 5], 10)) == [[2], [0, 1], [3]]
    assert list(token_budget_batches([], 10)) == []


# ---------- token dropout ----------


@pytest.fixture(scope="module")
def batch():
    """Two rows with prompts of 2 and 1 and completions of 3 and 200 tokens."""
    return pack([[5, 6], [7]], [[8, 9, 10], list(range(11, 211))], pad_id=0)


def test_dropout_hides_only_completion_tokens_from_other_tokens(batch):
    before = batch.attention_mask.clone()
    shown = hide_tokens(batch, 0.5, [3, 4])
    hidden = before - shown.attention_mask
    assert hidden[:, :2].tolist() == [[0, 0], [0, 0]]  # the prompts, and the padding before the second
    assert bool((hidden >= 0).all())  # padding stays masked
    assert not hidden[0, 5:].any()
    assert 70 < int(hidden[1].sum()) < 130  # half of 200, five standard deviations either way
    assert torch.equal(batch.attention_mask, before)
    for name in ("input_ids", "position_ids", "completion_mask", "step_ends"):
        assert torch.equal(getattr(shown, name), getattr(batch, name))


@pytest.mark.parametrize(("rate", "low", "high"), [(0.0, 0, 0), (0.1, 3, 45), (0.9, 155, 197)])
def test_dropout_rate_is_the_share_of_hidden_tokens(batch, rate, low, high):
    hidden = batch.attention_mask - hide_tokens(batch, rate, [0, 1]).attention_mask
    assert low <= int(hidden[1].sum()) <= high


def test_hidden_tokens_depend_only_on_the_seed_of_the_row(batch):
    """Not on the other rows, nor on the padding that they cause."""
    both = hide_tokens(batch, 0.5, [3, 4]).attention_mask
    alone = hide_tokens(pack([[7]], [list(range(11, 211))], pad_id=0), 0.5, [4]).attention_mask
    assert torch.equal(both[1, 2:], alone[0, 1:])
    assert not torch.equal(both, hide_tokens(batch, 0.5, [3, 5]).attention_mask)
    assert torch.equal(both, hide_tokens(batch, 0.5, [3, 4]).attention_mask)


SHAPE = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "attn_implementation": "eager",
}


def models():
    """A model whose logits are the LM head's, and one with logit softcapping."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    gemma = Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=0.5, query_pre_attn_scalar=8))
    return [llama.eval(), gemma.eval()]


def ragged():
    rng = torch.Generator().manual_seed(0)
    return pack(
        [torch.randint(2, 97, (n,), generator=rng).tolist() for n in (3, 1, 4)],
        [torch.randint(2, 97, (n,), generator=rng).tolist() for n in (7, 12, 2)],
        0,
    )


def by_softmax(model, batch):
    """The definition, over all logits at once, in float64."""
    logits = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids).logits
    width = batch.completion_mask.size(1)
    log_probs = logits[:, -width - 1 : -1].double().log_softmax(-1)
    return log_probs.gather(2, batch.input_ids[:, -width:, None])[..., 0]


@pytest.mark.parametrize("model", models(), ids=["plain", "capped"])
@pytest.mark.parametrize("logits", [97, 500, 2**23])
def test_log_probs_and_two_orders_of_gradients_match_the_definition(model, logits, monkeypatch):
    """With chunks of one, several and all tokens; gradient penalties need second derivatives too."""
    monkeypatch.setattr(log_probs_module, "LOGITS", logits)
    batch = ragged()
    found = []
    for log_probs in (lambda m: completion_log_probs(m, batch)[0].double(), lambda m: by_softmax(m, batch)):
        twin = copy.deepcopy(model)
        values = log_probs(twin) * batch.completion_mask
        weights = list(twin.parameters())
        first = torch.autograd.grad(values.sum(), weights, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        found.append((values, first, torch.autograd.grad(penalty, weights)))
    for ours, theirs, scale in zip(*found, (1.0, 10.0, 1e3), strict=True):  # magnitude of float32 rounding
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6 * scale)
    assert "forward" not in vars(model.get_output_embeddings())


def test_rows_of_one_prompt_need_no_square_mask(monkeypatch):
    """Log-probs and gradients are those of each row by itself; attention gets no mask, also for the longer row."""
    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"attn_implementation": "sdpa"})).eval()
    prompts, completions = [[5, 6, 7]] * 2, [[8, 9, 10, 11], [12, 13]]
    together = completion_log_probs(model, pack(prompts, completions, 0))[0]
    assert masks == [None] * 2
    alone = [completion_log_probs(model, pack([prompt], [ids], 0))[0][0] for prompt, ids in zip(prompts, completions)]
    torch.testing.assert_close(together[0], alone[0])
    torch.testing.assert_close(together[1, :2], alone[1])
    weights = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(together[0].sum() + together[1, :2].sum(), weights),
        torch.autograd.grad(alone[0].sum() + alone[1].sum(), weights),
        rtol=1e-4,
        atol=1e-5,
    )
    masks.clear()
    completion_log_probs(model, pack([[5, 6, 7], [5]], completions, 0))  # padding before a prompt is hidden
    batch = pack(prompts, completions, 0)
    hidden = replace(batch, attention_mask=batch.attention_mask.clone())
    hidden.attention_mask[0, -1] = 0  # hidden by dropout, not padding: it is not to attend to itself
    completion_log_probs(model, hidden)
    assert [mask is None for mask in masks] == [False] * 4


class LargestLogits(TorchDispatchMode):
    """Records the largest tensor over the vocabulary, except the head's weights."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (97,) and tensor.shape != (16, 97):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_logits_of_all_tokens_are_never_in_memory(monkeypatch):
    """In the forward and backward pass; the head is frozen, since its gradient has that width too."""
    monkeypatch.setattr(log_probs_module, "LOGITS", 4 * 97)
    model = models()[0]
    model.get_output_embeddings().weight.requires_grad_(False)
    with LargestLogits() as seen:
        completion_log_probs(model, ragged())[0].sum().backward()
    assert seen.largest == 4 * 97
    monkeypatch.setattr(log_probs_module, "READ_LOGITS", 6 * 97)
    monkeypatch.setattr(log_probs_module, "CACHED_LOGITS", 4 * 97)  # slices of 4 and 2 rows
    real = ragged().completion_mask.bool()
    with torch.no_grad():
        with LargestLogits() as seen:
            found = completion_log_probs(model, ragged())[0]
        torch.testing.assert_close(found[real].double(), by_softmax(model, ragged())[real], rtol=1e-4, atol=2e-6)
    assert seen.largest == 6 * 97
