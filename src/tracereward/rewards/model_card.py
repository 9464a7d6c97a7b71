"""The model card of a reward model."""

from tracereward.modeling.hub import card_metadata
from tracereward.rewards.heads import reads_log_probs, subtracts_policy
from tracereward.rewards.settings import RewardSettings


def model_card(settings: RewardSettings, notes: str) -> str:
    """The README of the artefact: what the rewards mean and how to load the model."""
    kind = "AutoModelForCausalLM" if reads_log_probs(settings.head) else "AutoModelForTokenClassification"
    kind += " plus head.safetensors" if settings.head == "action" else ""
    read = ", ".join(map(str, settings.layers))
    kind += f", a label for each of the layers {read}" if read else ""
    meaning = (
        "a reward f: the log-odds of expert versus policy, with the policy's log-prob taken out"
        if subtracts_policy(settings.head)
        else "the log-odds that it is of a trace with an expert's answer rather than of another one"
        if (settings.label_rule or "").startswith("agreeing")
        else "the log-odds that it was written by the expert rather than the policy"
    )
    form = {
        "logit": "the log-odds",
        "logit_plus_logprob": f"the log-odds plus the log-prob under `{settings.reference_model or 'the reference'}`",
        "f": "f",
    }[settings.form]
    gold = "\n- **uses gold answers**: training used rollouts with a verified answer as expert traces"
    gold = gold if settings.uses_gold_answers else ""
    rule = f"\n- label rule (positives/negatives): `{settings.label_rule}`" if settings.label_rule else ""
    metadata = card_metadata(
        settings.base_model, library_name="tracereward", tags=["reward-model", "tracereward", f"{settings.head}-head"]
    )
    return f"""---
{metadata}
---

# Token-level reward model

Learned from expert traces, compared with traces of a policy or of other models (after arXiv 2510.01857). Each
completion token has {meaning}. A high reward is expert-like.

- head: `{settings.head}` ({kind}); supervision: `{settings.granularity}`; rewards divided by {settings.temperature:g}
  and clipped to +-{settings.beta_clip:g}
- training rewarded {form}
- task: `{settings.task}`, template: `{settings.template}`
- trace reward: `{settings.aggregate}` of its token rewards{gold}{rule}

```python
from tracereward import TokenRewardModel

scores = TokenRewardModel.from_pretrained("reward_model").score(prompts, completions)
```

{_in_a_pipeline(settings)}
{notes}"""


def _in_a_pipeline(settings: RewardSettings) -> str:
    """What a token-classification pipeline makes of the checkpoint."""
    if settings.layers:
        return (
            "The reward is the sum over layers of the logit of the layer's label on the layer's own states, after the "
            "final norm. A\n`token-classification` pipeline would compute all labels on the last layer's states: other "
            "numbers."
        )
    return (
        "The reward is the logit; a `token-classification` pipeline would apply a softmax over the single label and "
        "return 1.0."
    )
