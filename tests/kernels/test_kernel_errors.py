"""Input that cannot be used is refused with a ValueError that names the argument and says what would be valid."""

import pytest
import torch

from deltalab.errors import UserError
from deltalab.kernels import delta_rule, diagonal_scan, hypergradient_scan, resolve_backend

B, T, H, K, V = 2, 5, 3, 4, 6


def good():
    shape = (B, T, H, K)
    return {
        "q": torch.randn(shape),
        "read_key": torch.randn(shape),
        "write_key": torch.randn(shape),
        "v": torch.randn(B, T, H, V),
        "log_decay": torch.zeros(B, T, H),
        "initial_state": torch.zeros(B, H, K, V),
    }


WRONG = [
    ("q", torch.randn(B, T, K), r"q: expected shape \[B,T,H,K\] .*got \[2, 5, 4\]"),
    ("q", torch.randn(B, T, H, 0), r"q: expected .*at least 1, got \[2, 5, 3, 0\]"),
    ("q", [1.0], r"q: expected a torch.Tensor, got list"),
    ("q", torch.ones(B, T, H, K, dtype=torch.int64), r"q: expected a floating dtype .*got int64"),
    ("read_key", torch.randn(B, T, H, K + 1), r"read_key: expected shape \[B,T,H,K\] = \[2, 5, 3, 4\], got \[2, 5, 3, 5\]"),
    ("read_key", None, r"read_key: expected shape \[B,T,H,K\] = \[2, 5, 3, 4\], got None; only erase=False"),
    ("read_key", torch.randn(B, T, H, K).double(), r"read_key: expected dtype torch.float32 \(that of q\), got torch.float64"),
    ("write_key", torch.randn(B, T, 1, K), r"write_key: expected shape \[B,T,H,K\] = \[2, 5, 3, 4\], got \[2, 5, 1, 4\]"),
    ("write_key", None, r"write_key: expected a torch.Tensor, got NoneType"),
    ("write_key", torch.empty(B, T, H, K, device="meta"), r"write_key: expected device cpu \(that of q\), got meta"),
    ("v", torch.randn(B, T + 1, H, V), r"v: expected shape \[B,T,H,V\] = \[2, 5, 3, 6\], got \[2, 6, 3, 6\]"),
    ("v", torch.randn(B, T, H), r"v: expected shape \[B,T,H,V\] = \[2, 5, 3, V >= 1\], got \[2, 5, 3\]"),
    ("v", torch.randn(B, T, H, 0), r"v: expected shape \[B,T,H,V\]"),
    ("v", torch.randn(B, T, H, V).bfloat16(), r"v: expected dtype torch.float32 \(that of q\), got torch.bfloat16"),
    ("v", torch.zeros(B, T, H, V, dtype=torch.bool), r"v: expected a floating dtype"),
    (
        "log_decay",
        torch.zeros(B, T),
        r"log_decay: expected shape \[B,T,H\] = \[2, 5, 3\] or \[B,T,H,K\] = \[2, 5, 3, 4\], got \[2, 5\]",
    ),
    ("log_decay", torch.zeros(B, T, H, 1), r"log_decay: expected shape .*got \[2, 5, 3, 1\]"),
    ("log_decay", -0.1, r"log_decay: expected a torch.Tensor, got float"),
    ("log_decay", torch.zeros(B, T, H, dtype=torch.int32), r"log_decay: expected a floating dtype"),
    ("log_decay", torch.zeros(B, T, H, device="meta"), r"log_decay: expected device cpu"),
    ("initial_state", torch.zeros(B, H, V, K), r"initial_state: expected shape \[B,H,K,V\] = \[2, 3, 4, 6\], got \[2, 3, 6, 4\]"),
    ("initial_state", torch.zeros(B, H, K, V, device="meta"), r"initial_state: expected device cpu"),
    ("scale", "1", r"scale: expected a finite number or None, got '1'"),
    ("scale", float("nan"), r"scale: expected a finite number"),
    ("erase", 1, r"erase: expected True or False, got 1"),
    ("chunk_size", 0, r"chunk_size: expected a whole number of at least 1, got 0"),
    ("chunk_size", 2.0, r"chunk_size: .*got 2.0"),
    ("chunk_size", True, r"chunk_size: .*got True"),
    ("backend", "trch", r"backend: unknown backend 'trch'. Did you mean 'torch'\? Valid: auto, reference, torch"),
    ("backend", None, r"backend: unknown backend None"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG, ids=lambda x: x if isinstance(x, str) and len(x) < 20 else "")
def test_delta_rule_names_what_is_wrong(name, value, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        delta_rule(**{**good(), name: value})
    assert isinstance(error.value, UserError)


def test_the_good_call_and_its_relatives_pass():
    tensors = good()
    delta_rule(**tensors)
    delta_rule(**{**tensors, "read_key": None}, erase=False)
    delta_rule(**{**tensors, "log_decay": tensors["log_decay"].double(), "initial_state": tensors["initial_state"].double()})
    half = {k: v.bfloat16() if k in ("q", "read_key", "write_key", "v") else v for k, v in tensors.items()}
    delta_rule(**half, scale=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"u": torch.ones(2, 3)}, r"u: expected shape \[B,T,H,K\]"),
        ({"log_decay": torch.zeros(B, T, H, K)}, r"log_decay: expected shape \[B,T,H\] = \[2, 5, 3\], got \[2, 5, 3, 4\]"),
        ({"initial": torch.zeros(B, H)}, r"initial: expected shape \[B,H,K\] = \[2, 3, 4\], got \[2, 3\]"),
        ({"chunk_size": -1}, r"chunk_size: "),
        ({"backend": "numba"}, r"backend: unknown backend 'numba'"),
    ],
)
def test_diagonal_scan_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        diagonal_scan(**{"u": torch.rand(B, T, H, K), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"s": torch.ones(B, T, H, K, dtype=torch.int64)}, r"s: expected a floating dtype"),
        ({"step": torch.ones(B, T)}, r"step: expected shape \[B,T,H\] = \[2, 5, 3\], got \[2, 5\]"),
        ({"step": "1"}, r"step: expected a finite number or a tensor \[B,T,H\], got '1'"),
        ({"aware": torch.ones(B, T, H, K)}, r"aware: expected shape \[B,T,H\]"),
        ({"log_decay": torch.ones(B, T, 1)}, r"log_decay: expected shape \[B,T,H\]"),
        ({"initial": torch.zeros(B, H, K, 1)}, r"initial: expected shape \[B,H,K\]"),
        ({"box": (1.0, 0.5)}, r"box: expected lowest <= highest, got \(1.0, 0.5\)"),
        ({"box": 1.0}, r"box: expected \(lowest, highest\) or None, got 1.0"),
        ({"clip": "tokens"}, r"clip: unknown clip 'tokens'. Did you mean 'token'\?"),
        ({"backend": "referense"}, r"backend: unknown backend 'referense'. Did you mean 'reference'\?"),
    ],
)
def test_hypergradient_scan_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        hypergradient_scan(**{"s": torch.rand(B, T, H, K), "step": 1.0, **options})


def test_resolve_backend_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'reference'"):
        resolve_backend("refrence", "cpu")
