"""Definitions of the studies: question, worlds, seeds, arms and split of each."""

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
"""Shares of a world's demonstrations, in percent."""
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
"""Dense rewards without stabilisers: a classifier's logit on every token, its return-to-go as advantage."""
HEADS = {"token": {}, "action": {}, "airl": {"reward_form": "f"}}

_CONTROLS = (
    "GRPO and IRL also use prompts without traces where the world has them (3,000 in `exposure`, `checked` and "
    "`misconception`); SFT cannot. GRPO with the verifier uses gold answers and is the upper bound. SFT is tuned over "
    "learning rates and numbers of steps on validation questions; the same questions select among the starting policy "
    "and four checkpoints in every arm that trains."
)


def _of_backbones(backbones: Iterable[str], kind: str, options: dict[str, Any], label: str = "{}") -> tuple[Arm, ...]:
    """One arm per backbone."""
    return tuple(
        Arm(name=label.format(LABELS[name]), kind=kind, options=options, backbone=own(name)) for name in backbones
    )


def _rewards_of(backbones: Iterable[str]) -> tuple[Arm, ...]:
    """One arm per backbone: its reward on the policies of all backbones."""
    options = {**FROZEN, "policies": list(backbones), "demonstrations": [5, 10, 25, 50]}
    options |= {"updates": 20, "head_learning_rate": 1e-2}
    return _of_backbones(backbones, "transfer", options, label="reward of {}")


STUDIES = {
    "recipe": Study(
        "Does the learned reward carry more information than log-prob?",
        "The default recipe against baselines without a reward model, with the same demonstrations. Neither seeds nor "
        "test questions were used to select options. In this world mistakes leave a mark that experts never make. "
        f"{_CONTROLS}",
        worlds=("exposure",),
        seeds=range(40, 48),
        arms=chosen(CONTROLS_AND_IRL),
    ),
    "worlds": Study(
        "The recipe in other worlds",
        "The recipe study in four other worlds: `checked`, where the mark follows a failed check; `style`, where "
        "experts use correct styles that the student can follow and others that it cannot; `multi-skill`, where they "
        "have several solution methods of unequal reliability; `misconception`, where only the wrong value reveals a "
        f"mistake. {_CONTROLS}",
        worlds=("checked", "style", "multi-skill", "misconception"),
        seeds=range(40, 45),
        arms=chosen(CONTROLS_AND_IRL),
    ),
    "longer": Study(
        "The recipe with twice the steps",
        "200 steps for every arm that trains, in world `checked` on new seeds: in the study of other worlds the last "
        f"of 100 steps was the best in all five runs. {_CONTROLS}",
        worlds=("checked",),
        seeds=range(50, 55),
        arms=chosen(CONTROLS_AND_IRL),
        steps=200,
    ),
    "unmarked": Study(
        "Does the reward help where a mistake leaves no mark?",
        "The recipe study in a world where only the wrong value reveals a mistake, with the options that the studies "
        "of objective and granularity selected there (R1 penalty 1, learning rate 3e-4).",
        worlds=("misconception",),
        seeds=range(10, 15),
        recipe=R1_RECIPE,
        arms=CONTROLS_AND_IRL,
    ),
    "granularity": Study(
        "Which supervised tokens, which head, which advantages?",
        "Supervision granularity times head times advantages, all else as in the recipe. The reward of head `airl` is "
        "f; that of the others is the logit plus the log-prob under the starting policy.",
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
        "One change at a time from a first recipe, then combinations of the changes that helped.",
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
        "experts, no mask, no failure rule. Each stabiliser is added alone to this baseline and removed alone from the "
        "recipe. Collapse was defined before the runs. The first five arms have eight seeds, the others the first "
        "three of them. The two arms after the recipe were added after its results on these seeds were known: in the "
        "first, validation questions select among the starting policy and the checkpoints; the second has the options "
        "that the study of the objective selected here on other seeds: R1 penalty 1, learning rates 3e-4 and 5e-5, 32 "
        "demonstrations with 2 rollouts per update.",
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
        "SFT, tuned for each share, and the discriminator both get 10 to 100 % of the demonstrations. Rewards of each "
        "supervision granularity are frozen after the warm-up and rank samples; dense ones also train a policy, with "
        "the recipe and half of the world's steps, where validation questions select among the starting policy and the "
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
    "labels": Study(
        "Which rollouts are negatives, and which join the experts?",
        "World `terse`: a pretrained policy that is right in most of its samples, in another style than the experts'. "
        "Experts write the answer alone, which the policy hardly ever gets right without the working. The label rules "
        "use the answer that the demonstration of a prompt states, no gold answer: under `all` every rollout is a "
        "negative, under `disagreeing` only one whose answer differs; under `agreeing` those with the same answer join "
        "the experts. `mixed` uses gold answers and is the upper line. Here every rollout's answer can be read and "
        "every expert is right, so that the three rules with right rollouts among the positives give the same runs. "
        "All start from the pretrained policy, no failure rule stops them, and the policy after the last step is "
        "evaluated.",
        worlds=("terse",),
        seeds=range(40, 43),
        arms=(
            BASE,
            SFT,
            *(
                irl(
                    f"IRL, {positives}/{negatives}",
                    start="base",
                    positives=positives,
                    negatives=negatives,
                    on_failure="ignore",
                )
                for positives, negatives in (
                    ("expert", "all"),
                    ("expert", "disagreeing"),
                    ("agreeing", "disagreeing"),
                    ("agreeing", "all"),
                    ("mixed", "all"),
                )
            ),
        ),
    ),
    "corrupt": Study(
        "How much do wrong experts hurt?",
        "0, 10 or 25 % of the demonstrations end in a wrong answer, with mistakes of the pretraining corpus. SFT is "
        "tuned for each share, and validation questions select among the starting policy and the checkpoints in every "
        "arm.",
        worlds=("checked",),
        seeds=range(40, 43),
        arms=chosen(at(arm, f"{share}", corrupt=share / 100) for share in (0, 10, 25) for arm in (SFT, IRL)),
    ),
    "smollm2": Study(
        "A pretrained language model as policy",
        "SmolLM2-135M-Instruct on generated word problems: 400 demonstrations from eleven story templates, 3,000 "
        "prompts without traces; a quarter of the test questions use four templates that no other part has. SFT trains "
        "all weights for one epoch and is tuned over two learning rates on validation questions. GRPO trains LoRA "
        "adapters of rank 16 on the upper half of the layers, with 288 rollouts in 12 steps, and the policy after the "
        "last step is evaluated: one night on two CPU cores. The frozen reward only ranks; its policy takes one step "
        "at learning rate 0. The page shows whether such training is stable on a pretrained model and how well its "
        "reward ranks, not what long training would reach.",
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
        "World `hops`: a question chains 2 to 6 memorised facts, each applied to the result of the last. From a third "
        "of the numbers the pretrained policy mostly goes one too far, confidently, and continues from there. Each hop "
        "can go wrong, so their number is the difficulty. SFT is tuned over learning rates and numbers of steps on "
        "validation questions; the same questions select among the starting policy and four checkpoints of GRPO, which "
        "also has 3,000 prompts without traces. GRPO with the verifier uses gold answers and is the upper bound. The "
        "frozen reward is trained on rollouts sampled once. As in `misconception` only the wrong value reveals a "
        "mistake; the options are those that the study of the objective selected there (R1 penalty 1, learning rate "
        "3e-4), with one perturbed copy of each expert. An earlier version of `hops`, with the facts in the prompt, "
        "was abandoned: in most seeds a model of this size never learned to look them up.",
        worlds=("hops",),
        seeds=range(50, 55),
        recipe=STEADY,
        arms=(
            *chosen((BASE, SFT, LOGPROB, VERIFIER, IRL)),
            irl("frozen after warm-up", discriminator_updates=0, max_steps=4),
        ),
    ),
    "decoding": Study(
        "Does guided decoding beat best-of-N at equal tokens?",
        "The policy is SFT's; the reward model guides it or selects among its samples. Beam: several next steps of "
        "each partial trace are sampled, and those of highest reward are kept. Reject: the better half of the partial "
        "traces continues, until one is left. Tilt: each token is sampled from p exp(alpha r) over the top-k tokens, "
        "then the best of N such traces is selected; top-k is the same without the reward in sampling. All sampled "
        "tokens count, including dropped traces and lookahead.",
        worlds=("checked",),
        seeds=range(40, 45),
        arms=(Arm(name="frozen after warm-up", kind="decoding", options=FROZEN),),
        samples=32,
    ),
    "self-correction": Study(
        "Does resampling from the first suspected step fix more than it breaks?",
        "A sample of the SFT policy is cut before the first step whose mean token score is under a threshold, and k "
        "continuations are sampled. The judge's best one replaces the original if the judge prefers it. This repeats "
        "for up to r rounds.",
        worlds=("checked",),
        seeds=range(40, 45),
        arms=(Arm(name="frozen after warm-up", kind="self-correction", options=FROZEN),),
        samples=16,
    ),
    "reranking": Study(
        "Reranking 16 samples with a discriminator frozen after its warm-up",
        "The paper's second experiment: the SFT policy is not trained further; the discriminator is trained on "
        "rollouts sampled once and ranks 16 samples of the policy.",
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
        "The frozen reward of the reranking study, learned with the same options by backbones of about the same size, "
        "on samples of each backbone's own SFT policy. The predicted probability that a trace is right is the sigmoid "
        "of its reward. Each reward model is evaluated as trained, and after tuning its head or all its weights on the "
        "labelled first samples of a third of the validation questions. Platt scaling and a linear probe of the "
        "trace's mean last hidden state are fitted on all samples of the other validation questions.",
        worlds=("checked",),
        seeds=range(40, 43),
        arms=_of_backbones(COMPARED, "calibration", FROZEN),
        pretrained=_of_backbones(PRETRAINED, "calibration", FROZEN),
    ),
    "transfer": Study(
        "Does a reward transfer to other backbones?",
        "The frozen reward of each backbone of the calibration study ranks samples of each backbone's SFT policy. "
        "Between two tokenizers a token's reward goes to the policy's token with its last character. Then the reward "
        "is adapted to the other policy: 20 more updates of the discriminator's head alone, on the first 5 to 50 "
        "demonstrations and rollouts of the other pretrained model on their prompts. Finally, adversarial training "
        "with a discriminator of a seventh of the policy's parameters, pretrained in the same way, is compared to "
        "training with the usual one.",
        worlds=("checked",),
        seeds=range(40, 43),
        arms=(
            *chosen((SFT, IRL, irl("IRL, smaller discriminator", discriminator_model="small/base"))),
            *_rewards_of(COMPARED),
        ),
        pretrained=_rewards_of(PRETRAINED),
    ),
}
