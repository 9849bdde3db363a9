"""A language model as a Hugging Face model.

`generate` carries the recurrent state of every layer in a `DeltalabCache`: a token costs one step, whatever came before. With a
left-padded batch every row is read without its padding, since a recurrence would take padding for text.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...errors import UserError
from ..language_model import IGNORE, LanguageModel, LanguageModelState
from .configuration import DeltalabConfig


class DeltalabCache:
    """The state of every layer after the tokens read so far, as `generate` carries it."""

    is_compileable = False

    def __init__(self, state: LanguageModelState, length: int) -> None:
        self.state, self.length = state, length

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens read so far."""
        return self.length

    def reorder_cache(self, beams: Tensor) -> None:
        """Rows in another order, as beam search asks for."""
        self.state = [layer.map(lambda tensor: tensor.index_select(0, beams.to(tensor.device))) for layer in self.state]


class DeltalabForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """tokens [B,T] -> logits [B,T,N], with a recurrent cache."""

    config_class = DeltalabConfig
    base_model_prefix = "model"
    _is_stateful = True
    _no_split_modules = ("ModelBlock",)
    supports_gradient_checkpointing = False

    def __init__(self, config: DeltalabConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(
            config.spec(),
            vocab=config.vocab_size,
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            mlp_hidden=config.intermediate_size,
            tied=config.tie_word_embeddings,
            backend=config.backend,
        )
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Nothing: a `LanguageModel` initialises itself, and a folder's weights replace that."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> Any:
        return self.model.embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> Any:
        return self.model.embedding if self.model.head is None else self.model.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: DeltalabCache | None = None,
        past_key_values: DeltalabCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of the last `logits_to_keep` positions (0: all); `loss` is the mean cross entropy of the next token.

        With a cache the tokens go on from its state. `attention_mask` may mark padding on the left of the first call.
        """
        before = cache if cache is not None else past_key_values
        carries = use_cache if use_cache is not None else before is not None
        padding = None if attention_mask is None or before is not None else _left_padding(attention_mask)
        if padding is not None:
            hidden, state = self._read_rows(input_ids, padding)
        else:
            start = before.state if before is not None else self.model.initial_state(len(input_ids)) if carries else None
            hidden, state = self.model.hidden(input_ids, start)
        logits = self.model.logits(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE
            )
        length = input_ids.shape[1] + (before.length if before is not None else 0)
        after = DeltalabCache(state, length) if carries else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits)
        for name in ("cache", "past_key_values"):  # the name changed between versions of transformers
            if after is not None and name in _CACHE_NAMES:
                output[name] = after
        return output

    def _read_rows(self, tokens: Tensor, padding: list[int]) -> tuple[Tensor, LanguageModelState]:
        """Every row without its padding, one by one; (hidden [B,T,D] with zeros for padding, the rows' states)."""
        hidden, states = [], []
        for row, skip in zip(tokens, padding, strict=True):
            found, state = self.model.hidden(row[None, skip:], self.model.initial_state(1))
            hidden.append(torch.nn.functional.pad(found, (0, 0, skip, 0)))
            states.append(state)
        if len(set(padding)) > 1 and any(layer.keys is not None for layer in states[0]):
            raise UserError("attention_mask: rows of different length cannot share the cache of softmax attention; one at a time")
        return torch.cat(hidden), [first.map(_together, *others) for first, *others in zip(*states, strict=True)]


_CACHE_NAMES = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}


def _left_padding(mask: Tensor) -> list[int] | None:
    """Tokens to skip per row; None where there is nothing to skip. `UserError` for padding that is not on the left."""
    if mask.ndim != 2 or bool(mask.all()):
        return None
    skip = (mask.shape[1] - mask.sum(1)).tolist()
    for row, count in zip(mask, skip, strict=True):
        if bool(row[int(count) :].logical_not().any()):
            raise UserError("attention_mask: padding must stand on the left of the text (tokenizer.padding_side = 'left')")
    return [int(count) for count in skip]


def _together(*rows: Tensor) -> Tensor:
    """The batch of some rows' tensors."""
    return torch.cat(rows)
