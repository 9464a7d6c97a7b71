"""The arms of a study: one world's policies, each trained in a run folder of its own, and how they are judged."""

import hashlib
import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl import ModelConfig

from tracereward.adversarial_config import AdversarialConfig
from tracereward.config import DataArguments, RewardConfig, SupervisedConfig
from tracereward.demonstrations import encode_completion, encode_prompt
from tracereward.files import atomic_folder, atomic_write_json, read_jsonl, write_jsonl
from tracereward.metrics import point_biserial, wilson_interval
from tracereward.models import load_tokenizer, pad_id
from tracereward.pool import as_row, best_device, rerank_rows, summary
from tracereward.reward_model import TokenRewardModel
from tracereward.run import run_grpo, run_sft, run_train
from tracereward.sampling import mean_log_probs, sample
from tracereward.studies.backbones import write_untrained
from tracereward.studies.worlds import COMMON, World
from tracereward.tasks import get_task
from tracereward.tasks.arithmetic import MISTAKE_RATES, build_model, build_tokenizer, generate, splits

TASK = "arithmetic"
MODEL_OPTIONS = ("discriminator_model", "warmup_model")
"""Options whose value may be the name of an arm, e.g. ``base``."""
LINEAR = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
"""Linear maps of a layer, by the names that Llama, Qwen and Gemma give them."""


def digest(value: Any) -> str:
    """Eight hexadecimal digits that change with any option."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Site:
    """A world drawn with a seed, and the folder in which its policies are trained.

    Attributes:
        folder: holds ``data/``, ``init/`` and a run folder for each arm.
        world: sizes and options.
        seed: of data, models and training.
        fast: a tenth of the steps, for trying out.
        quiet: no progress bars.
        experts: how many of the world's demonstrations there are, the first ones; None: all.
        corrupt: share of them that end in a wrong answer.
        backbone: one of `backbones.LABELS`, which trains beside the world's own on the same data; None: the world's.
    """

    folder: Path
    world: World
    seed: int
    fast: bool = False
    quiet: bool = False
    experts: int | None = None
    corrupt: float | None = None
    backbone: str | None = None

    def data(self, part: str) -> Path:
        """File of one part of the data."""
        return self.folder / "data" / f"{part}.jsonl"

    @property
    def demonstrations(self) -> str:
        """The part of the data that holds them."""
        few = "" if self.experts is None else f"-{self.experts}"
        wrong = "" if self.corrupt is None else f"-corrupt-{self.corrupt:g}"
        return f"experts{few}{wrong}"

    def run(self, arm: str) -> Path:
        """Run folder of an arm; what knows no demonstrations is shared by all parts of them."""
        shared = arm in ("init", "base") or self.demonstrations == "experts"
        home = self.folder if self.backbone is None else self.folder / self.backbone
        return home / arm if shared else home / self.demonstrations / arm

    def policy(self, arm: str) -> Path:
        """Folder of an arm's policy, or the Hub id of the world's model."""
        if arm == "init" and self.world.model is not None:
            return Path(self.world.model)
        return self.run(arm) if arm == "init" else self.run(arm) / "policy"

    @property
    def sft(self) -> dict[str, Any]:
        """The world's options of SFT; a batch is no larger than the demonstrations."""
        batch = min(self.world.sft["per_device_train_batch_size"], self.experts or self.world.experts)
        return {**self.world.sft, "per_device_train_batch_size": batch}

    @property
    def start(self) -> str:
        """What SFT starts from: ``base``, the pretrained model, or ``init`` where the world has no pretraining."""
        return "base" if self.world.pretraining else "init"

    def options(self, arm: str, given: dict[str, Any]) -> dict[str, Any]:
        """All options of an arm's training."""
        merged = {**COMMON, "max_completion_length": self.world.completion, "save_steps": given["max_steps"], **given}
        if self.fast:
            merged["max_steps"] = max(4, merged["max_steps"] // 10)
            merged["save_steps"] = min(merged["save_steps"], merged["max_steps"])
        quiet = {"disable_tqdm": True} if self.quiet else {}
        return {**merged, **quiet, "output_dir": str(self.run(arm)), "seed": self.seed}

    def unfinished(self, arm: str) -> bool:
        """Whether a run of this arm was begun: then it goes on."""
        return (self.run(arm) / "config.yaml").is_file()


def make_world(site: Site) -> None:
    """Write the rows and the untrained model, ``init`` last; of a pretrained model the tokenizer alone."""
    if site.backbone is None:  # another one's rows are the same
        _write_rows(site)
    if site.world.model is None and site.backbone is not None:
        write_untrained(site.backbone, site.seed, replace(site, backbone=None).run("init"), site.run("init"))
        return
    with atomic_folder(site.run("init")) as folder:
        if site.world.model is not None:
            load_tokenizer(site.world.model).save_pretrained(folder)
            return
        tokenizer = build_tokenizer()
        build_model(tokenizer, site.seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _write_rows(site: Site) -> None:
    world = site.world
    parts = splits(world.name, site.seed, world.experts, world.validation, world.test, world.unlabeled)
    site.data("test").parent.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        write_jsonl(site.data(part), rows)
    if world.corpus:
        held_out = {row["prompt"] for part in ("test", "validation") for row in parts[part]}
        corpus = generate(world.name, world.corpus, 5000 + site.seed, MISTAKE_RATES[world.name], held_out, unique=False)
        write_jsonl(site.data("corpus"), corpus)


def choose_demonstrations(site: Site) -> None:
    """Write the site's part of the demonstrations, unless it is there.

    A corrupt one is of the kind that the pretraining corpus holds, on a problem of its own, and its answer is wrong.
    """
    path = site.data(site.demonstrations)
    if path.exists():
        return
    world, task = site.world, get_task(TASK)
    rows = read_jsonl(site.data("experts"))[: site.experts]
    count = round((site.corrupt or 0) * len(rows))
    if count:
        parts = ("experts", "validation", "test", "unlabeled")
        used = {row["prompt"] for part in parts if site.data(part).exists() for row in read_jsonl(site.data(part))}
        drawn = generate(world.name, 10 * count, 9000 + site.seed, MISTAKE_RATES[world.name], used)
        wrong = [row for row in drawn if not task.verify(row["completion"], row["answer"])]
        rows[:count] = wrong[:count]
    write_jsonl(path, rows)


def train_sft(
    site: Site, arm: str, start: str, given: dict[str, Any], part: str | None = None, choose: bool = False
) -> None:
    """SFT of one arm's policy on the demonstrations, or on another part of the data; see `data_of` for `choose`."""
    data = data_of(site, part or site.demonstrations, choose)
    model = ModelConfig(model_name_or_path=str(site.policy(start)))
    run_sft(data, SupervisedConfig(**site.options(arm, given)), model, site.unfinished(arm))


def tune_sft(site: Site) -> None:
    """SFT with each of the world's settings; ``sft`` is the one with the best greedy accuracy on validation questions.

    Writes ``sft/tuning.json``. The first of equals wins.
    """
    tried = []
    for index, setting in enumerate(site.world.sft_grid):
        arm = f"sft-{index}"
        if not (site.run(arm) / "report.html").exists():
            train_sft(site, arm, site.start, {**site.sft, **setting})
        tried.append({**setting, "accuracy": greedy(site, arm, "validation")["accuracy"]})
    best = max(range(len(tried)), key=lambda index: tried[index]["accuracy"])
    with atomic_folder(site.run("sft")) as folder:
        shutil.copytree(site.policy(f"sft-{best}"), folder / "policy")
        (folder / "tuning.json").write_text(json.dumps({"tried": tried, "chosen": best}, indent=1), encoding="utf-8")


def continue_sft(site: Site, arm: str, choose: bool = False) -> None:
    """The same SFT continued from ``sft`` for as many steps as GRPO takes."""
    given = {**site.sft, "max_steps": site.world.grpo["max_steps"]}
    train_sft(site, arm, "sft", {**given, **saves(given, choose)}, choose=choose)


def data_of(site: Site, part: str, choose: bool) -> DataArguments:
    """One part of the data; with `choose` the validation questions choose among start and checkpoints."""
    validation = str(site.data("validation")) if choose else None
    return DataArguments(task=TASK, dataset_name=str(site.data(part)), validation_dataset_name=validation)


def saves(given: dict[str, Any], choose: bool) -> dict[str, Any]:
    """Four checkpoints to choose from, or the last alone."""
    if not choose:
        return {}
    return {"save_strategy": "steps", "save_steps": max(1, math.ceil(given["max_steps"] / 4))}


def prompts(site: Site, unlabeled: int | None = None, choose: bool = False) -> DataArguments:
    """The demonstrations and, for rollouts, the first `unlabeled` of the world's further prompts (default: all)."""
    data = data_of(site, site.demonstrations, choose)
    if unlabeled is None and site.world.unlabeled:
        data.unlabeled_dataset_name = str(site.data("unlabeled"))
    elif unlabeled:
        part = f"unlabeled-{unlabeled}"
        if not site.data(part).exists():
            write_jsonl(site.data(part), read_jsonl(site.data("unlabeled"))[:unlabeled])
        data.unlabeled_dataset_name = str(site.data(part))
    return data


def lora(site: Site) -> dict[str, Any]:
    """Options of `trl.ModelConfig` for the world's LoRA; none where all weights are trained.

    The lower half of the layers then has no backward pass: a third of a step's time.
    """
    rank = site.world.lora
    if rank is None:
        return {}
    layers = AutoConfig.from_pretrained(site.policy(site.start)).num_hidden_layers
    targets = [f"{layer}.{part}" for layer in range(layers // 2, layers) for part in LINEAR]
    return {"use_peft": True, "lora_r": rank, "lora_alpha": 2 * rank, "lora_target_modules": targets}


def train_grpo(site: Site, arm: str, reward: str, choose: bool = False) -> None:
    """GRPO from ``sft`` on a given reward: ``logprob`` or ``logratio`` (controls), or ``verifier`` (upper)."""
    base = str(site.policy(site.start)) if reward == "logratio" else None
    given = {**site.world.grpo, **saves(site.world.grpo, choose)}
    config = RewardConfig(**site.options(arm, given), reward=reward, base_model=base)
    run_grpo(
        prompts(site, choose=choose),
        config,
        ModelConfig(model_name_or_path=str(site.policy("sft")), **lora(site)),
        site.unfinished(arm),
    )


def train_irl(site: Site, arm: str, options: dict[str, Any]) -> None:
    """Warm-up and adversarial GRPO.

    Beside the options of `AdversarialConfig`, ``unlabeled`` says how many further prompts there are, ``start`` which
    arm the policy starts from (default: ``sft``) and ``choose`` whether validation questions choose the checkpoint; a
    model option may name an arm.
    """
    given = {**site.world.grpo, **options}
    unlabeled, start, choose = given.pop("unlabeled", None), given.pop("start", "sft"), given.pop("choose", False)
    given |= saves(given, choose)
    for name in MODEL_OPTIONS:
        if given.get(name) is not None:
            given[name] = str(site.policy(site.start if given[name] == "base" else given[name]))
    if site.fast:
        given["discriminator_warmup_updates"] = 8
    config = AdversarialConfig(**site.options(arm, given))
    policy = str(site.policy(site.start if start == "base" else start))
    model = ModelConfig(model_name_or_path=policy, **lora(site))
    run_train(prompts(site, unlabeled, choose), config, model, site.unfinished(arm))


def load_policy(site: Site, arm: str) -> PreTrainedModel:
    """An arm's policy, on the accelerator if there is one."""
    policy: PreTrainedModel = AutoModelForCausalLM.from_pretrained(site.policy(arm), dtype=torch.float32)
    return policy.to(best_device())  # pyright: ignore[reportArgumentType]


def greedy(site: Site, arm: str, part: str) -> dict[str, Any]:
    """Greedy accuracy of an arm on one part's questions.

    Returns:
        accuracy with its Wilson interval low, high; no_answer, traces without one; distinct, the share of questions
        with a trace of their own: a collapsed policy writes the same to all. Where some are of kinds that no
        demonstration has, accuracy_unseen is of these alone. Kept, as the SFT policy's is asked for by every cell.
    """
    kept = site.run(arm) / f"greedy-{part}.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    task, rows = get_task(TASK), read_jsonl(site.data(part))
    policy = load_policy(site, arm)
    chunks = sample(
        policy,
        load_tokenizer(str(site.run("init"))),
        [row["prompt"] for row in rows],
        1,
        site.world.completion,
        0,
        batch_size=512,
    )
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
    """`n` samples of an arm's policy for each question of one part; drawn once and kept."""
    file = site.run("samples") / f"{arm}-{part}-{n}.jsonl"
    if file.exists():
        return read_jsonl(file)
    task, questions = get_task(TASK), read_jsonl(site.data(part))
    policy = load_policy(site, arm)
    tokenizer = load_tokenizer(str(site.run("init")))
    texts = [row["prompt"] for row in questions]
    rows = []
    # A pretrained model's keys and values of 1,600 rows fill 6 GB.
    size = 2400 if site.world.model is None else 1600 if best_device().type == "cuda" else 320
    for chunk in sample(policy, tokenizer, texts, n, site.world.completion, seed=site.seed, batch_size=size):
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
    """Samples scored by an arm's reward model, without a log-prob added, and what each way of choosing reaches."""
    model = TokenRewardModel.from_pretrained(str(site.run(arm) / "reward_model")).to(best_device())
    scores = model.score(
        [row["prompt"] for row in samples],
        [row["completion"] for row in samples],
        [row["finished"] for row in samples],
    )
    scored = [
        {**row, "supervised": trace.supervised, "step_ends": trace.step_ends, **as_row(trace, model)}
        for row, trace in zip(samples, scores, strict=True)
    ]
    r = point_biserial([row["reward"] for row in scored], [row["correct"] for row in scored])
    return {**ranking(scored), "reward_r": None if math.isnan(r) else r}, scored


def rank_by_log_probs(site: Site, samples: list[dict[str, Any]], sign: float) -> dict[str, Any]:
    """What choosing by log p_SFT + sign * log p_base reaches: -1 is the log-ratio, which needs no discriminator."""
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
    """Accuracy of each way of choosing, and AUROCs."""
    task = get_task(TASK)
    _, questions = rerank_rows(scored, task, "vote")
    table = summary(questions, task)
    assert table is not None
    return table


def collapsed(accuracy: float, distinct: float, start: dict[str, Any]) -> bool:
    """Accuracy more than 5 points under the starting policy's, or under half its share of distinct traces."""
    return accuracy < start["accuracy"] - 0.05 or distinct < start["distinct"] / 2


def stopped(site: Site, arm: str) -> str | None:
    """Name of the failure that ended an adversarial run, if one did."""
    rows = read_jsonl(site.run(arm) / "metrics.jsonl")
    return next((row["failure"] for row in rows if row.get("phase") == "failure"), None)


def chosen(site: Site, arm: str) -> str | None:
    """Which checkpoint the validation questions chose, or ``start``; None of a run that was not chosen from."""
    rows = read_jsonl(site.run(arm) / "metrics.jsonl")
    return next((row["chosen"] for row in rows if row.get("phase") == "choice"), None)
