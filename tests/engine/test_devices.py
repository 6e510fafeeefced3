"""Device and dtype options resolve to devices and dtypes of this machine; others raise an error that names them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from pyterrier_llmrerank.engine.devices import resolve_device, resolve_devices, resolve_dtype


def test_auto_is_bf16_only_on_devices_with_native_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert resolve_dtype("auto", cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("float16", cpu) == torch.float16
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("auto", torch.device("mps")) == torch.float32


def test_auto_asks_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch answers for the current device; here only the second has bf16."""
    current = [0]

    @contextmanager
    def at(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", at)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: current[-1] == 1)
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert resolve_dtype("auto", first) == torch.float32
    assert resolve_dtype("auto", second) == torch.bfloat16
    assert resolve_dtype("auto", second, first) == torch.float32
    assert current == [0]


def test_a_device_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device(None) == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device(None).type == "cpu"
    for device in ("abacus", "cuda:99", "meta"):
        with pytest.raises(ValueError, match=f"device='{device}' cannot be used here"):
            resolve_device(device)


def test_a_device_given_twice_is_refused() -> None:
    assert resolve_devices(None) == (resolve_device(None),)
    assert resolve_devices("cpu") == (torch.device("cpu"),)
    with pytest.raises(ValueError, match=r"device=\('cpu', 'cpu:0'\): two of these are cpu; allowed: each device once"):
        resolve_devices(("cpu", "cpu:0"))
    with pytest.raises(ValueError, match="device='abacus' cannot be used here"):
        resolve_devices(("cpu", "abacus"))


def test_auto_is_one_dtype_on_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert resolve_dtype("auto", torch.device("cpu"), torch.device("cpu", 0)) == torch.bfloat16
    assert resolve_dtype("auto", torch.device("cpu"), torch.device("mps")) == torch.float32
