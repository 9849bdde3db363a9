"""A model on a GPU, as far as the interpreter shows it: a layer runs on our kernels, and computes what plain torch does."""

from __future__ import annotations

from typing import Any

import pytest

from .interpreter import rows_of

CARDS = ("gdn", "pgdn", "osdn", "kda", "mamba2")
LAYER = {
    "short_conv_kernel", "short_conv_adjoint_kernel", "rms_norm_kernel", "rms_norm_adjoint_kernel", "swiglu_kernel",
    "swiglu_adjoint_kernel", "states_kernel", "outputs_kernel", "state_gradients_kernel", "recurrent_kernel",
}  # fmt: skip
OWN = {
    "gdn": {"pairs_scalar_kernel", "input_gradients_scalar_kernel"},
    "pgdn": {"write_key_kernel", "write_key_adjoint_kernel"},
    "osdn": {"hypergradient_write_key_kernel", "hypergradient_write_key_adjoint_kernel"},
    "kda": {"pairs_channel_kernel", "input_gradients_channel_kernel"},
    "mamba2": {"pairs_scalar_kernel", "input_gradients_scalar_kernel"},
}
ALLOWED = {"float32": 1e-4, "float16": 0.02}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    return {row["card"]: row for row in rows_of("interpreted_model.py", *CARDS)}


@pytest.mark.parametrize("card", CARDS)
def test_a_model_runs_on_the_kernels(card, found):
    assert LAYER | OWN[card] <= set(found[card]["launched"])


@pytest.mark.parametrize("precision", ALLOWED)
@pytest.mark.parametrize("card", CARDS)
def test_it_computes_what_torch_does(card, precision, found):
    errors = found[card]["errors"][precision]
    assert {"loss", "decoded", "gradient of embedding.weight", "gradient of blocks.0.mixer.conv.weight"} <= errors.keys()
    assert not {name: error for name, error in errors.items() if not error <= ALLOWED[precision]}
