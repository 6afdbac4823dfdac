"""Copies between GPUs, tried before anything relies on them."""

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from types import ModuleType

import torch
from torch import Tensor

ELEMENTS = 1 << 20  # of 4 bytes
TRIALS = 4


def wrong_copies(
    devices: Sequence[torch.device], copy: Callable[[Tensor, torch.device], Tensor] = Tensor.to
) -> Iterator[str]:
    """What does not arrive as it was sent, from any device to any other.

    Args:
        copy: a tensor to a device.
    """
    for source, target in permutations(devices, 2):
        for trial in range(TRIALS):
            arrived = copy(_pattern(trial, source), target)
            if not torch.equal(arrived, _pattern(trial, target)):
                yield f"copies from {source} to {target} arrive wrong"
                break


def _pattern(trial: int, device: torch.device) -> Tensor:
    return torch.arange(trial, ELEMENTS + trial, dtype=torch.int32, device=device) * 0x01000193


def all_on_nvlink(gpus: Sequence[int]) -> bool:
    """Every one of these GPUs has an NVLink that is up; False where the driver does not tell."""
    import pynvml

    try:
        pynvml.nvmlInit()
        for gpu in gpus:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(gpu).uuid}")
            if not any(_is_up(pynvml, handle, link) for link in range(pynvml.NVML_NVLINK_MAX_LINKS)):
                return False
    except pynvml.NVMLError:
        return False
    return True


def _is_up(pynvml: ModuleType, handle: object, link: int) -> bool:
    try:
        return bool(pynvml.nvmlDeviceGetNvLinkState(handle, link))
    except pynvml.NVMLError:  # there are not so many, or none
        return False


def main(gpus: str) -> None:
    """Say what is wrong among these GPUs, "0,1"."""
    print(*wrong_copies([torch.device("cuda", int(gpu)) for gpu in gpus.split(",")]), sep=", ")
