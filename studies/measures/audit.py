"""How many planted errors are among the most suspicious demonstrations, in each order."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from studies.setup.planted import PlantedPool
from tracereward.data.demonstration_checks import ERRORS, check_rows
from tracereward.metrics import auroc
from tracereward.training.audit_orders import ORDERS, suspicion
from tracereward.training.step_scores import StepOptions, score_steps, stepped_traces

RATES = (0.05, 0.1)
"""Shares of the demonstrations that are made wrong."""
CHECKED = "checks first"
"""Suffix of an order in which what the checks of the text find comes first."""


def measured(pool: PlantedPool, states: Path, *, seed: int, rate: float) -> dict[str, Any]:
    """Precision at the number of planted errors, AUROC and errors found by kind, for each order.

    Args:
        pool: the demonstrations.
        states: folder of the frozen model's states.
        seed: of the choice of the demonstrations that are wrong; wrong copies and folds are the same for all.
        rate: their share.
    """
    rows, planted = pool.planted(seed, rate)
    traces = stepped_traces(rows, pool.tokenizer, pool.rule)
    options = StepOptions(model=pool.model, cache=states, dtype=torch.bfloat16, rule=pool.rule)
    scores = score_steps(traces, rows, pool.task, pool.tokenizer, options=options)
    found = check_rows(rows, pool.task)
    flagged = np.array([any(finding.kind in ERRORS for finding in findings) for findings in found])
    kinds = [kind if is_planted else None for kind, is_planted in zip(pool.kinds, planted, strict=True)]
    values = {order: suspicion(order, scores) for order in ORDERS}
    orders = {order: of_order - 0.0 for order, of_order in values.items()}
    orders |= {f"{order}, {CHECKED}": of_order - 1e6 * flagged for order, of_order in values.items()}
    return {
        "planted": sum(planted),
        "changed_steps": scores.changed,
        "steps": int(sum(map(len, scores.rewards))),
        "layers": list(scores.readout.layers),
        "cross_validated_auroc": round(scores.readout.chosen.auroc, 4),
        "flagged": int(flagged.sum()),
        "flagged_planted": int((flagged & np.array(planted)).sum()),
        "orders": {order: of_order(values, planted, kinds) for order, values in orders.items()},
    }


def of_order(values: np.ndarray, planted: Sequence[bool], kinds: Sequence[str | None]) -> dict[str, Any]:
    """What the lowest values find: ``precision`` at the planted number, ``auroc``, and ``kinds``: [found, planted].

    Args:
        values: (N,) the lower, the more suspicious; of equal ones the first counts as lower.
        planted: N, whether it is wrong.
        kinds: N, of the errors.
    """
    count = sum(planted)
    first = np.argsort(values, kind="stable")[:count].tolist()
    names = sorted({kind for kind in kinds if kind is not None})
    return {
        "precision": round(float(np.mean([planted[i] for i in first])), 4),
        "auroc": round(auroc((-values).tolist(), list(planted)), 4),
        "kinds": {name: [sum(kinds[i] == name for i in first), list(kinds).count(name)] for name in names},
    }
