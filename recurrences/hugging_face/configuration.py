"""A language model's configuration as Hugging Face reads it: JSON, with every choice of the recurrence written out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.configuration_utils import PretrainedConfig

from ...errors import UserError
from ..spec import MixerSpec, spec_from_mapping

MODEL_TYPE = "deltalab"


class DeltalabConfig(PretrainedConfig):  # type: ignore[misc]
    """The recurrence with every choice written out, and the sizes of the model around it."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        recurrence: Mapping[str, Any] | None = None,
        vocab_size: int = 256,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        intermediate_size: int = 0,
        tie_word_embeddings: bool = True,
        backend: str = "auto",
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.recurrence = dict(recurrence or {})
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.intermediate_size, self.backend = num_attention_heads, intermediate_size, backend
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def spec(self) -> MixerSpec:
        """The recurrence. `UserError` where a component is a plug-in that is not imported."""
        if not self.recurrence:
            raise UserError("recurrence: missing in the configuration; this folder was not written by `deltalab export`")
        return spec_from_mapping(self.recurrence)
