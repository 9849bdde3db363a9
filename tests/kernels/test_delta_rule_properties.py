"""What the recurrence must do whatever the backend: hand its state on, forget, survive long and coarse inputs."""

import math

import pytest
import torch

from deltalab.kernels import backends, delta_rule, resolve_backend

GATES = ["none", "scalar", "channel"]
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(params=backends())
def backend(request):
    return request.param


def halves(tensors, at):
    """The same inputs before and after token `at`."""
    per_token = ("q", "read_key", "write_key", "v", "log_decay")
    for cut in (slice(None, at), slice(at, None)):
        yield {k: (v[:, cut] if k in per_token and v is not None else v) for k, v in tensors.items()}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("at", [1, 37, 64])
def test_two_halves_are_one_pass(gate, at, backend, inputs):
    tensors = inputs(2, 100, 2, 5, 4, gate, False)
    whole, final = delta_rule(**tensors, backend=backend)
    first, second = halves(tensors, at)
    o1, state = delta_rule(**first, backend=backend)
    o2, end = delta_rule(**{**second, "initial_state": state}, backend=backend)
    torch.testing.assert_close(torch.cat([o1, o2], dim=1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(end, final, rtol=1e-10, atol=1e-10)


def test_token_by_token_is_one_pass(inputs):
    tensors = inputs(2, 20, 2, 5, 4, "channel", False)
    whole, final = delta_rule(**tensors)
    state, tokens = None, []
    for t in range(20):
        token = {k: v[:, t : t + 1] for k, v in tensors.items() if k != "initial_state"}
        o, state = delta_rule(**token, initial_state=state)
        tokens.append(o)
    torch.testing.assert_close(torch.cat(tokens, dim=1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


def test_a_channel_gate_with_equal_channels_is_a_scalar_gate(backend, inputs):
    tensors = inputs(2, 70, 2, 5, 4, "scalar", True)
    wide = {**tensors, "log_decay": tensors["log_decay"][..., None].expand(-1, -1, -1, 5)}
    for channel, scalar in zip(delta_rule(**wide, backend=backend), delta_rule(**tensors, backend=backend), strict=True):
        torch.testing.assert_close(channel, scalar, rtol=1e-10, atol=1e-10)


def test_no_erase_ignores_the_read_key_and_is_linear_attention(backend, inputs):
    tensors = inputs(2, 50, 2, 5, 4, "none", False)
    o, _ = delta_rule(**tensors, erase=False, backend=backend)
    scores = torch.einsum("bthk,bshk->bhts", tensors["q"], tensors["write_key"]).tril() / math.sqrt(5)
    torch.testing.assert_close(o, torch.einsum("bhts,bshv->bthv", scores, tensors["v"]), rtol=1e-10, atol=1e-10)
    without, _ = delta_rule(**{**tensors, "read_key": None}, erase=False, backend=backend)
    assert torch.equal(o, without)


def test_a_read_key_that_needs_no_gradient_gets_none_without_erase(inputs):
    tensors = inputs(1, 10, 1, 4, 3, "none", False)
    read_key = tensors["read_key"].requires_grad_()
    q = tensors["q"].requires_grad_()
    o, _ = delta_rule(**tensors, erase=False)
    o.sum().backward()
    assert read_key.grad is None
    assert q.grad is not None


@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minus_infinity_resets_the_memory(gate, dtype, inputs, both, equal):
    """Resets in several places: nothing leaks over them, no gradient is nan, and both backends agree."""
    tensors = inputs(1, 90, 2, 5, 4, gate, True, dtype=dtype)
    resets = [0, 1, 17, 40, 41, 64, 89]
    tensors["log_decay"][:, resets] = -math.inf
    found = both(delta_rule, tensors, backend="torch")
    equal(found, both(delta_rule, tensors, backend="reference"), 1e-10 if dtype == torch.float64 else 1e-4)
    assert (found["gradient of log_decay"][:, resets] == 0).all()
    assert (found["gradient of initial_state"] == 0).all()
    other = {**tensors, "v": tensors["v"].clone()}
    other["v"][:, :41] = 1e3
    assert torch.equal(delta_rule(**other)[0][:, 41:], delta_rule(**tensors)[0][:, 41:])


@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("strength", [5.0, 30.0, 300.0])
def test_strong_gates_neither_overflow_nor_differ(gate, strength, inputs, both, equal):
    tensors = inputs(1, 70, 2, 5, 4, gate, True)
    tensors["log_decay"] = -strength * torch.rand_like(tensors["log_decay"])
    equal(both(delta_rule, tensors, backend="torch"), both(delta_rule, tensors, backend="reference"))
    single = {name: None if value is None else value.float() for name, value in tensors.items()}
    for tensor in both(delta_rule, single, backend="torch").values():
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("gate", GATES)
def test_four_thousand_tokens_in_float32_stay_accurate(gate, inputs, both, equal):
    tensors = inputs(1, 4096, 1, 16, 16, gate, False, dtype=torch.float32)
    found = both(delta_rule, tensors, backend="torch")
    double = {name: None if value is None else value.double() for name, value in tensors.items()}
    equal(found, both(delta_rule, double, backend="torch"), 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", GATES)
def test_half_precision_is_computed_in_float32(dtype, gate, backend, inputs):
    tensors = inputs(2, 40, 2, 8, 8, gate, True, dtype=torch.float32)
    coarse = {k: v.to(dtype) if k in ("q", "read_key", "write_key", "v") else v for k, v in tensors.items()}
    o, final = delta_rule(**coarse, backend=backend)
    wide = {k: None if v is None else v.float() for k, v in coarse.items()}
    expected, expected_final = delta_rule(**wide, backend=backend)
    assert (o.dtype, final.dtype) == (dtype, torch.float32)
    assert torch.equal(o, expected.to(dtype))
    assert torch.equal(final, expected_final)


def test_gradients_have_the_dtype_of_their_tensor(inputs):
    tensors = inputs(1, 20, 2, 4, 4, "scalar", True, dtype=torch.float32)
    leaves = {k: v.to(torch.bfloat16 if k in ("q", "read_key", "write_key", "v") else v.dtype) for k, v in tensors.items()}
    leaves = {k: v.requires_grad_() for k, v in leaves.items()}
    o, final = delta_rule(**leaves)
    (o.float().sum() + final.sum()).backward()
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == leaf.dtype, name


def test_autocast_leaves_the_recurrence_alone(backend, inputs):
    tensors = inputs(1, 40, 2, 8, 8, "scalar", True, dtype=torch.float32)
    q = tensors["q"].requires_grad_()
    o, _ = delta_rule(**tensors, backend=backend)
    (expected,) = torch.autograd.grad(o.sum(), q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within, _ = delta_rule(**tensors, backend=backend)
        (found,) = torch.autograd.grad(within.sum(), q)
    assert torch.equal(within, o)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("gate", GATES)
def test_no_tokens(gate, backend, inputs):
    tensors = inputs(2, 0, 2, 5, 4, gate, True)
    o, final = delta_rule(**tensors, backend=backend)
    assert o.shape == (2, 0, 2, 4)
    assert torch.equal(final, tensors["initial_state"])


def test_strided_inputs(inputs):
    """A projection split into heads gives views; values must not depend on the memory's layout."""
    tensors = inputs(2, 50, 2, 5, 4, "channel", True)
    views = {k: v.transpose(1, 2).contiguous().transpose(1, 2) for k, v in tensors.items()}
    assert not views["q"].is_contiguous()
    for found, expected in zip(delta_rule(**views), delta_rule(**tensors), strict=True):
        assert torch.equal(found, expected)


def test_inputs_are_left_as_they_were(inputs):
    tensors = inputs(1, 33, 2, 4, 4, "channel", True)
    copies = {k: v.clone() for k, v in tensors.items()}
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    o, final = delta_rule(**leaves)
    (o.sum() + final.sum()).backward()
    for name, copy in copies.items():
        assert torch.equal(tensors[name], copy), name


def test_scale(inputs, backend):
    tensors = inputs(1, 10, 1, 4, 3, "none", False)
    default, _ = delta_rule(**tensors, backend=backend)
    explicit, _ = delta_rule(**tensors, backend=backend, scale=1.0)
    torch.testing.assert_close(default, explicit / 2, rtol=1e-12, atol=1e-12)


def test_backends_and_what_auto_means():
    assert backends()[0] == "reference"
    assert resolve_backend("auto", "cpu") in backends()
    assert resolve_backend("reference", torch.device("cpu")) == "reference"
