"""`--device`: a device of this machine, or an error that says which there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import UserError

if TYPE_CHECKING:
    import torch


def device_named(name: str) -> torch.device:
    """The CPU, or a GPU that PyTorch sees."""
    import torch

    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device: {name!r} is no device: {str(error).splitlines()[0]}") from error
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if place.type == "cpu" or (place.type == "cuda" and (place.index or 0) < gpus):
        return place
    there = ", ".join(f"cuda:{n} ({torch.cuda.get_device_name(n)})" for n in range(gpus)) or "PyTorch sees no GPU on this machine"
    valid = f"cpu, {there}" if gpus else f"cpu ({there})"
    raise UserError(f"--device: {name!r} cannot be used here. Valid: {valid}")
