"""Evaluation of a study's policies and reward models."""

from typing import Any

import torch
from transformers import PreTrainedModel

from studies.setup.site import TASK, Site
from tracereward.commands.rerank import rerank_rows, summary
from tracereward.commands.score import as_row
from tracereward.files import atomic_write_json, read_json, read_jsonl, without_nan, write_jsonl
from tracereward.generation.params import SamplingParams
from tracereward.generation.sampling import sample
from tracereward.metrics import point_biserial, wilson_interval
from tracereward.modeling.loading import best_device, load_causal_lm
from tracereward.modeling.log_probs import mean_log_probs
from tracereward.modeling.tokenization import encode_completion, encode_prompt, load_tokenizer, pad_id
from tracereward.rewards.model import TokenRewardModel
from tracereward.tasks.recipes import get_task


def load_policy(site: Site, arm: str) -> PreTrainedModel:
    """An arm's policy, on the GPU if there is one."""
    return load_causal_lm(str(site.policy(arm)), torch.float32, best_device())


def greedy(site: Site, arm: str, part: str) -> dict[str, Any]:
    """Greedy accuracy of an arm on one part's questions; stored, since every cell reads the SFT policy's.

    Returns:
        accuracy with its Wilson interval low, high; no_answer, the number of traces without one; distinct, distinct
        traces over questions (a collapsed policy repeats one trace); questions. accuracy_unseen: accuracy on
        questions of kinds without demonstrations, if there are any.
    """
    kept = site.run(arm) / f"greedy-{part}.json"
    if kept.exists():
        return read_json(kept)
    task, rows = get_task(TASK), read_jsonl(site.data(part))
    policy = load_policy(site, arm)
    params = SamplingParams(max_new_tokens=site.world.completion, temperature=0.0, batch_size=512)
    chunks = sample(policy, load_tokenizer(str(site.run("init"))), [row["prompt"] for row in rows], params)
    texts = [s.text for chunk in chunks for s in chunk]
    correct = [task.verify(text, row["answer"]) for text, row in zip(texts, rows, strict=True)]
    unseen = [is_right for is_right, row in zip(correct, rows, strict=True) if row.get("unseen")]
    low, high = wilson_interval(sum(correct), len(rows))
    no_answer = sum(task.extract(text) is None for text in texts)
    distinct = len(set(texts)) / len(texts)
    judged = {
        "accuracy": sum(correct) / len(rows),
        "low": low,
        "high": high,
        "no_answer": no_answer,
        "distinct": distinct,
        "questions": len(rows),
        **({"accuracy_unseen": sum(unseen) / len(unseen)} if unseen else {}),
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(kept, judged)
    return judged


def draw_samples(site: Site, arm: str, part: str, n: int) -> list[dict[str, Any]]:
    """`n` samples of an arm's policy per question of one part; sampled once and stored."""
    file = site.run("samples") / f"{arm}-{part}-{n}.jsonl"
    if file.exists():
        return read_jsonl(file)
    task, questions = get_task(TASK), read_jsonl(site.data(part))
    policy = load_policy(site, arm)
    tokenizer = load_tokenizer(str(site.run("init")))
    texts = [row["prompt"] for row in questions]
    rows = []
    # The KV cache of a pretrained model takes 6 GB at 1,600 rows.
    size = 2400 if site.world.model is None else 1600 if best_device().type == "cuda" else 320
    params = SamplingParams(max_new_tokens=site.world.completion, seed=site.seed, batch_size=size)
    for chunk in sample(policy, tokenizer, texts, params, n=n):
        for s in chunk:
            gold = questions[s.prompt]["answer"]
            rows.append(
                {
                    "question": s.prompt,
                    "prompt": texts[s.prompt],
                    "completion": s.text,
                    "answer": gold,
                    "correct": task.verify(s.text, gold),
                    "finished": s.finished,
                    "logprob": s.logprob,
                }
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(file, rows)
    return rows


def rank(site: Site, arm: str, samples: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The accuracy of each selection method, and the samples scored by an arm's reward model without added log-prob."""
    model = TokenRewardModel.from_pretrained(str(site.run(arm) / "reward_model")).to(best_device())
    scores = model.score(
        [row["prompt"] for row in samples],
        [row["completion"] for row in samples],
        finished=[row["finished"] for row in samples],
    )
    scored = [
        {**row, "supervised": trace.supervised, "step_ends": trace.step_ends, **as_row(trace, model)}
        for row, trace in zip(samples, scores, strict=True)
    ]
    r = point_biserial([row["reward"] for row in scored], [row["correct"] for row in scored])
    return {**ranking(scored), "reward_r": without_nan(r)}, scored


def rank_by_log_probs(site: Site, samples: list[dict[str, Any]], sign: float) -> dict[str, Any]:
    """`ranking` by log p_SFT + sign * log p_base; -1 is the log-ratio, which needs no discriminator."""
    tokenizer = load_tokenizer(str(site.run("init")))
    base = load_policy(site, site.start)
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in samples]
    completions = [encode_completion(tokenizer, row["completion"]) for row in samples]
    completions = [ids if row["finished"] else ids[:-1] for ids, row in zip(completions, samples, strict=True)]
    values = mean_log_probs(base, prompts, completions, pad_id(tokenizer))
    return ranking(
        [{**row, "reward": row["logprob"] + sign * value} for row, value in zip(samples, values, strict=True)]
    )


def ranking(scored: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of each selection method, and AUROCs."""
    task = get_task(TASK)
    _, questions = rerank_rows(scored, task, "vote")
    table = summary(questions, task)
    assert table is not None
    return table


def collapsed(accuracy: float, distinct: float, start: dict[str, Any]) -> bool:
    """Whether accuracy is over 5 points below the starting policy's, or distinct traces below half of its share."""
    return accuracy < start["accuracy"] - 0.05 or distinct < start["distinct"] / 2


def stopped(site: Site, arm: str) -> str | None:
    """Name of the failure rule that stopped an adversarial run; None if none did."""
    rows = read_jsonl(site.run(arm) / "metrics.jsonl")
    return next((row["failure"] for row in rows if row.get("phase") == "failure"), None)


def chosen(site: Site, arm: str) -> str | None:
    """The checkpoint that validation selected, or ``start``; None for a run without validation."""
    rows = read_jsonl(site.run(arm) / "metrics.jsonl")
    return next((row["chosen"] for row in rows if row.get("phase") == "choice"), None)
