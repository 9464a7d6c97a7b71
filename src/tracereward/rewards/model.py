"""The reward model: a causal backbone with one number f_t per completion token, its artefact on disk, and scoring.

`heads` defines f_t. On disk a reward model is a plain Hugging Face checkpoint: a token classifier with
``num_labels=1`` whose logit is f_t (heads ``token`` and ``airl``), one with a label for each layer that a head
``token`` reads, or a causal LM whose log-prob is f_t (``implicit``) or enters it with the a, b and w of
``head.safetensors`` (``action``). ``tracereward.json`` in the same folder has the
settings that training, scoring and serving must share.
"""

import contextlib
import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracereward import __version__
from tracereward.console import warn_once
from tracereward.errors import InputError, check_list
from tracereward.files import atomic_folder, atomic_write_json
from tracereward.modeling.adapters import DISCRIMINATOR, AdapterView, merged
from tracereward.modeling.batching import Batch, grouped_batches, scoring_budget
from tracereward.modeling.distributed import all_reduce_max, zero3_disabled
from tracereward.modeling.hidden_states import truncated
from tracereward.modeling.loading import (
    NEW_HEAD,
    called,
    context_length,
    exact_head,
    load_causal_lm,
    load_model,
    local_folder,
    new_classifier,
)
from tracereward.modeling.log_probs import (
    can_share_prompts,
    completion_log_probs,
    shared_classifier_logits,
    shared_log_probs,
)
from tracereward.modeling.precision import scoring_precision
from tracereward.modeling.quantized import is_quantized, prepare_for_lora
from tracereward.modeling.rendering import Rendering, is_rendered, render
from tracereward.modeling.tokenization import keep_tags, load_tokenizer, same_vocabulary, without_tags
from tracereward.rewards.heads import ActionHead, LinearHead, exact_classifier, reads_log_probs
from tracereward.rewards.model_card import model_card
from tracereward.rewards.records import ForwardOptions, TokenIds, Trace
from tracereward.rewards.scorer import Scorer
from tracereward.rewards.settings import (
    HEAD_FILE,
    SETTINGS_FILE,
    RewardSettings,
    backbone_class,
    load_head,
    read_settings,
)
from tracereward.rewards.shaping import token_rewards


class TokenRewardModel(nn.Module, Scorer):
    """A backbone with a head: `forward` returns f_t, `score` returns `TokenScores`."""

    def __init__(
        self,
        backbone: PreTrainedModel | PeftModel | AdapterView,
        tokenizer: PreTrainedTokenizerBase,
        settings: RewardSettings,
    ):
        super().__init__()
        if not isinstance(settings, RewardSettings):
            raise InputError(f"settings must be RewardSettings, not {type(settings).__name__}")
        keep_tags(tokenizer)
        self.backbone: PreTrainedModel | PeftModel | AdapterView = backbone
        self.tokenizer = tokenizer
        self.settings = settings
        hidden_size = backbone.config.get_text_config().hidden_size
        self.head: ActionHead | None = ActionHead(hidden_size) if settings.head == "action" else None

    @classmethod
    def from_backbone(
        cls,
        model_name_or_path: str,
        settings: RewardSettings,
        tokenizer: PreTrainedTokenizerBase,
        peft_config: LoraConfig | None = None,
        **kwargs: Any,
    ) -> "TokenRewardModel":
        """Create a discriminator from the causal LM `model_name_or_path`.

        Args:
            model_name_or_path: folder or Hub id of a causal LM, usually the SFT policy.
            settings: head, granularity and shaping.
            tokenizer: the backbone's, which must also be the policy's.
            peft_config: LoRA settings; None trains all weights.
            **kwargs: for `from_pretrained`, e.g. ``dtype``, or with LoRA ``quantization_config``.

        Raises:
            InputError: quantized weights without LoRA.
        """
        with zero3_disabled():  # the policy may be sharded, the discriminator is not
            if reads_log_probs(settings.head):
                backbone = load_causal_lm(model_name_or_path, **kwargs)
            else:
                backbone = new_classifier(model_name_or_path, **kwargs)
        backbone.config.pad_token_id = tokenizer.pad_token_id
        if is_quantized(backbone):
            if peft_config is None:
                raise InputError("quantized weights cannot be trained: pass LoRA settings as peft_config")
            prepare_for_lora(backbone)
        model = cls(backbone, tokenizer, settings)
        if peft_config is not None:
            model.add_lora(peft_config)
        return model

    @classmethod
    def from_readout(
        cls,
        model_name_or_path: str,
        head: LinearHead,
        settings: RewardSettings,
        tokenizer: PreTrainedTokenizerBase,
        **kwargs: Any,
    ) -> "TokenRewardModel":
        """A reward model with head ``token`` whose backbone is the causal LM up to the last layer that the head reads.

        Args:
            model_name_or_path: folder or Hub id of the causal LM.
            head: a linear map of the normalised states of layers.
            settings: with head ``token``; several layers are added.
            tokenizer: the causal LM's.
            **kwargs: for `from_pretrained`, e.g. ``dtype``.
        """
        count = len(head.layers)
        backbone = truncated(new_classifier(model_name_or_path, bias=True, labels=count, **kwargs), head.layers[-1])
        backbone.config.pad_token_id = tokenizer.pad_token_id
        model = cls(
            exact_head(backbone, model_name_or_path),
            tokenizer,
            replace(settings, layers=head.layers if count > 1 else ()),
        )
        linear = next(m for name, m in backbone.named_modules() if name.rpartition(".")[2] in NEW_HEAD)
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            linear.weight.copy_(torch.as_tensor(head.weight))
            linear.bias.zero_()
            linear.bias[-1] = head.bias
        return model.eval()

    @classmethod
    def beside_policy(
        cls, policy: PeftModel, settings: RewardSettings, tokenizer: PreTrainedTokenizerBase, peft_config: LoraConfig
    ) -> "TokenRewardModel":
        """Create a discriminator that shares the policy's base model: a second adapter and a head.

        Args:
            policy: its LoRA adapter stays the active one.
            settings: with head ``action`` or ``implicit``, since the base is a language model.
            tokenizer: the policy's.
            peft_config: LoRA settings of the second adapter.
        """
        policy.add_adapter(DISCRIMINATOR, copy.deepcopy(peft_config))
        return cls(AdapterView(policy, DISCRIMINATOR), tokenizer, settings)

    @classmethod
    def from_pretrained(
        cls, model_name_or_path: str | Path, *, revision: str | None = None, **kwargs: Any
    ) -> "TokenRewardModel":
        """Load a finished reward model from a folder or the Hub.

        Args:
            model_name_or_path: folder, or ``owner/name`` or ``owner/name@revision`` on the Hub; a folder comes first.
            revision: branch, tag or commit of a Hub model.
            **kwargs: for `from_pretrained` of transformers, e.g. ``dtype``, by default that of `scoring_precision`.

        Raises:
            InputError: it is not a reward model, a file or weights of it are missing or damaged, or it cannot be
                downloaded.
        """
        folder = local_folder(model_name_or_path, revision)
        with called(model_name_or_path, folder):
            settings = read_settings(folder)
            tokenizer = load_tokenizer(str(folder))
            kwargs = {"dtype": scoring_precision(folder, settings.dtype).dtype, **kwargs}
            backbone = load_model(backbone_class(settings), folder, **kwargs)
            model = cls(exact_head(backbone, folder), tokenizer, settings)
            if model.head is not None:
                load_head(model.head, folder)
        return model.eval()

    def add_lora(self, peft_config: LoraConfig) -> None:
        """Put LoRA adapters on a backbone without any; it and the adapters' settings are otherwise left as they are."""
        assert not isinstance(self.backbone, PeftModel | AdapterView)
        peft_config = copy.deepcopy(peft_config)
        if not reads_log_probs(self.settings.head):
            peft_config.task_type = "TOKEN_CLS"
            # The head is trained in full; "all-linear" would wrap it too and crash.
            peft_config.exclude_modules = list(NEW_HEAD)
        self.backbone = get_peft_model(self.backbone, peft_config)

    @property
    def shares_base(self) -> bool:
        """Whether the backbone is an adapter on the policy's base model."""
        return isinstance(self.backbone, AdapterView)

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Context that keeps this model's adapter active on a shared base model, for passes with gradients."""
        return self.backbone.active() if isinstance(self.backbone, AdapterView) else contextlib.nullcontext()

    @property
    def device(self) -> torch.device:
        """Device of the backbone."""
        return next(self.backbone.parameters()).device

    @property
    def max_positions(self) -> float:
        """Longest prompt plus completion that the backbone accepts, in tokens."""
        return context_length(self.backbone.config)

    @property
    def token_budget(self) -> int:
        """Padded tokens per forward pass on this device."""
        return scoring_budget(self.device)

    @property
    def head_weight(self) -> Tensor | None:
        """w, the head's weights on the hidden state, or (L, H) on those of L layers; None for ``implicit``."""
        if self.head is not None:
            return self.head.w
        if reads_log_probs(self.settings.head):
            return None
        named = self.backbone.named_parameters()
        found = [p for name, p in named if re.search(r"\b(score|classifier)\b.*weight$", name)]
        return max(found, key=lambda p: p.requires_grad)  # PEFT also keeps the untrained copy

    def forward(self, batch: Batch, shared: Sequence[int] | None = None) -> Tensor:
        """f_t of each completion token, (B, T) float32.

        Args:
            batch: inputs of the backbone.
            shared: lengths of runs of rows with the same prompt, which is then encoded once; only without gradients.
        """
        if shared is None:
            return self.values_and_log_probs(batch)[0]
        if not reads_log_probs(self.settings.head):
            with self._exact_classifier():
                return shared_classifier_logits(self.backbone, batch, shared)[..., 0].float()
        log_probs, hidden = shared_log_probs(self.backbone, batch, shared)
        return log_probs if self.head is None else self.head(log_probs, hidden)

    def values_and_log_probs(self, batch: Batch, inputs_embeds: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """f_t, and log p_phi(y_t) where the head reads it; each (B, T) float32.

        Args:
            batch: inputs of the backbone.
            inputs_embeds: (B, P + T, H), used instead of the embeddings of `batch.input_ids`.
        """
        if reads_log_probs(self.settings.head):
            log_probs, hidden = completion_log_probs(self.backbone, batch, inputs_embeds)
            return (log_probs if self.head is None else self.head(log_probs, hidden)), log_probs
        with self._exact_classifier():
            output = self.backbone(
                input_ids=batch.input_ids if inputs_embeds is None else None,
                inputs_embeds=inputs_embeds,
                attention_mask=batch.model_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )
        return output.logits[:, -batch.completion_mask.size(1) :, 0].float(), None

    def _exact_classifier(self) -> contextlib.AbstractContextManager[None]:
        assert self.head_weight is not None
        backbone: Any = self.backbone.get_base_model() if isinstance(self.backbone, PeftModel) else self.backbone
        return exact_classifier(backbone, self.head_weight.dtype, self.settings.layers)

    def pack(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Batch:
        """`batch` on this model's device."""
        return self.batch(prompts, completions).to(self.device)

    @torch.no_grad()
    def compute_rewards(self, prompts: TokenIds, completions: TokenIds, options: ForwardOptions) -> list[Tensor]:
        """See `Scorer.compute_rewards`."""
        extra = options.extra.signed
        was_training = self.training
        self.eval()
        rewards: list[Tensor] = [torch.empty(0)] * len(completions)
        share = not options.sharded and all(can_share_prompts(m) for m in (self.backbone, *(m for _, m in extra)))
        batches = list(grouped_batches(prompts, completions, options.token_budget or self.token_budget, share))
        if options.sharded:
            batches += batches[-1:] * (all_reduce_max(len(batches)) - len(batches))
        with self.active():
            for indices, sizes in batches:
                batch = self.pack([prompts[i] for i in indices], [completions[i] for i in indices])
                shared = sizes if len(sizes) < len(indices) else None
                values = self(batch, shared)
                for sign, model in extra:
                    passed = shared_log_probs(model, batch, shared) if shared else completion_log_probs(model, batch)
                    values = values + sign * passed[0]
                shaped = token_rewards(
                    values, self.supervision(batch), self.settings.beta_clip, self.settings.temperature
                ).cpu()
                for row, index in enumerate(indices):
                    rewards[index] = shaped[row, : len(completions[index])]
        self.train(was_training)
        return rewards

    def save_pretrained(self, folder: str | Path, notes: str = "") -> None:
        """Write the artefact (see the module's docstring) atomically, with LoRA merged."""
        backbone = self.backbone
        if isinstance(backbone, AdapterView):
            backbone = backbone.merged()
        elif isinstance(backbone, PeftModel):
            backbone = merged(backbone)
        with atomic_folder(folder) as target:
            backbone.save_pretrained(target)
            self.tokenizer.save_pretrained(target)
            if self.head is not None:
                save_file({k: v.contiguous() for k, v in self.head.state_dict().items()}, target / HEAD_FILE)
            atomic_write_json(target / SETTINGS_FILE, {"tracereward_version": __version__, **asdict(self.settings)})
            (target / "README.md").write_text(model_card(self.settings, notes), encoding="utf-8")


RewardModel = TokenRewardModel


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that are no text: one of them last in a sampled trace means that the trace ended by itself."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}  # pyright: ignore[reportUnhashable]


def as_reward_func(
    model: TokenRewardModel, policy_tokenizer: PreTrainedTokenizerBase | None = None
) -> Callable[..., list[float]]:
    """Reward function for ``GRPOTrainer(reward_funcs=...)``: the trace reward of each completion.

    The folder of a token-head checkpoint of one layer can also be passed to TRL, which loads it with transformers and
    takes the last token's logit, without clip, temperature and aggregate. This function returns the rewards of `score`,
    for any head.

    Args:
        model: scores on its own device; renders prompts (messages, or texts that are not yet) with
            ``settings.rendering``.
        policy_tokenizer: tells which traces ended by themselves: with a special token, of which a policy may have
            several. Needed if the policy's tokenizer is not the reward model's; without it all its traces count as
            ended, with a warning.
    """

    if not isinstance(model, TokenRewardModel):
        raise InputError("model must be a TokenRewardModel: load it with TokenRewardModel.from_pretrained(folder)")

    def tracereward(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **_: Any
    ) -> list[float]:
        prompts = check_list("prompts", prompts)
        completions = check_list("completions", completions, len(prompts))
        if completion_ids is not None:
            completion_ids = check_list("completion_ids", completion_ids, len(prompts))
        for name, values in (("prompts", prompts), ("completions", completions)):
            for index, value in enumerate(values):
                if not isinstance(value, (str, list)):
                    raise InputError(f"{name}[{index}] must be a text or a list of messages, not {value!r:.40}")
        pairs = zip(prompts, completions)
        rows = [{"prompt": p, "completion": c, "answer": None, "source": "a rollout"} for p, c in pairs]
        how = model.settings.rendering
        if all(is_rendered(model.tokenizer, prompt, how) for prompt in prompts):
            how = Rendering()  # as TRL passes on a data set of texts
        rendered = render(rows, model.tokenizer, how)
        texts = [row["prompt"] for row in rendered], [row["completion"] for row in rendered]
        finished = None
        tokenizer = policy_tokenizer or model.tokenizer
        if same_vocabulary(tokenizer, model.tokenizer):
            tokenizer = model.tokenizer  # which keeps the reasoning tags that another may drop as special
        decoded = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in completion_ids or ()]
        if any(without_tags(text).strip() not in without_tags(of_ids) for text, of_ids in zip(texts[1], decoded)):
            warn_once(
                "completion_ids are not the reward model's tokens, so every trace counts as ended: pass the policy's "
                "tokenizer, as_reward_func(model, policy_tokenizer)"
            )
        elif completion_ids is not None:  # a trace without text has only its end-of-sequence token to score
            ends = special_ids(tokenizer)
            finished = [not text or ids[-1] in ends for ids, text in zip(completion_ids, texts[1], strict=True)]
            texts = texts[0], decoded
        ended = [True] * len(prompts) if finished is None else finished
        traces = [
            model.encode(Trace(where="a rollout", prompt=prompt, completion=text, finished=end), known=False)
            for prompt, text, end in zip(*texts, ended, strict=True)
        ]
        return [scores.aggregate(model.settings.aggregate) for scores in model.score_encoded(traces)]

    return tracereward
