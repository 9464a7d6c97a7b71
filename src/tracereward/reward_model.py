"""The reward model: a causal backbone with one number f_t per completion token, its artefact on disk, and scoring.

`heads` says what f_t is. On disk a reward model is a plain Hugging Face checkpoint: a token classifier with
``num_labels=1`` whose logit is f_t (heads ``token`` and ``airl``), or a causal LM, whose log-prob is f_t (``implicit``)
or enters it with the a, b and w of ``head.safetensors`` (``action``). Beside it lies ``tracereward.json``: everything
that must be the same in training, scoring and serving.
"""

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from tracereward import __version__
from tracereward.alignment import join_steps, step_ends, token_offsets
from tracereward.batching import Batch, completion_log_probs, pack, scoring_budget
from tracereward.demonstrations import encode_completion, encode_prompt
from tracereward.errors import InputError
from tracereward.files import atomic_folder, atomic_write_json
from tracereward.heads import ActionHead, reads_log_probs
from tracereward.masks import supervision_mask
from tracereward.models import load_tokenizer, local_folder, pad_id
from tracereward.rerank import Candidate, choose
from tracereward.reward_settings import HEAD_FILE, SETTINGS_FILE, RewardSettings, model_card, read_settings
from tracereward.scores import TokenScores
from tracereward.shaping import token_rewards
from tracereward.shared_prompts import grouped_batches, shared_log_probs, shared_prompt_forward
from tracereward.tasks import get_task


class TokenRewardModel(nn.Module):
    """A backbone with a head: `forward` gives f_t, `score` gives `TokenScores`."""

    def __init__(
        self,
        backbone: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: RewardSettings,
    ):
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.settings = settings
        hidden_size = backbone.config.get_text_config().hidden_size
        self.head = ActionHead(hidden_size) if settings.head == "action" else None

    @classmethod
    def from_backbone(
        cls,
        model_name_or_path: str,
        settings: RewardSettings,
        tokenizer: PreTrainedTokenizerBase,
        peft_config: LoraConfig | None = None,
        **kwargs: Any,
    ) -> "TokenRewardModel":
        """A discriminator to be trained, started from the causal LM `model_name_or_path`.

        Args:
            model_name_or_path: folder or Hub id of a causal LM, usually the SFT policy.
            settings: head, granularity and shaping.
            tokenizer: the backbone's, which must be the policy's too.
            peft_config: LoRA settings; None trains all weights.
            **kwargs: for `from_pretrained`, e.g. ``dtype``.
        """
        if reads_log_probs(settings.head):
            backbone = AutoModelForCausalLM.from_pretrained(model_name_or_path, **kwargs)
        else:
            backbone = _token_classifier(model_name_or_path, **kwargs)
        backbone.config.pad_token_id = tokenizer.pad_token_id
        if peft_config is not None:
            peft_config = copy.deepcopy(peft_config)
            if not reads_log_probs(settings.head):
                peft_config.task_type = "TOKEN_CLS"
                peft_config.exclude_modules = [
                    "score",
                    "classifier",
                ]  # trained in full; "all-linear" would wrap it too and crash
            backbone = get_peft_model(backbone, peft_config)
        return cls(backbone, tokenizer, settings)

    @classmethod
    def from_pretrained(cls, model_name_or_path: str, **kwargs: Any) -> "TokenRewardModel":
        """Load a finished reward model from a folder or the Hub.

        Raises:
            InputError: it is not a reward model; says which file is missing.
        """
        folder = local_folder(model_name_or_path)
        settings = read_settings(folder)
        tokenizer = load_tokenizer(str(folder))
        auto = AutoModelForCausalLM if reads_log_probs(settings.head) else AutoModelForTokenClassification
        model = cls(auto.from_pretrained(folder, **kwargs), tokenizer, settings)
        if model.head is not None:
            model.head.load_state_dict(load_file(folder / HEAD_FILE))
        return model.eval()

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return next(self.backbone.parameters()).device

    @property
    def head_weight(self) -> Tensor | None:
        """w, the head's weights on the hidden state; None for ``implicit``, which has none."""
        if self.head is not None:
            return self.head.w
        if reads_log_probs(self.settings.head):
            return None
        named = self.backbone.named_parameters()
        found = [p for name, p in named if re.search(r"\b(score|classifier)\b.*weight$", name)]
        return max(found, key=lambda p: p.requires_grad)  # PEFT keeps the untrained one beside the trained one

    def forward(self, batch: Batch) -> Tensor:
        """f_t of each completion token, (B, T) float32."""
        return self.values_and_log_probs(batch)[0]

    def values_and_log_probs(self, batch: Batch, inputs_embeds: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """f_t, and log p_phi(y_t) where the head reads it; each (B, T) float32.

        Args:
            batch: what the backbone reads.
            inputs_embeds: (B, P + T, H) in the place of the embeddings of `batch.input_ids`.
        """
        if reads_log_probs(self.settings.head):
            log_probs, hidden = completion_log_probs(self.backbone, batch, inputs_embeds)
            return (log_probs if self.head is None else self.head(log_probs, hidden)), log_probs
        output = self.backbone(
            input_ids=batch.input_ids if inputs_embeds is None else None,
            inputs_embeds=inputs_embeds,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        )
        return output.logits[:, -batch.completion_mask.size(1) :, 0].float(), None

    def pack(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Batch:
        """Token ids to a `Batch` on this model's device, with step ends where the granularity needs them."""
        ends = [self.step_ends(ids) for ids in completions] if self.settings.granularity == "step" else None
        return pack(prompts, completions, pad_id(self.tokenizer), ends).to(self.device)

    def step_ends(self, completion: Sequence[int]) -> list[bool]:
        """Which tokens of a completion end a step."""
        text, offsets = token_offsets(self.tokenizer, completion)
        return step_ends(text, offsets, self.settings.step_delimiter)

    def supervision(self, batch: Batch) -> Tensor:
        """The supervision mask of a batch, (B, T) bool."""
        return supervision_mask(
            batch.completion_mask, batch.step_ends, self.settings.granularity, self.settings.interval
        )

    @torch.no_grad()
    def token_rewards(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        token_budget: int | None = None,
        reference: nn.Module | None = None,
        policy: nn.Module | None = None,
    ) -> list[Tensor]:
        """Clipped, backfilled rewards of token-id pairs: one float32 tensor of len(completion) each, on the CPU.

        Args:
            prompts: token ids.
            completions: token ids of as many traces.
            token_budget: padded tokens per forward pass; as many as suit the device if None.
            reference: causal LM whose log-prob of each token is added to f (``logit_plus_logprob``).
            policy: causal LM whose log-prob is taken off (the logit of the heads ``airl`` and ``implicit``).
        """
        token_budget = token_budget or scoring_budget(self.device)
        was_training = self.training
        self.eval()
        rewards: list[Tensor] = [torch.empty(0)] * len(completions)
        shares = reference is None and policy is None
        for indices, sizes in grouped_batches(self.backbone, prompts, completions, token_budget, shares):
            batch = self.pack([prompts[i] for i in indices], [completions[i] for i in indices])
            if len(sizes) < len(indices):
                values = self._values_of_shared(batch, sizes)
            else:
                values = self(batch)
            if reference is not None:
                values = values + completion_log_probs(reference, batch)[0]
            if policy is not None:
                values = values - completion_log_probs(policy, batch)[0]
            shaped = token_rewards(
                values, self.supervision(batch), self.settings.beta_clip, self.settings.temperature
            ).cpu()
            for row, index in enumerate(indices):
                rewards[index] = shaped[row, : len(completions[index])]
        self.train(was_training)
        return rewards

    def _values_of_shared(self, batch: Batch, sizes: Sequence[int]) -> Tensor:
        """`forward` where runs of `sizes` rows have the same prompt, which is then read once."""
        outputs = shared_prompt_forward(self.backbone, batch, sizes)
        if not reads_log_probs(self.settings.head):
            return outputs.logits[..., 0].float()
        log_probs = shared_log_probs(outputs, batch)
        return log_probs if self.head is None else self.head(log_probs, outputs.hidden)

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        finished: Sequence[bool] | None = None,
        token_budget: int | None = None,
        reference: nn.Module | None = None,
        policy: nn.Module | None = None,
    ) -> list[TokenScores]:
        """Score completions given as text, in one forward pass each.

        Args:
            prompts: rendered prompts (with the recipe's words and template), as in training.
            completions: as many traces.
            finished: whether each trace ended by itself (then the end-of-sequence token is scored too, as in
                training) or was cut off; all ended if None.
            token_budget: padded tokens per forward pass; as many as suit the device if None.
            reference: the model that ``settings.reference_model`` names, to get what training rewarded under
                ``logit_plus_logprob``; without it the rewards are the logits alone.
            policy: the policy, to get the logit of the heads ``airl`` and ``implicit``; without it the rewards are f.

        Raises:
            InputError: a trace is empty, or longer than the backbone's positions; nothing is ever truncated.
        """
        finished = [True] * len(completions) if finished is None else finished
        prompt_ids, completion_ids = [], []
        for index, texts in enumerate(zip(prompts, completions, finished, strict=True)):
            prompt, completion = self.check_length(f"row {index}", *texts)
            prompt_ids.append(prompt)
            completion_ids.append(completion)
        return self.score_ids(prompt_ids, completion_ids, token_budget, reference, policy)

    def score_ids(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *args: Any, **kwargs: Any
    ) -> list[TokenScores]:
        """The same of token ids, see `token_rewards`."""
        rewards = self.token_rewards(prompts, completions, *args, **kwargs)
        return [self.to_scores(ids, values) for ids, values in zip(completions, rewards, strict=True)]

    def rerank(
        self, prompt: str, candidates: Sequence[str], method: str = "reward", log_probs: Sequence[float] | None = None
    ) -> list[tuple[int, float]]:
        """Candidates of one question from best to worst: pairs of index and trace reward.

        Args:
            prompt: rendered, as in training.
            candidates: traces.
            method: one of `rerank.METHODS` that chooses; what it chooses comes first, the others follow by reward.
                Votes compare the answers that the recipe of ``settings.task`` extracts.
            log_probs: mean policy log-probs, for the methods with one.
        """
        task, how = get_task(self.settings.task), self.settings.aggregate
        rewards = [scores.aggregate(how) for scores in self.score([prompt] * len(candidates), candidates)]
        known = [None] * len(candidates) if log_probs is None else log_probs
        rows = [
            Candidate(text, task.extract(text), reward, log_prob, len(text))
            for text, reward, log_prob in zip(candidates, rewards, known, strict=True)
        ]
        first = choose(rows, method, task.equal)
        order = sorted(range(len(rows)), key=lambda index: (index != first, -rewards[index]))
        return [(index, rewards[index]) for index in order]

    def first_error(self, prompt: str, steps: Sequence[str], threshold: float = 0.0) -> int | None:
        """Index of the first step whose mean reward is under `threshold`; None if there is none.

        Args:
            prompt: rendered, as in training.
            steps: of one trace, without delimiters.
            threshold: in log-odds; `tracereward evaluate processbench` fits one on labelled traces.
        """
        rewards = self.score_steps([prompt], [steps])[0]
        return next((index for index, reward in enumerate(rewards) if reward < threshold), None)

    def score_steps(self, prompts: Sequence[str], traces: Sequence[Sequence[str]]) -> list[list[float]]:
        """Mean token reward of each step of traces that are given step by step.

        Steps are joined by ``settings.step_delimiter`` (`alignment.join_steps`). Characters decide which tokens are a
        step's, so that a step may itself contain the delimiter.
        """
        joined = [join_steps(steps, self.settings.step_delimiter) for steps in traces]
        scores = self.score(prompts, [text for text, _ in joined])
        return [trace.span_rewards(spans) for trace, (_, spans) in zip(scores, joined, strict=True)]

    def to_scores(self, completion: Sequence[int], rewards: Tensor) -> TokenScores:
        """Token ids and their rewards as a `TokenScores`."""
        text, offsets = token_offsets(self.tokenizer, completion)
        ends = step_ends(text, offsets, self.settings.step_delimiter)
        mask = torch.ones(1, len(completion), dtype=torch.long)
        supervised = supervision_mask(mask, torch.tensor([ends]), self.settings.granularity, self.settings.interval)
        tokens = [text[start:end] for start, end in offsets]
        if completion and completion[-1] == self.tokenizer.eos_token_id:
            tokens[-1] = str(self.tokenizer.eos_token)
        return TokenScores(tokens, offsets, rewards.tolist(), supervised[0].tolist(), ends)

    def check_length(self, where: str, prompt: str, completion: str, finished: bool) -> tuple[list[int], list[int]]:
        """Token ids of a rendered prompt and a trace that this model can read.

        Raises:
            InputError: the trace is empty, or longer than the backbone's positions; names `where`.
        """
        limit = getattr(self.backbone.config.get_text_config(), "max_position_embeddings", None) or math.inf
        prompt_ids, ids = encode_prompt(self.tokenizer, prompt), encode_completion(self.tokenizer, completion)
        ids = ids if finished else ids[:-1]
        if not ids:
            raise InputError(f"{where}: the completion is empty")
        if len(prompt_ids) + len(ids) > limit:
            raise InputError(
                f"{where}: {len(prompt_ids)} prompt and {len(ids)} completion tokens, the reward model reads "
                f"{limit:.0f}. Traces are never cut (the answer would be lost): leave the row out or use a longer "
                "backbone."
            )
        return prompt_ids, ids

    def save_pretrained(self, folder: str | Path, notes: str = "") -> None:
        """Write the artefact (see the module's docstring), LoRA merged, whole or not at all.

        The live weights are not touched: merging in place and undoing it would change them by rounding.
        """
        backbone = self.backbone
        if isinstance(backbone, PeftModel):
            backbone = copy.deepcopy(backbone).merge_and_unload()
        with atomic_folder(folder) as target:
            backbone.save_pretrained(target)
            self.tokenizer.save_pretrained(target)
            if self.head is not None:
                save_file({k: v.contiguous() for k, v in self.head.state_dict().items()}, target / HEAD_FILE)
            atomic_write_json(target / SETTINGS_FILE, {"tracereward_version": __version__, **asdict(self.settings)})
            (target / "README.md").write_text(model_card(self.settings, notes), encoding="utf-8")


RewardModel = TokenRewardModel


def _token_classifier(name: str, **kwargs: Any) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(name)
    config.num_labels = 1
    config.classifier_dropout = 0.0  # the default of 0.1 would make rewards random in training
    config.token_classification_bias = False
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would warn that the new head is untrained, which is the point
    try:
        return AutoModelForTokenClassification.from_pretrained(name, config=config, **kwargs)
    except ValueError as error:
        raise InputError(
            f"{name}: transformers has no token-classification class for this architecture; use --head action"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
