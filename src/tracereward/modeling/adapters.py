"""One base model under LoRA adapters: the policy's, the discriminator's, or none, which is the starting policy."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from tracereward.modeling.quantized import is_quantized, without_quantization

POLICY, DISCRIMINATOR = "default", "discriminator"  # "default" is the name that PEFT gives the first


class AdapterView(nn.Module):
    """A PEFT model seen through one of its adapters, in a mode of its own; each use leaves the model as it was.

    The view's parameters are its adapter's alone, and only while it is `active` do they, and nothing else, require
    gradients. So the optimiser of the policy, which is made when no view is active, does not see the discriminator's.

    Args:
        model: the PEFT model, which stays its owner's.
        adapter: its name; None for the base model without any.
    """

    def __init__(self, model: PeftModel, adapter: str | None):
        super().__init__()
        self._whole = [model]  # in a list, or its weights would be this module's
        self.adapter = adapter
        found = (p for name, p in model.named_parameters() if f".{adapter}." in name)
        self.adapter_weights: nn.ParameterList = nn.ParameterList(found)

    @property
    def model(self) -> PeftModel:
        """The PEFT model."""
        return self._whole[0]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Hold the model in this view: around a backward pass too, which may compute activations again."""
        model, training, before = self.model, self.model.training, self.model.active_adapter
        assert isinstance(before, str)
        if training != self.training:
            model.train(self.training)
        try:
            if self.adapter is None:
                with model.disable_adapter():
                    yield
            elif self.adapter == before:
                yield
            else:
                model.set_adapter(self.adapter)
                try:
                    yield
                finally:
                    model.set_adapter(before)
        finally:
            if training != self.training:
                model.train(training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass in this view."""
        with self.active():
            return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What a view does not have is the model's: config, embeddings, device."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._whole[0], name)

    def merged(self) -> PreTrainedModel:
        """A copy of the base model with this adapter merged."""
        assert self.adapter is not None
        return merged(self.model, self.adapter)


def merged(model: PeftModel, adapter: str = POLICY) -> PreTrainedModel:
    """A copy of a PEFT model's base model with an adapter merged.

    Merging in place and undoing it would change the live weights by rounding. A quantized base model is loaded again
    without quantization, so that the result is an ordinary model whose weights are rounded once.
    """
    base = model.get_base_model()
    if is_quantized(base):
        weights = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        fresh = get_peft_model(without_quantization(base), copy.deepcopy(model.peft_config[adapter]))  # pyright: ignore[reportArgumentType]
        unknown = set_peft_model_state_dict(fresh, weights).unexpected_keys
        assert not unknown, unknown
    else:
        fresh = copy.deepcopy(model)
        fresh.set_adapter(adapter)
    return fresh.merge_and_unload()  # pyright: ignore[reportReturnType]
