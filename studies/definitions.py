"""The studies. Each is data: its arms over worlds and seeds, the question, and the split it looks at."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from studies.design import (
    BASE,
    CONTINUED,
    CONTROLS_AND_IRL,
    IRL,
    LOGPROB,
    LOGRATIO,
    RATIO,
    SFT,
    SUM,
    VERIFIER,
    Arm,
    Study,
    at,
    chosen,
    irl,
)
from studies.setup.backbones import COMPARED, LABELS, PRETRAINED, own
from studies.setup.frozen import FROZEN
from studies.setup.settings import PRETRAINED_RECIPE
from tracereward.quickstart.worlds import FIRST_RECIPE, R1_RECIPE, STEADY

GRANULARITIES = ("sparse", "step", "interval", "dense")
SHARES = (10, 25, 50, 75, 100)
"""Percent of a world's demonstrations."""
NAIVE: dict[str, Any] = {
    "head": "token",
    "reward_form": "logit",
    "advantages": "token",
    "label_smoothing": 0.0,
    "perturbed_per_expert": 0,
    "replay_share": 0.0,
    "first_difference": "none",
    "discriminator_every": 1,
    "on_failure": "ignore",
}
"""Dense rewards with nothing that steadies them: a classifier's logit on every token, its return-to-go as advantage."""
HEADS = {"token": {}, "action": {}, "airl": {"reward_form": "f"}}

_CONTROLS = (
    "GRPO and IRL also use further prompts without traces where the world has them (3,000 in `exposure`, `checked` and "
    "`misconception`); SFT cannot. GRPO with the verifier uses gold answers: the upper bound. SFT is tuned over "
    "learning rates and lengths on validation questions; the same questions choose between the start and four "
    "checkpoints in every arm that trains."
)


def _of_backbones(backbones: Iterable[str], kind: str, options: dict[str, Any], label: str = "{}") -> tuple[Arm, ...]:
    """An arm of each backbone."""
    return tuple(
        Arm(name=label.format(LABELS[name]), kind=kind, options=options, backbone=own(name)) for name in backbones
    )


def _rewards_of(backbones: Iterable[str]) -> tuple[Arm, ...]:
    """The reward of each backbone on the policies of all."""
    options = {**FROZEN, "policies": list(backbones), "demonstrations": [5, 10, 25, 50]}
    options |= {"updates": 20, "head_learning_rate": 1e-2}
    return _of_backbones(backbones, "transfer", options, label="reward of {}")


STUDIES = {
    "recipe": Study(
        "Does the learned reward carry more than log-prob?",
        "The default recipe against what needs no reward model, at equal demonstrations, on seeds and test questions "
        f"that chose nothing, where mistakes leave a mark that experts never make. {_CONTROLS}",
        worlds=("exposure",),
        seeds=range(40, 48),
        arms=chosen(CONTROLS_AND_IRL),
    ),
    "worlds": Study(
        "The recipe in other worlds",
        "As the study of the recipe: `checked`, where the mark stands behind a check that does not come out; `style`, "
        "where experts are right in ways that the student can and cannot follow; `multi-skill`, where they have "
        "several ways of working of unequal reliability; `misconception`, where nothing gives a mistake away but the "
        f"wrong value. {_CONTROLS}",
        worlds=("checked", "style", "multi-skill", "misconception"),
        seeds=range(40, 45),
        arms=chosen(CONTROLS_AND_IRL),
    ),
    "longer": Study(
        "The recipe with twice the steps",
        "World `checked` as in the study of other worlds, where the last of 100 steps was the best in all five runs: "
        f"200 steps for every arm that trains, on other seeds. {_CONTROLS}",
        worlds=("checked",),
        seeds=range(50, 55),
        arms=chosen(CONTROLS_AND_IRL),
        steps=200,
    ),
    "unmarked": Study(
        "Does the reward help where a mistake leaves no mark?",
        "As the study of the recipe, in a world where nothing gives a mistaken trace away but the wrong value, and "
        "with what the studies of objective and granularity chose there (R1 penalty 1, learning rate 3e-4).",
        worlds=("misconception",),
        seeds=range(10, 15),
        recipe=R1_RECIPE,
        arms=CONTROLS_AND_IRL,
    ),
    "granularity": Study(
        "Which tokens are supervised, by which head, with which advantages?",
        "Supervision granularity times head times advantages, all else as in the recipe. Head `airl` rewards f, the "
        "others the logit plus the log-prob under the starting policy.",
        worlds=("misconception",),
        seeds=range(3),
        split="validation",
        recipe=R1_RECIPE,
        arms=(
            SFT,
            LOGPROB,
            *(
                irl(
                    f"{granularity} {head} {advantages}",
                    granularity=granularity,
                    interval=5,
                    head=head,
                    advantages=advantages,
                    **options,
                )
                for granularity in GRANULARITIES
                for head, options in HEADS.items()
                for advantages in ("trajectory", "token")
            ),
        ),
    ),
    "objective": Study(
        "Objective, negatives, unlabeled prompts, updates, stabilisers",
        "One factor at a time from a first recipe, then combinations of what helped.",
        worlds=("misconception",),
        seeds=range(3),
        split="validation",
        recipe=FIRST_RECIPE,
        arms=(
            SFT,
            CONTINUED,
            LOGPROB,
            LOGRATIO,
            VERIFIER,
            RATIO,
            SUM,
            IRL,
            irl("objective pairwise", objective="pairwise"),
            irl("objective wgan + gradient penalty", objective="wgan", gradient_penalty=10.0),
            irl("shared prefix not masked", first_difference="none"),
            irl("shared prefix masked on both sides", first_difference="both"),
            irl("+ perturbed experts", perturbed_per_expert=1),
            irl("no replay", replay_share=0.0),
            irl("no unlabeled prompts", unlabeled=0),
            irl("unlabeled 1x", unlabeled=50),
            irl("unlabeled 10x", unlabeled=500),
            irl("update every batch", discriminator_every=1),
            irl("frozen after warm-up", discriminator_updates=0),
            irl("held out 10 %", held_out_fraction=0.1),
            irl("held out 10 %, gate at 0.9", held_out_fraction=0.1, discriminator_gate_high=0.9),
            irl("EMA 0.9", discriminator_ema=0.9),
            irl("reward logit", reward_form="logit"),
            irl("reward f (airl, no added log-prob)", head="airl", reward_form="f"),
            irl("head implicit", head="implicit", reward_form="f"),
            irl("KL 1e-3", beta=1e-3),
            irl("KL 1e-2", beta=1e-2),
            irl("expert NLL 0.1", expert_nll=0.1),
            irl("discriminator from SFT", discriminator_model="sft"),
            irl("warm-up rollouts of SFT", warmup_model="sft"),
            irl("no label smoothing", label_smoothing=0.0),
            irl("label smoothing 0.3", label_smoothing=0.3),
            irl("warm-up learning rate 1e-4", discriminator_learning_rate=1e-4),
            irl("policy from base, reward logit", start="base", reward_form="logit"),
            irl("centre penalty 0.1", centre_penalty=0.1),
            irl("R1 penalty 1", r1_penalty=1.0),
            irl("spectral norm", spectral_norm=True),
            irl("token dropout 0.1", token_dropout=0.1),
            irl("warm-up 120 updates", discriminator_warmup_updates=120),
            irl("trace reward: minimum", reward_aggregate="min"),
            irl("smoothing 0.3 + perturbed", label_smoothing=0.3, perturbed_per_expert=1),
            irl("smoothing 0.4 + perturbed", label_smoothing=0.4, perturbed_per_expert=1),
            irl(
                "smoothing 0.3 + perturbed, masked on both sides",
                label_smoothing=0.3,
                perturbed_per_expert=1,
                first_difference="both",
            ),
            irl(
                "smoothing 0.3 + perturbed, warm-up 1e-4",
                label_smoothing=0.3,
                perturbed_per_expert=1,
                discriminator_learning_rate=1e-4,
            ),
            irl("smoothing 0.3 + 2 perturbed", label_smoothing=0.3, perturbed_per_expert=2),
            irl("perturbed + R1 1", perturbed_per_expert=1, r1_penalty=1.0),
            irl("smoothing 0.3 + perturbed + R1 1", label_smoothing=0.3, perturbed_per_expert=1, r1_penalty=1.0),
        ),
    ),
    "stability": Study(
        "What keeps dense rewards from collapsing?",
        "Naive dense rewards: a new head on the last hidden states, cross-entropy, the logit of each token as its "
        "reward, the return-to-go as its advantage, updates after every batch, no replay, no smoothing, no perturbed "
        "experts, no mask, no failure rule. Each stabiliser is added to that alone, and taken from the recipe alone. "
        "A collapse was defined before the runs. The first five arms have eight seeds, the others the first three. "
        "The two arms behind the recipe were added when its own runs on these seeds had been seen: in the first, "
        "validation questions choose among start and checkpoints; the second has what the study of the objective chose "
        "here on other seeds: R1 penalty 1, learning rates 3e-4 and 5e-5, 32 demonstrations with 2 rollouts in an "
        "update.",
        worlds=("misconception",),
        seeds=range(40, 48),
        arms=(
            SFT,
            IRL,
            *chosen((replace(IRL, name="IRL, validation questions choose"),)),
            irl("IRL, R1 1, a third of the steps' size", **STEADY),
            irl("naive", **NAIVE),
            *(
                replace(irl(f"naive, {name}", **{**NAIVE, **options}), seeds=3)
                for name, options in {
                    "head action": {"head": "action"},
                    "head action, reward logit + log-prob": {"head": "action", "reward_form": "logit_plus_logprob"},
                    "head airl, reward f": {"head": "airl", "reward_form": "f"},
                    "trajectory advantages": {"advantages": "trajectory"},
                    "replay": {"replay_share": 0.5},
                    "label smoothing": {"label_smoothing": 0.1},
                    "perturbed experts": {"perturbed_per_expert": 1},
                    "R1 1": {"r1_penalty": 1.0},
                    "pairwise": {"objective": "pairwise"},
                    "wgan + spectral norm": {"objective": "wgan", "spectral_norm": True},
                    "gate 0.9": {"held_out_fraction": 0.1, "discriminator_gate_high": 0.9},
                    "EMA 0.9": {"discriminator_ema": 0.9},
                    "KL 1e-2": {"beta": 1e-2},
                    "whitened": {"whiten_rewards": True, "scale_rewards": "none"},
                }.items()
            ),
            *(
                replace(irl(f"recipe, {name}", **options), seeds=3)
                for name, options in {
                    "head token": {"head": "token"},
                    "head implicit, reward f": {"head": "implicit", "reward_form": "f"},
                    "reward logit": {"reward_form": "logit"},
                    "token advantages": {"advantages": "token"},
                    "no replay": {"replay_share": 0.0},
                    "no label smoothing": {"label_smoothing": 0.0},
                    "no perturbed experts": {"perturbed_per_expert": 0},
                    "R1 1": {"r1_penalty": 1.0},
                }.items()
            ),
        ),
    ),
    "scarcity": Study(
        "How few demonstrations are enough?",
        "10 to 100 % of the demonstrations, for SFT, which is tuned for each share, as for the discriminator. Rewards "
        "of each supervision granularity are frozen after their warm-up and judged as rankings; dense ones also train "
        "a policy, with the recipe and half of the world's steps, where validation questions choose among start and "
        "checkpoints.",
        worlds=("checked",),
        seeds=range(40, 45),
        arms=tuple(
            at(arm, f"{share}", experts=share)
            for share in SHARES
            for arm in (
                SFT,
                *chosen((IRL,)),
                *(irl(f"frozen, {name}", granularity=name, **FROZEN) for name in GRANULARITIES),
            )
        ),
        steps=50,
    ),
    "corrupt": Study(
        "How far do wrong experts take the method down?",
        "0, 10 or 25 % of the demonstrations end in a wrong answer: they are what the pretrained model would write. "
        "SFT is tuned for each share, and validation questions choose among start and checkpoints in every arm.",
        worlds=("checked",),
        seeds=range(40, 43),
        arms=chosen(at(arm, f"{share}", corrupt=share / 100) for share in (0, 10, 25) for arm in (SFT, IRL)),
    ),
    "smollm2": Study(
        "A pretrained language model as policy",
        "SmolLM2-135M-Instruct on generated word problems: 400 demonstrations in eleven stories, 3,000 prompts without "
        "traces; a quarter of the test are four stories that no other part has. SFT trains all weights for one epoch "
        "and is tuned over two learning rates on validation questions. GRPO trains LoRA adapters of rank 16 on the "
        "upper half of the layers, with 288 rollouts in 12 steps, and the policy after the last of them is judged: "
        "what two cores of a CPU do in a night. The frozen reward only ranks; its policy takes one step, at a learning "
        "rate of 0. The page shows whether such training holds on a pretrained model and how well its reward ranks, "
        "not how far long training would come.",
        worlds=("word-problems",),
        seeds=range(40, 43),
        recipe=PRETRAINED_RECIPE,
        arms=(
            BASE,
            SFT,
            IRL,
            LOGPROB,
            VERIFIER,
            CONTINUED,
            irl("frozen after warm-up", discriminator_updates=0, max_steps=1),
        ),
    ),
    "multihop": Study(
        "Does the reward help more where reasoning is longer?",
        "World `hops`: a question asks 2 to 6 facts, which are known by heart, one after another, each of what the "
        "last gave. From a third of the numbers the pretrained policy mostly goes one too far, sure of itself, and "
        "goes on from there. Each hop is a chance to go wrong: their number is the difficulty. SFT is tuned over "
        "learning rates and lengths on validation questions; the same questions choose between the start and four "
        "checkpoints where GRPO trains, which also has 3,000 prompts without traces. With the verifier it uses gold "
        "answers: the upper bound. The frozen reward is trained on rollouts drawn once. As in `misconception` nothing "
        "but a wrong value gives a mistake away, and options are what the study of the objective chose there (R1 "
        "penalty 1, learning rate 3e-4), with one perturbed copy of each expert. An earlier `hops`, whose facts stood "
        "in the prompt, was given up: in most seeds so small a model never learned to look them up.",
        worlds=("hops",),
        seeds=range(50, 55),
        recipe=STEADY,
        arms=(
            *chosen((BASE, SFT, LOGPROB, VERIFIER, IRL)),
            irl("frozen after warm-up", discriminator_updates=0, max_steps=4),
        ),
    ),
    "decoding": Study(
        "Does guided decoding beat choosing among whole samples at equal tokens?",
        "The policy is SFT's; the reward model guides it or chooses among its samples. Beam: the next steps of each of "
        "several partial traces are drawn, those of highest reward go on. Reject: the better half of the traces goes "
        "on, until one is left. Tilt: each token is drawn from p exp(alpha r) over the likeliest few, then the "
        "best of N such traces is chosen; top-k is the same without the reward in the drawing. Everything that was "
        "drawn counts, dropped traces and lookahead too.",
        worlds=("checked",),
        seeds=range(40, 45),
        arms=(Arm(name="frozen after warm-up", kind="decoding", options=FROZEN),),
        samples=32,
    ),
    "self-correction": Study(
        "Does cutting at the first suspected step mend more than it breaks?",
        "A sample of the SFT policy is cut before its first step whose mean token score is under a threshold, k "
        "continuations are drawn from there, and the one that the judge prefers takes its place if the judge prefers "
        "it to what was there, for up to r rounds.",
        worlds=("checked",),
        seeds=range(40, 45),
        arms=(Arm(name="frozen after warm-up", kind="self-correction", options=FROZEN),),
        samples=16,
    ),
    "reranking": Study(
        "Choosing one of 16 samples by a discriminator frozen after its warm-up",
        "The paper's second experiment: the policy stays as SFT left it; the discriminator is trained on rollouts "
        "drawn once, and ranks 16 samples of it.",
        worlds=("exposure", "checked", "style", "multi-skill", "misconception"),
        seeds=range(40, 45),
        arms=(
            SFT,
            *(
                irl(f"warm-up {updates} updates", **{**FROZEN, "discriminator_warmup_updates": updates})
                for updates in (40, 120)
            ),
        ),
        samples=16,
    ),
    "calibration": Study(
        "Why do some backbones give better calibrated rewards than others?",
        "The frozen reward of the study of reranking, learned alike by backbones of about the same size, on samples of "
        "each backbone's own SFT policy. The probability that a trace is right is the sigmoid of its reward. Each "
        "reward model is judged as it was trained, and after its head or all its weights were tuned on the labelled "
        "first samples of a third of the validation questions. Platt scaling and a linear probe of the trace's mean "
        "last hidden state are fitted on all samples of the others.",
        worlds=("checked",),
        seeds=range(40, 43),
        arms=_of_backbones(COMPARED, "calibration", FROZEN),
        pretrained=_of_backbones(PRETRAINED, "calibration", FROZEN),
    ),
    "transfer": Study(
        "Does a reward serve other backbones?",
        "The frozen reward of each backbone of the study of calibration ranks samples of each backbone's SFT policy. "
        "Between two tokenizers a token's reward goes to the policy's token that holds its last character. Then the "
        "reward is adapted to the other policy: 20 more updates of the discriminator's head alone, on the first 5 to "
        "50 of the demonstrations and rollouts of the other pretrained model on their prompts. And full adversarial "
        "training with a discriminator of a seventh of the policy's parameters, pretrained alike, beside the usual "
        "one.",
        worlds=("checked",),
        seeds=range(40, 43),
        arms=(
            *chosen((SFT, IRL, irl("IRL, smaller discriminator", discriminator_model="small/base"))),
            *_rewards_of(COMPARED),
        ),
        pretrained=_rewards_of(PRETRAINED),
    ),
}
