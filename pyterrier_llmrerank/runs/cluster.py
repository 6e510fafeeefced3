"""Connect to a Ray cluster, and divide its CPUs and GPUs among workers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..reranker import LLMReranker

logger = logging.getLogger(__name__)

#: Seconds without a first worker after which a warning lists the cluster's free resources.
WARN_AFTER = 120


@contextmanager
def ray_cluster(workers: int, address: str | None = None) -> Iterator[Any]:
    """Connect to a Ray cluster, or start one, for the duration of a ``with`` block.

    Args:
        workers: number of workers, for the error message.
        address: address of the cluster. By default, the cluster that this process is connected to, else the one that
            ``RAY_ADDRESS`` names, else a new one on this machine, which is stopped at the end.

    Yields:
        The ``ray`` module.

    Raises:
        ImportError: Ray is not installed.
        ValueError: the address is not ``auto``, and this process is connected to Ray already.
        ConnectionError: there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"workers={workers} needs Ray: pip install 'pyterrier-llmrerank[ray]'") from error
    if ray.is_initialized():
        if address not in (None, "auto"):
            raise ValueError(
                f"address={address!r}: this process is connected to Ray already; allowed: None, to use that cluster, "
                "or ray.shutdown() first."
            )
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS", "local")
    ray.init(address=address, log_to_driver=False, configure_logging=False)
    try:
        yield ray
    finally:
        ray.shutdown()


def resolve_worker_dtype(reranker: LLMReranker, workers: int) -> tuple[str, str]:
    """Resolve the dtype that all workers compute in, and their type of device, on the first free worker.

    Args:
        reranker: the reranker.
        workers: number of workers.

    Returns:
        The dtype and the type of device. If the reranker names a dtype and has no quantization, no worker is asked:
        its own dtype and ``""``.

    Raises:
        ConnectionError: the worker was lost.
        ValueError: as :func:`~pyterrier_llmrerank.runs.workers.score_on_workers`.
    """
    import ray

    if reranker.dtype != "auto" and not reranker.quantization:
        return reranker.dtype, ""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    resolve = ray.remote(max_calls=1)(_resolve_dtype_here)  # a process that lived on would keep GPU memory
    reference = resolve.options(**worker_resources(nodes, reranker.device, workers)).remote(
        reranker.dtype, reranker.device
    )
    wait_for_first(ray, [reference], "has resolved its dtype")
    try:
        dtype, device_type = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause: Exception = error.cause
        raise cause from error
    except ray.exceptions.RayError as error:
        raise ConnectionError(f"a worker was lost while resolving its dtype: {error}") from error
    return dtype, device_type


def _resolve_dtype_here(dtype: str, device: str | tuple[str, ...] | None) -> tuple[str, str]:
    from ..engine.devices import resolve_devices, resolve_dtype

    devices = resolve_devices(device)
    return str(resolve_dtype(dtype, *devices)).removeprefix("torch."), devices[0].type


def wait_for_first(ray: Any, references: list[Any], event: str) -> Any:
    """Return the first reference that is ready. Warn if it takes long, since resources may be missing."""
    ready, _ = ray.wait(references, timeout=WARN_AFTER)
    if not ready:
        free = {name: amount for name, amount in ray.available_resources().items() if ":" not in name}
        logger.warning("No worker %s after %d s; still waiting. Free on the cluster: %s", event, WARN_AFTER, free)
        ready, _ = ray.wait(references)
    return ready[0]


def worker_resources(
    nodes: Sequence[Mapping[str, Any]], device: str | tuple[str, ...] | None, workers: int
) -> dict[str, int]:
    """Return the CPUs and GPUs to reserve for each worker, such that all workers fit on the machines."""
    machines = [node["Resources"] for node in nodes if node["Alive"]]

    def capacity(**each: int) -> int:
        """Count the workers that fit if each reserves these amounts."""
        return sum(min(int(machine.get(name, 0)) // amount for name, amount in each.items()) for machine in machines)

    names = device if isinstance(device, tuple) else (device,)
    gpus = sum(name is None or name.startswith("cuda") for name in names)
    if not gpus or not capacity(GPU=1):
        # More workers than CPUs reserve none: otherwise, some would wait forever.
        most = int(max((machine.get("CPU", 0) for machine in machines), default=0))
        return {"num_cpus": next((cpus for cpus in range(most, 0, -1) if capacity(CPU=cpus) >= workers), 0)}
    own = {"cuda", *(f"cuda:{index}" for index in range(gpus))}
    if others := [name for name in names if name is not None and name.startswith("cuda") and name not in own]:
        raise ValueError(
            f"workers={workers} with device={device!r}: each worker numbers its own GPUs from 0 and has no "
            f"{others[0]!r}; allowed: None, 'cuda', 'cpu', 'cuda:0', or a list counting up from it."
        )
    if workers > (most := capacity(GPU=gpus)):
        raise ValueError(
            f"workers={workers} with device={device!r}: each worker needs {gpus} of the cluster's {capacity(GPU=1)} "
            f"GPUs; allowed: at most {most} workers, or device='cpu'."
        )
    return {"num_cpus": int(capacity(GPU=gpus, CPU=1) >= workers), "num_gpus": gpus}
