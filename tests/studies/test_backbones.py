"""The calibration and transfer studies: backbones, measurements and pages."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from scipy.special import expit
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from helpers.studies import page_of
from studies import cells
from studies.definitions import STUDIES
from studies.measures import calibration, transfer
from studies.pages import calibration as calibration_page
from studies.pages import transfer as transfer_page
from studies.results_file import read_results
from studies.setup import judging
from studies.setup.backbones import BUILDERS, COMPARED, PRETRAINED, own, write_untrained
from studies.setup.frozen import FROZEN, once
from studies.setup.settings import WORLDS
from studies.setup.site import Site
from tracereward.files import write_jsonl
from tracereward.modeling.batching import pack
from tracereward.modeling.tokenization import encode_completion, encode_prompt
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.synthetic.arithmetic import build_model, build_tokenizer, generate

CHECKED = dataclasses.replace(WORLDS["checked"], experts=8, unlabeled=0, corpus=0, validation=12, test=4)


def tokenizer_of(backbone):
    return build_tokenizer(digits=True) if backbone == "digits" else build_tokenizer()


def test_digits_round_trip():
    """Texts of the worlds round-trip; a number has one token per digit, and every other word one token."""
    words, digits = build_tokenizer(), build_tokenizer(digits=True)
    for world in ("checked", "exposure", "style"):
        for row in generate(world, 20, 3):
            text = row["prompt"] + row["completion"]
            ids = digits(text)["input_ids"]
            assert digits.decode(ids) == text
            numbers = re.findall(r"\d+", text)
            more = sum(map(len, numbers)) - len(numbers)
            assert len(ids) == len(words(text)["input_ids"]) + more
            assert digits.unk_token_id not in ids
    assert len(digits("23 - 7 = ?\n")["input_ids"]) == len(["2", "3", " - ", "7", " = ", "?", "\n"])


@pytest.mark.parametrize("backbone", BUILDERS)
def test_padding_does_not_change_outputs(backbone):
    tokenizer = tokenizer_of(backbone)
    model = BUILDERS[backbone](tokenizer, 1).eval()
    texts = ["13 - 5 = ?\n", "3 + 4 - 2 = ?\n13 - 5 = 8\n"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    batch = pack(ids, [[1], [1]], 0)
    with torch.no_grad():
        padded = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        ).logits
        for row, alone in enumerate(ids):
            plain = model(torch.tensor([[*alone, 1]])).logits[0]
            torch.testing.assert_close(padded[row, -len(plain) :], plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", BUILDERS)
def test_parameter_counts_and_seeds(backbone):
    tokenizer = tokenizer_of(backbone)
    before = torch.random.get_rng_state()
    one, same, other = (BUILDERS[backbone](tokenizer, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    first, second, third = (torch.cat([p.flatten() for p in model.parameters()]) for model in (one, same, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    llama = build_model(build_tokenizer(), 0).num_parameters()
    if backbone in ("neox", "qwen3"):
        assert abs(one.num_parameters() / llama - 1) < 0.02
    elif backbone == "digits":  # 21 fewer words, each a row in two matrices
        assert llama - one.num_parameters() == (len(build_tokenizer()) - len(tokenizer)) * 64 * 2
    else:
        assert one.num_parameters() < llama / 6


def test_backbone_has_own_folder_and_shared_data(tmp_path):
    place = cells.Place(tmp_path, tmp_path)
    llama, digits = (place.site(WORLDS["checked"], 40, backbone=own(name)) for name in ("llama", "digits"))
    assert digits.data("test") == llama.data("test")
    assert digits.run("sft") == llama.folder / "digits" / "sft"
    assert llama.run("digits/base") == digits.run("base")  # how an arm refers to another backbone's pretrained model
    assert (llama.world.completion, digits.world.completion) == (46, 61)
    longest = max(
        len(build_tokenizer(digits=True)(row["completion"])["input_ids"]) for row in generate("checked", 2000, 5)
    )
    assert longest < 61
    old = cells.settings_of(STUDIES["worlds"].cells(["checked"], [40])[0], fast=False)
    assert "backbone" not in old


# What is measured


def test_effective_rank():
    assert calibration.effective_rank(np.array([2.0, 2.0, 2.0, 2.0])) == pytest.approx(4)
    assert calibration.effective_rank(np.array([5.0, 0.0, 0.0])) == pytest.approx(1)
    # shares 3/4 and 1/4: 4 / 3 ** 0.75
    assert calibration.effective_rank(np.array([3.0, 1.0])) == pytest.approx(4 / 3**0.75)


def test_separation_is_cohens_d():
    # means 2 and 1, sums of squares 2 each, 4 - 2 degrees of freedom: 1 / sqrt(2)
    found = calibration.separation(np.array([1.0, 0.0, 3.0, 2.0]), [True, False, True, False])
    assert found == pytest.approx(1 / np.sqrt(2))


def test_digits_per_token():
    texts = ["13 - 5 = 8\n#### 8"]  # digits 1, 3, 5, 8, 8
    assert calibration.digits_per_token(build_tokenizer(), texts) == 5 / 4
    assert calibration.digits_per_token(build_tokenizer(digits=True), texts) == 1


def reward_model(backbone: str = "llama", seed: int = 0) -> TokenRewardModel:
    """An untrained reward model whose head reads the hidden state."""
    tokenizer = tokenizer_of(backbone)
    builder = BUILDERS.get(backbone, build_model)
    model = TokenRewardModel(builder(tokenizer, seed), tokenizer, RewardSettings(head="action", granularity="dense"))
    assert model.head is not None
    with torch.no_grad():
        model.head.w.normal_(generator=torch.Generator().manual_seed(seed), std=0.1)
        model.head.b.fill_(3.5)
    return model.eval()


def samples(count: int = 6, seed: int = 0) -> list[dict]:
    """Two traces for each of `count` questions; the first is right."""
    rows = []
    for question, row in enumerate(generate("checked", count, seed)):
        for correct in (True, False):
            text = row["completion"] if correct else re.sub(r"\n#### \d+", "?\n#### 40", row["completion"])
            kept = {"question": question, "prompt": row["prompt"], "completion": text, "answer": row["answer"]}
            rows.append({**kept, "correct": correct, "finished": True, "logprob": -0.1 * question - correct})
    return rows


@pytest.mark.parametrize("backbone", ["neox", "qwen3", "digits"])
def test_features_match_plain_forward_pass(backbone):
    model, rows = reward_model(backbone), samples(3)
    log_prob, hidden, spectrum = calibration.features(model, rows)
    states = []
    for place, row in enumerate(rows):
        prompt = encode_prompt(model.tokenizer, row["prompt"])
        ids = encode_completion(model.tokenizer, row["completion"])
        with torch.no_grad():
            output = model.backbone(torch.tensor([prompt + ids]), output_hidden_states=True)
        after = output.hidden_states[-1][0, len(prompt) :].numpy()
        of_tokens = output.logits[0, len(prompt) - 1 : -1].log_softmax(-1)[range(len(ids)), ids]
        np.testing.assert_allclose(hidden[place], after.mean(0), atol=1e-5)
        assert log_prob[place] == pytest.approx(float(of_tokens.mean()), abs=1e-5)
        states.append(after)
    found = np.linalg.svd(np.concatenate(states), compute_uv=False)
    np.testing.assert_allclose(sorted(spectrum, reverse=True), found, rtol=1e-3, atol=1e-3)


def test_head_fit_has_zero_gradient():
    """The numerical gradient of an independently written loss is zero."""
    x, labels = np.array([[2.0], [1.0], [-1.0], [0.5]]), np.array([1.0, 1.0, 0.0, 0.0])
    start = np.array([0.3])

    def loss(theta: float) -> float:
        p = expit(x[:, 0] * theta)
        return float(-np.log(np.where(labels == 1, p, 1 - p)).sum() + (theta - 0.3) ** 2 / 2)

    (theta,) = calibration.fit_head(x, labels, start)
    assert min(np.linspace(-3, 6, 9001), key=loss) == pytest.approx(theta, abs=1e-3)


def test_tuned_head_rewards_match_fit():
    model, rows = reward_model(), samples()
    model.settings = dataclasses.replace(model.settings, beta_clip=100.0)  # clipping would change the mean
    log_prob, hidden, _ = calibration.features(model, rows)
    assert model.head is not None
    before = np.array([*model.head.a.detach().view(1), *model.head.b.detach().view(1), *model.head.w.detach()])
    inputs = np.column_stack([log_prob, np.ones(len(rows)), hidden])
    theta = calibration.fit_head(inputs, np.array([float(row["correct"]) for row in rows]), before)
    tuned = calibration.tune_head(model, rows)
    np.testing.assert_allclose(calibration.trace_rewards(tuned, rows), inputs @ theta, atol=1e-4)


def test_tuning_all_weights_fits_labels(monkeypatch):
    monkeypatch.setattr(calibration, "LEARNING_RATE", 3e-3)
    model, rows = reward_model(), samples(4)
    tuned = calibration.tune_all(model, rows)
    rewards = calibration.trace_rewards(tuned, rows)
    right = np.array([row["correct"] for row in rows])
    assert rewards[right].min() > rewards[~right].max()


def test_split_labels_first_samples_of_a_third_of_questions():
    labelled, fit = calibration.split(samples(7))
    assert [(row["question"], row["correct"]) for row in labelled] == [(0, True), (1, True)]
    assert sorted({row["question"] for row in fit}) == [2, 3, 4, 5, 6]
    assert len(fit) == 10


def test_judge():
    """ECE computed from the bins; Platt scaling keeps the ranking."""
    model, fit, test = reward_model(seed=3), samples(12, 1), samples(8, 2)
    found = calibration.judge(model, fit, test)
    rewards = calibration.trace_rewards(model, test)
    right = np.array([row["correct"] for row in test])
    wins = [(r > w) + 0.5 * (r == w) for r in rewards[right] for w in rewards[~right]]
    assert found["auroc"] == pytest.approx(np.mean(wins))
    pairs = [(rewards[i] > rewards[i + 1]) + 0.5 * (rewards[i] == rewards[i + 1]) for i in range(0, len(test), 2)]
    assert found["auroc_within_prompt"] == pytest.approx(np.mean(pairs))
    p = expit(rewards)
    assert found["brier"] == pytest.approx(np.mean((p - right) ** 2))
    gaps = [
        inside.sum() / len(p) * abs(p[inside].mean() - right[inside].mean())
        for low in np.arange(10) / 10
        if (inside := (p >= low) & (p < low + 0.1)).any()
    ]
    assert found["ece"] == pytest.approx(sum(gaps))
    assert sum(count for _, _, count in found["bins"]) == len(test)


def test_once_computes_duplicates_once():
    rows = [{"prompt": "p", "completion": c, "finished": f} for c, f in [("a", True), ("b", True), ("a", True)]]
    rows.append({**rows[0], "finished": False})
    seen = []

    def of(different):
        seen.extend(different)
        return [f"{row['completion']}{row['finished']}" for row in different]

    assert once(rows, of) == ["aTrue", "bTrue", "aTrue", "aFalse"]
    assert len(seen) == 3


# Transfer


def test_digit_rewards_sum_over_policy_tokens(tmp_path):
    model = reward_model("digits")
    write_site(tmp_path, "llama")
    site = cells.Place(tmp_path, tmp_path).site(CHECKED, 0)
    row = {**samples(1)[0], "completion": "13 + 5 = 18\n#### 18"}
    ids = encode_completion(model.tokenizer, row["completion"])
    with torch.no_grad():
        values = model(model.pack([encode_prompt(model.tokenizer, row["prompt"])], [ids]))[0].clamp(-5, 5).tolist()
    # 1 3 | + | 5 | = | 1 8 | \n | #### | 1 8 | end
    groups = [(0, 2), (2, 3), (3, 4), (4, 5), (5, 7), (7, 8), (8, 9), (9, 11), (11, 12)]
    assert groups[-1][1] == len(ids)
    expected = [min(5.0, max(-5.0, sum(values[start:end]))) for start, end in groups]
    (scored,) = transfer.score(model, site, [row])
    assert scored["reward"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert not scored["unknown"]
    # A number that only the digit tokenizer can encode.
    write_site(tmp_path, "digits")
    digits = cells.Place(tmp_path, tmp_path).site(CHECKED, 0, backbone="digits")
    assert transfer.score(reward_model("llama"), digits, [{**row, "completion": "13 + 5 = 118"}])[0]["unknown"]


def write_site(folder, backbone: str) -> Site:
    """A site with untrained policies and demonstrations."""
    site = cells.Place(folder, folder).site(CHECKED, 0, backbone=own(backbone))
    llama = dataclasses.replace(site, backbone=None)
    if not llama.run("init").exists():
        build_model(build_tokenizer(), 0).save_pretrained(llama.run("init"))
        build_tokenizer().save_pretrained(llama.run("init"))
        llama.data("experts").parent.mkdir()
        write_jsonl(llama.data("experts"), generate("checked", 8, 0))
    if site.backbone is not None and not site.run("init").exists():
        write_untrained(backbone, 0, llama.run("init"), site.run("init"))
    return site


def test_transfer_of_untrained_models(tmp_path):
    """End to end: adaptation changes the head and not the backbone."""
    llama, digits = (write_site(tmp_path, name) for name in ("llama", "digits"))
    for site in (llama, digits):
        BUILDERS.get(site.backbone or "", build_model)(tokenizer_of(site.backbone), 0).save_pretrained(
            site.policy("base")
        )
    reward_model("llama").save_pretrained(llama.run("frozen") / "reward_model")
    options = {**CHECKED.recipe, **FROZEN, "warmup_rollouts": 2, "policies": ["llama", "digits"]}
    options |= {"demonstrations": [2, 4], "updates": 3, "head_learning_rate": 1e-2}
    drawn = {"llama": samples(4, 1), "digits": samples(4, 1)}
    found = transfer.run(llama, "frozen", {"llama": llama, "digits": digits}, options, samples=drawn)
    assert {name: list(counts) for name, counts in found.items()} == {"llama": ["0"], "digits": ["0", "2", "4"]}
    # The right trace of each question has a log-prob lower by 1, and both traces have equal length.
    assert found["llama"]["0"]["auroc_logprob"] == 0
    assert found["llama"]["0"]["logprob"] == 0
    assert found["llama"]["0"]["gain"] == found["llama"]["0"]["sum"] - found["llama"]["0"]["majority"]

    rollouts = judging.draw_samples(digits, "base", "experts", 2)
    model, start = (reward_model("llama") for _ in range(2))
    given = {**transfer.of_training(options), "discriminator_online_learning_rate": 1e-2}
    transfer.adapt(model, llama, given, rollouts, count=4, updates=3)
    for (name, after), before in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(after, before) == name.startswith("backbone"), name


def test_cells_of_each_kind_are_stored(monkeypatch, tmp_path):
    place = cells.Place(tmp_path / "work", tmp_path / "x.jsonl")
    monkeypatch.setattr(cells, "prepared", lambda site, cell: samples(3))
    monkeypatch.setattr(cells, "reward_of", lambda place, cell, seed: (place.site(cell.world, seed), "frozen"))
    monkeypatch.setattr(calibration, "run", lambda site, arm, rows: {"states": len(rows)})
    monkeypatch.setattr(transfer, "run", lambda *_, samples, **__: {name: len(rows) for name, rows in samples.items()})
    wanted = [STUDIES[name].cells(seeds=[40])[-1] for name in ("calibration", "transfer")]
    for cell in wanted:
        cells.run_cell(place, cell)
    found = cells.stored(place, wanted)
    assert all(row is not None and row["questions"] == 3 and row["backbone"] == "digits" for row in found)
    assert found[0]["calibration"] == {"states": 6}
    assert found[1]["transfer"] == dict.fromkeys(COMPARED, 6)


def pretrained(folder, words: int, model: type, config: type) -> str:
    """A causal LM with a tokenizer of the given size, trained on word problems."""
    rows = generate("word-problems", 60, 5)
    made = Tokenizer(BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevelDecoder()
    special = ["<pad>", "<eos>"]
    trainer = BpeTrainer(vocab_size=words, special_tokens=special, initial_alphabet=ByteLevel.alphabet())
    made.train_from_iterator([row["prompt"] + row["completion"] for row in rows], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "head_dim": 8}
    ids = {"vocab_size": words, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model(config(**shape, **ids)).save_pretrained(folder)
    return str(folder)


@pytest.mark.long
def test_pretrained_backbones(monkeypatch, tmp_path):
    """Both studies in the world of a pretrained model, with two small models instead of those on the Hub."""
    folders = {
        "smollm2": pretrained(tmp_path / "one", 500, LlamaForCausalLM, LlamaConfig),
        "gemma3": pretrained(tmp_path / "two", 400, Gemma3ForCausalLM, Gemma3TextConfig),
    }
    for name, folder in folders.items():
        monkeypatch.setitem(PRETRAINED, name, folder)
    monkeypatch.setattr(calibration, "UPDATES", 2)
    world = WORLDS["word-problems"]
    small = {"per_device_train_batch_size": 40, "gradient_accumulation_steps": 1}
    world = dataclasses.replace(
        world,
        model=folders["smollm2"],
        experts=50,
        unlabeled=8,
        validation=6,
        test=4,
        completion=110,
        sft={**world.sft, "max_steps": 10},
        sft_grid=world.sft_grid[:1],
        grpo={**world.grpo, **small},
    )
    place = cells.Place(tmp_path / "work", tmp_path / "x.jsonl", fast=True)
    for study in ("calibration", "transfer"):
        wanted = [dataclasses.replace(cell, world=world) for cell in STUDIES[study].cells(["word-problems"], [40])]
        assert [cell.arm.name.removeprefix("reward of ") for cell in wanted] == ["SmolLM2 135M", "Gemma 3 270M"]
        for cell in wanted:
            options = {**cell.arm.options, "updates": 2} if study == "transfer" else cell.arm.options
            arm = dataclasses.replace(cell.arm, options=options)
            cells.run_cell(place, dataclasses.replace(cell, samples=2, arm=arm))
    (site,) = (path for path in (tmp_path / "work").glob("word-problems-40-*") if path.is_dir())
    for own_folder, folder in ((site, "smollm2"), (site / "gemma3", "gemma3")):
        config, start = (AutoConfig.from_pretrained(at) for at in (own_folder / "sft" / "policy", folders[folder]))
        assert (config.model_type, config.vocab_size) == (start.model_type, start.vocab_size)
        (learned,) = own_folder.glob("frozen-*/reward_model")
        both = (own_folder / "sft" / "policy", learned)
        sft, reward = (AutoModel.from_pretrained(path).state_dict() for path in both)
        moved = {name.split(".")[1] for name, value in sft.items() if not torch.equal(value, reward[name])}
        assert moved == {"1"}  # LoRA in the upper half of two layers
    assert not list(site.rglob("corpus.jsonl"))
    found = {result["arm"]: result for result in read_results(place.results)}
    for arm in ("SmolLM2 135M", "Gemma 3 270M"):
        assert list(found[arm]["calibration"]["states"]) == ["as trained", "head tuned", "all weights tuned"]
    of = found["reward of Gemma 3 270M"]["transfer"]
    assert {name: list(counts) for name, counts in of.items()} == {
        "smollm2": ["0", "5", "10", "25", "50"],
        "gemma3": ["0"],
    }


# Pages


def test_restored_is_smallest_sufficient_number():
    gains = {0: 5.0, 5: 8.9, 10: 9.0, 25: 8.0, 50: 12.0}
    assert [transfer_page.restored(gains, own) for own in (10, 13, 5)] == ["10", "50", "0"]
    assert [transfer_page.restored(gains, own) for own in (14, 0)] == ["none of these", "nothing to restore"]


def made(study: str, seed: int, arm: str, **more) -> dict:
    given = {"world": "checked", "seed": seed, "arm": arm, "kind": study, "split": "test", "fast": False}
    return {**given, "questions": 300, "seconds": 36.0, "machine": "m", "torch": "t", "trl": "l", **more}


def test_spearman_and_holm_values():
    # Of 120 orders of five only this one and its reverse are as extreme.
    assert calibration_page.spearman([1, 2, 3, 4, 9], [2, 4, 5, 7, 8]) == pytest.approx((1, 2 / 120))
    x, y = [3.0, 1.0, 2.0, 5.0, 4.0], [1.0, 3.0, 2.0, 4.0, 5.0]
    assert calibration_page.spearman(x, y)[0] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert np.isnan(calibration_page.spearman([1, 1, 1], [1, 2, 3])).all()
    # Within pairs there are 4 orders.
    x, y = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]
    every = [[1, 2, 3, 4], [2, 1, 3, 4], [1, 2, 4, 3], [2, 1, 4, 3]]
    rhos = [stats.spearmanr(order, y).statistic for order in every]
    expected = np.mean([abs(rho) >= rhos[0] - 1e-9 for rho in rhos])
    assert calibration_page.spearman(x, y, [2, 2]) == pytest.approx((rhos[0], expected))
    assert calibration_page.orders((3, 3, 3, 3)).shape == (6**4, 12)
    assert calibration_page.orders((12,)).shape == (10_000, 12)
    # 3 tests: 0.01 <= 0.05 / 3, 0.02 <= 0.05 / 2, 0.06 > 0.05
    assert calibration_page.holm([0.06, 0.01, float("nan"), 0.02]) == [False, True, False, True]
    # The smallest fails, so all fail.
    assert calibration_page.holm([0.02, 0.021, 0.022]) == [False, False, False]


def test_between_and_centred_values():
    # Group means 1 and 3 around 2: the between-group share is 4 / (4 + 4).
    share, p = calibration_page.between([[0.0, 2.0], [2.0, 4.0]])
    assert share == 0.5
    assert p == pytest.approx(stats.f_oneway([0, 2], [2, 4]).pvalue)
    found = calibration_page.centred(pd.Series([1.0, 3.0, 0.1, 0.1]), pd.Series(["a", "a", "b", "b"]))
    assert found.tolist() == [-1, 1, 0, 0]


def test_bins_are_pooled_over_cells():
    probabilities, accuracies = calibration_page.pooled(pd.Series([[[0.15, 1.0, 1], [1.0, 0.5, 2]], [[0.19, 0.0, 3]]]))
    assert probabilities.tolist() == pytest.approx([(0.15 + 3 * 0.19) / 4, 1.0])
    assert accuracies.tolist() == pytest.approx([0.25, 0.5])


def test_undefined_values_are_omitted_and_labelled(tmp_path):
    """With only wrong samples there is no ranking and no calibration, and the page is still written."""
    model = reward_model()
    fit, test = ([{**row, "correct": False} for row in samples(6, seed)] for seed in (1, 2))
    judged = calibration.judge(model, fit, test)
    assert set(calibration_page.MEASURES) - set(judged) >= {"auroc", "ece_platt", "probe_auroc", "separation"}
    assert judged["ece"] == pytest.approx(judged["mean_probability"])
    found = {"parameters": 1, "accuracy": 0.0, "labelled": 3, "labelled_right": 0, "digits_per_token": 1.0}
    rows = [made("calibration", 0, "Llama", calibration={**found, "states": {"as trained": judged}})]
    assert "| Llama | 1 | 1.00 | 0.0 | undefined |" in page_of(tmp_path, rows)
    alone = transfer.aurocs([{**row, "reward": 0.0, "unknown": False} for row in test])
    assert alone == {"unknown": 0.0}
