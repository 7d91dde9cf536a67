"""Read a GPU's clocks, temperature and power: a time means little without them."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Callable

import torch

Sensors = dict[str, float]

_QUERY = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "celsius": "temperature.gpu",
    "watts": "power.draw",
}


def read_sensors(device: torch.device) -> Sensors:
    """Return what NVML tells, or else nvidia-smi; nothing where there is neither."""
    if device.type != "cuda" or torch.version.hip:
        return {}
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return _reader(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")()


@functools.cache
def _reader(uuid: str) -> Callable[[], Sensors]:
    return _by_nvml(uuid) or functools.partial(_by_command, uuid)


def _by_nvml(uuid: str) -> Callable[[], Sensors] | None:
    """Return a reader that takes microseconds; None without NVML or its package."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:
        return None

    def read() -> Sensors:
        calls = {
            "sm_mhz": (pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM, 1),
            "memory_mhz": (pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_MEM, 1),
            "celsius": (pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU, 1),
            "watts": (lambda handle, _: pynvml.nvmlDeviceGetPowerUsage(handle), None, 1000),
        }
        found = {}
        for name, (call, what, divisor) in calls.items():
            try:
                found[name] = call(handle, what) / divisor
            except pynvml.NVMLError:  # a virtual machine may hide one of them
                continue
        return found

    return read


def _by_command(uuid: str) -> Sensors:
    """Ask nvidia-smi, which takes tens of milliseconds."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = f"--query-gpu={','.join(_QUERY.values())}"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-i", uuid]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return parsed(done.stdout) if done.returncode == 0 else {}


def parsed(line: str) -> Sensors:
    """Read nvidia-smi's line; what it cannot tell ("[N/A]") is left out."""
    found = {}
    for name, text in zip(_QUERY, line.strip().split(","), strict=False):
        try:
            found[name] = float(text)
        except ValueError:
            continue
    return found
