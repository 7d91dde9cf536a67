"""When the host may wait for a device, and what it does where it may not.

Work on a GPU is queued: to read a value there, the host waits until the queue is empty, and then
the device is idle until the next work arrives. So constants are copied to a GPU once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_CONSTANTS = 256  # so many small tensors are kept; the least used one leaves first


@lru_cache(_CONSTANTS)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``values [K]`` on a device; the tensor is shared and must not be changed.

    Only the first call copies anything there.
    """
    with torch.inference_mode(False):  # autograd cannot save a tensor made in it
        return torch.tensor(values, dtype=dtype, device=device)
