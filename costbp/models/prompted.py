"""Language models with trained tokens before their text: prefix and prompt tuning, by peft's layers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from costbp.errors import UserError


class Prompted(nn.Module):
    """A language model with trained tokens before its text; returns what it returns, with logits of the
    text's places alone. Padding, on either side, takes the text no further from the tokens.

    Args:
        model: of peft, for prefix or prompt tuning.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.settings = model, model.active_peft_config
        self.prefix = self.settings.peft_type == "PREFIX_TUNING"
        named = inspect.signature(model.get_base_model().forward).parameters
        self.counts = "position_ids" in named

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
        **inputs: Any,
    ) -> Any:
        """Args: as the base's; ``input_ids`` and ``attention_mask`` [n, length]."""
        rows, length = input_ids.shape
        if attention_mask is not None:
            inputs["attention_mask"] = mask = self._widened(attention_mask)
            if self.counts:
                places = (mask.cumsum(1) - 1).clamp(min=0)
                inputs["position_ids"] = places[:, -length:] if self.prefix else places
        if self.prefix:
            inputs |= {"input_ids": input_ids, "past_key_values": self._before(rows)}
        else:
            inputs["inputs_embeds"] = self._embedded(input_ids)
        return self.model.get_base_model()(**inputs, logits_to_keep=logits_to_keep or length)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Tensor:
        """Tokens [n, length + new], as transformers writes them."""
        if self.prefix:
            written: Tensor = self.model.generate(
                input_ids=input_ids, attention_mask=attention_mask, **inputs
            )
            return written
        inputs["attention_mask"] = self._widened(attention_mask)
        embedded = self._embedded(input_ids)
        new = self.model.get_base_model().generate(inputs_embeds=embedded, **inputs)
        return torch.cat((input_ids, new), 1)

    def _widened(self, mask: Tensor) -> Tensor:
        return F.pad(mask, (self.settings.num_virtual_tokens, 0), value=1)

    def _embedded(self, input_ids: Tensor) -> Tensor:
        text = self.model.word_embeddings(input_ids)
        return torch.cat((self.model.get_prompt(len(input_ids)).to(text.dtype), text), 1)

    def _before(self, rows: int) -> Cache:
        model, settings = self.model, self.settings
        heads, blocks = settings.num_attention_heads, settings.num_layers
        weight = model.prompt_encoder[model.active_adapter].embedding.weight
        weight = weight.to(model.base_model_torch_dtype)
        pairs = weight.view(-1, blocks, 2, heads, settings.token_dim // heads).permute(
            1, 2, 3, 0, 4
        )
        pairs = pairs.unsqueeze(2).expand(-1, -1, rows, -1, -1, -1)
        return Cache(layers=[_Prefix(*pair) for pair in pairs])


class _Prefix(DynamicLayer):
    """Keys and values [n, heads, tokens, width] before those of the text, which aren't added to them: a
    block that is computed again finds the prefix alone."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.pair = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.pair
        if keys.shape[1] != key_states.shape[1]:
            raise UserError(
                f"train.kind = prefix: the model's keys have {key_states.shape[1]} heads, and peft makes "
                f"{keys.shape[1]} for it; use kind prompt"
            )
        return torch.cat((keys, key_states), -2), torch.cat((values, value_states), -2)
