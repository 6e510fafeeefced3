"""Resolve the device and dtype options on this machine."""

from __future__ import annotations

from typing import cast

import torch


def resolve_device(device: str | None) -> torch.device:
    """Resolve a device name; None picks the first available of CUDA, Apple's MPS and CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        if resolved.type == "cpu":
            return torch.device("cpu")
        if resolved.type == "cuda" and resolved.index is None:
            resolved = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=resolved).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={device!r} cannot be used here: {error}") from error
    return resolved


def resolve_devices(device: str | tuple[str, ...] | None) -> tuple[torch.device, ...]:
    """Resolve one or several device names, each as :func:`resolve_device` does.

    Raises:
        ValueError: this machine has no such device, or two names mean the same device.
    """
    devices = tuple(map(resolve_device, device if isinstance(device, tuple) else (device,)))
    if repeated := [str(place) for number, place in enumerate(devices) if place in devices[:number]]:
        raise ValueError(f"device={device!r}: two of these are {repeated[0]}; allowed: each device once.")
    return devices


def resolve_dtype(dtype: str, *devices: torch.device) -> torch.dtype:
    """Resolve a dtype name; ``auto`` is bf16 if all devices compute in it natively, else fp32."""
    if dtype != "auto":
        return cast(torch.dtype, getattr(torch, dtype))
    return torch.bfloat16 if all(map(has_bf16, devices)) else torch.float32


def has_bf16(device: torch.device) -> bool:
    """Return whether a device computes in bf16 natively."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # torch answers for the current device
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases have none
        return any(bool(capabilities.get(flag, False)) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    return False
