"""The chunk form against the token loop, in float64: outputs and every gradient, every gate, any length."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltalab.kernels import chunked, delta_rule, layout

GATES = ["none", "scalar", "channel"]


@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", [1, 2, 31, 63, 64, 65, 130])
def test_chunk_form_equals_the_token_loop(T, gate, state, erase, inputs, both, equal):
    tensors = inputs(2, T, 3, 5, 4, gate, state, erase)
    found = both(delta_rule, tensors, erase=erase, backend="torch")
    equal(found, both(delta_rule, tensors, erase=erase, backend="reference"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(*[st.integers(1, top) for top in (3, 90, 3, 9, 9)]),
    gate=st.sampled_from(GATES),
    state=st.booleans(),
    erase=st.booleans(),
    chunk=st.integers(1, 80),
)
def test_chunk_form_equals_the_token_loop_on_random_shapes(sizes, gate, state, erase, chunk, inputs, both, equal):
    tensors = inputs(*sizes, gate, state, erase)
    found = both(delta_rule, tensors, erase=erase, backend="torch", chunk_size=chunk)
    equal(found, both(delta_rule, tensors, erase=erase, backend="reference"), 1e-9)


@pytest.mark.parametrize("chunk", [1, 8, 64])
@pytest.mark.parametrize("gate", GATES)
def test_one_span_over_all_chunks_as_on_a_gpu(gate, chunk, inputs, both, equal, monkeypatch):
    monkeypatch.setattr(layout, "_CPU_SPAN", 1 << 40)
    monkeypatch.setattr(layout, "_CPU_CHUNK", 64)
    tensors = inputs(2, 150, 2, 5, 4, gate, True)
    found = both(delta_rule, tensors, backend="torch", chunk_size=chunk)
    equal(found, both(delta_rule, tensors, backend="reference"))


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_that_grows_is_computed_too(gate, inputs, both, equal):
    tensors = inputs(2, 70, 2, 5, 4, gate, True)
    if tensors["log_decay"] is not None:
        tensors["log_decay"] = 0.05 * torch.randn_like(tensors["log_decay"])
    equal(both(delta_rule, tensors, backend="torch"), both(delta_rule, tensors, backend="reference"))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("erase", [True, False])
def test_gradcheck(gate, erase, inputs):
    tensors = inputs(1, 5, 2, 3, 2, gate, True, erase)
    names = [name for name, value in tensors.items() if value is not None]

    def run(*values):
        return delta_rule(**{**tensors, **dict(zip(names, values, strict=True))}, erase=erase, backend="torch", chunk_size=2)

    assert torch.autograd.gradcheck(run, [tensors[name].requires_grad_() for name in names])


@pytest.mark.parametrize("only", ["q", "read_key", "write_key", "v", "log_decay", "initial_state"])
def test_each_gradient_alone(only, inputs):
    tensors = inputs(1, 40, 2, 4, 3, "channel", True)
    results = []
    for backend in ("torch", "reference"):
        leaf = tensors[only].clone().requires_grad_()
        o, _ = delta_rule(**{**tensors, only: leaf}, backend=backend)
        results.append(torch.autograd.grad(o.square().sum(), leaf)[0])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


def test_gradient_through_the_final_state_alone(inputs):
    tensors = inputs(1, 40, 2, 4, 3, "scalar", False)
    results = []
    for backend in ("torch", "reference"):
        leaf = tensors["write_key"].clone().requires_grad_()
        _, final = delta_rule(**{**tensors, "write_key": leaf}, backend=backend)
        results.append(torch.autograd.grad(final.square().sum(), leaf)[0])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_planted_fault_is_found(part, inputs, both, equal, monkeypatch):
    """A relative error of 1e-6 in the triangular matrix, in one direction only, must not pass the comparison above."""
    solve = chunked.solve

    def faulty(M, rhs, transposed=False, out=None):
        planted = transposed == (part == "backward")
        return solve(M * (1 + 1e-6) if planted else M, rhs, transposed, out)

    monkeypatch.setattr(chunked, "solve", faulty)
    tensors = inputs(2, 65, 2, 5, 4, "scalar", True)
    found = both(delta_rule, tensors, backend="torch")
    with pytest.raises(AssertionError, match="output" if part == "forward" else "gradient"):
        equal(found, both(delta_rule, tensors, backend="reference"))
