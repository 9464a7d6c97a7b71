"""`tracereward export`: distil a reward model into a token-classification checkpoint."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tracereward.commands.partial_output import check_new, check_writable
from tracereward.console import print_json, say
from tracereward.data.trace_rows import candidate_rows
from tracereward.errors import InputError
from tracereward.files import without_nan
from tracereward.modeling.loading import local_folder
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.reports.verdicts import read_verdict, write_verdict
from tracereward.rewards.distillation import Fit, check_rows, distill, examples_of
from tracereward.rewards.engines import load_reward_model
from tracereward.rewards.settings import SETTINGS_FILE, check_reward_model


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `tracereward export`.

    Attributes:
        model: folder or Hub id of the reward model.
        data: rows to fit on.
        output: folder of the new reward model.
        overwrite: replace a reward model in that folder.
        epochs: passes over the rows.
        learning_rate: learning rate of AdamW.
        token_budget: padded tokens per step.
        seed: seed of the split, the order and the new head.
    """

    model: str
    data: str
    output: Path
    epochs: int = 3
    learning_rate: float = 1e-4
    token_budget: int = 8192
    seed: int = 0
    overwrite: bool = False


def run_export(options: ExportOptions) -> None:
    """`tracereward export`: write the distilled reward model, and print its fit as JSON on stdout.

    Raises:
        InputError: an option or a row is invalid, or the output exists.
        RunFailed: the loss, or a reward, is not finite.
    """
    if not 0 < options.learning_rate <= 1:  # also rejects NaN
        raise InputError(f"--learning-rate must be above 0 and at most 1, not {options.learning_rate}")
    settings = check_reward_model(options.model)
    output = options.output
    check_folder(output, [options.model, options.data], overwrite=options.overwrite)
    rows = list(candidate_rows(options.data, template=settings.template, tokenizer=load_tokenizer(options.model)))
    check_rows(rows)
    teacher = load_reward_model(options.model)
    student, fit = distill(
        teacher,
        local_folder(options.model),
        examples_of(rows, teacher),
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        token_budget=options.token_budget,
        seed=options.seed,
    )
    note = _note(settings.head, fit)
    student.save_pretrained(output, note)
    if (
        settings.head == "token" and settings.is_classifier and not settings.adds_reference
    ):  # the same rewards; a distilled model has others
        write_verdict(output, read_verdict(local_folder(options.model)))
    say(note.strip())
    numbers = without_nan(asdict(fit))
    print_json({"output": str(output), **numbers})


def check_folder(output: Path, inputs: Sequence[str], *, overwrite: bool) -> None:
    """Check that a reward model can be written, before anything slow starts; creates the parent folder.

    Raises:
        InputError: it cannot; or the folder exists and may not be replaced, or has something else.
    """
    check_new(output, inputs, overwrite=overwrite)
    if output.exists() and not (output / SETTINGS_FILE).is_file():
        raise InputError(f"{output}: is not a reward model and is not replaced: choose another --output")
    with suppress(OSError):  # check_writable reports it
        output.parent.mkdir(parents=True, exist_ok=True)
    check_writable(output)


def _note(head: str, fit: Fit) -> str:
    """The model card's paragraph on the fit."""
    return (
        f"\nDistilled from a reward model with head `{head}` on {fit.traces} traces: R2 {fit.r2:.3f} "
        f"on {fit.held_out} traces of held-out prompts; within-prompt AUROC {fit.auroc_before:.3f} before, "
        f"{fit.auroc_after:.3f} after.\n"
    )
