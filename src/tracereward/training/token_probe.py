"""The probe for surface leaks on token ids: texts that are equal may differ as tokens."""

from collections.abc import Sequence
from typing import Any

from tracereward.data.surface_probe import Probe, TraceText, surface_probe
from tracereward.training.discriminator_batch import Expert, Rollout


def token_probe(
    experts: Sequence[Expert], rollouts: Sequence[Rollout], tokenizer: Any, *, every_expert: bool = False
) -> Probe:
    """Probe whether surface features, or single tokens, alone distinguish the positives from the negatives.

    Args:
        experts: the demonstrations.
        rollouts: further traces of their prompts; those without a label are ignored.
        tokenizer: the reward model's.
        every_expert: compare also with demonstrations whose prompts have no rollouts, where few prompts have some.
    """
    rollouts = [rollout for rollout in rollouts if rollout.label is not None]
    texts = tokenizer.batch_decode([rollout.ids for rollout in rollouts], skip_special_tokens=True)
    names = tokenizer.convert_ids_to_tokens

    def trace(index: int, text: str, ids: list[int]) -> TraceText:
        return TraceText(str(index), text, ids[-1:] == [tokenizer.eos_token_id], names(ids))

    used = range(len(experts)) if every_expert else sorted({rollout.demonstration for rollout in rollouts})
    sides: dict[bool, list[TraceText]] = {True: [], False: []}
    sides[True] += [trace(i, experts[i].text, experts[i].completion) for i in used if experts[i].completion]
    for rollout, text in zip(rollouts, texts, strict=True):
        sides[bool(rollout.label)].append(trace(rollout.demonstration, text, rollout.ids))
    return surface_probe(sides[True], sides[False], names(list(tokenizer.added_tokens_decoder)))
