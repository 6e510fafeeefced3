r"""Compute where the time of scoring should go on a GPU, from the operations that run, without one.

    python examples/benchmarks/roofline.py
    python examples/benchmarks/roofline.py --model 135M --pairs 320 --kernel sdpa

A batch of pairs runs through the package's decoder at its true size, on tensors that have shapes and no values. Each
operation takes the longer of two times: its multiplications and additions at the rate of large matrix products, or the
bytes that it reads and writes at the rate of a large copy. That is a bound, since real kernels reach neither rate in
full. The default rates were measured on an H100 (SXM). Columns are milliseconds a batch, and the last ones pairs a
second and kernels a batch. A GPU is kept busy only if the host starts these kernels in less time than they take.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from gpu import RandomCheckpoint, configuration, markdown
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSequenceClassification

from pyterrier_llmrerank.engine import attention_kernels, elementwise, norms
from pyterrier_llmrerank.engine.decoder import embedded, run_layers
from pyterrier_llmrerank.engine.inputs import Ids
from pyterrier_llmrerank.engine.packing import PackedPairs, regrouped
from pyterrier_llmrerank.engine.weights import Weights

META = torch.device("meta")

#: Operations that run as one kernel, and how their products are counted.
PRODUCTS = ("aten::linear", "aten::matmul", "aten::mm", "aten::bmm", "aten::addmm", "aten::einsum")
ATTENTION = ("aten::scaled_dot_product_attention", "aten::_flash_attention_forward")
MOVES = ("aten::index_select", "aten::index.Tensor", "aten::cat", "aten::clone", "aten::copy_", "aten::embedding")

KINDS = ("matrix products", "attention", "gathers and copies", "element-wise")


class Roofline(TorchDispatchMode):
    """Adds up the time of all operations by their kinds.

    Args:
        rate: multiplications and additions a second.
        bandwidth: bytes a second, read and written.
    """

    def __init__(self, rate: float, bandwidth: float) -> None:
        super().__init__()
        self.rate, self.bandwidth = rate, bandwidth
        self.seconds: dict[str, float] = defaultdict(float)
        self.operations: dict[str, float] = defaultdict(float)
        self.kernels = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.name(), kwargs or {}
        whole = name in PRODUCTS or name in ATTENTION
        splits = partial(torch._C._dispatch_has_kernel_for_dispatch_key, name, "CompositeImplicitAutograd")
        if not whole and function.namespace == "aten" and splits():  # inference mode hands over functions of others
            with self:
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        made = function(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        results = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        memory = {tensor.untyped_storage()._cdata for tensor in given}
        new = [tensor for tensor in results if tensor.untyped_storage()._cdata not in memory]
        if new or name.endswith("_"):  # else it is a view
            self._add(name, given, results, args)
        return made

    def _add(self, name: str, given: list[torch.Tensor], results: list[torch.Tensor], args: Any) -> None:
        if name in ATTENTION:
            kind, operations = "attention", attention_operations(name, args)
            results = results[:1]
        elif name in PRODUCTS:
            kind = "matrix products"
            inner = given[0].shape[-1]
            operations = 2.0 * results[0].numel() * inner
        else:
            kind = "gathers and copies" if name in MOVES else "element-wise"
            operations = 0.0
        moved = float(sum(bytes_of(tensor) for tensor in [*given, *results]))
        if kind == "gathers and copies" and name != "aten::cat":  # reads what it writes, not all of its source
            moved = 2.0 * sum(bytes_of(tensor) for tensor in results)
        self.seconds[kind] += max(operations / self.rate, moved / self.bandwidth)
        self.operations[kind] += operations
        self.kernels += 1


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes in memory; of an expanded tensor those that there are."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def attention_operations(name: str, args: Any) -> float:
    """Of the half of the matrix that causality leaves."""
    query, key = args[:2]
    if name == "aten::scaled_dot_product_attention":
        pairs, heads, asked, width = query.shape
        return 2.0 * pairs * heads * asked * key.shape[2] * width
    tokens, heads, width = query.shape
    return 2.0 * tokens * heads * width * args[6]  # the longest sequence stands for all


def batch(pairs: int, tokens: int) -> list[Ids]:
    """Pairs of one query, of the same length."""
    return [Ids([3] * 8, [4] * (tokens - 8), []) for _ in range(pairs)]


def stand_in(name: str, *_: Any) -> Callable[..., torch.Tensor]:
    """For a kernel in Triton, an operation of torch that moves the same bytes."""
    return {
        "normalise": lambda states, weight, eps: states * weight,
        "rotate": lambda states, cos, sin: states.addcmul_(cos[:, :, None], sin[:, :, None]),
        "silu_times": lambda gate, up: gate * up,
    }[name]


def no_autocast(*_: Any, **__: Any) -> Any:
    """Stand in for torch.autocast, which does not know tensors without values."""
    return nullcontext()


@mock.patch.object(torch, "autocast", no_autocast)
@mock.patch.object(elementwise, "triton_kernel", stand_in)
@mock.patch.object(norms, "triton_kernel", stand_in)
@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7B", choices=["7B", "135M"])
    parser.add_argument("--pairs", type=int, default=80, help="a batch")
    parser.add_argument("--tokens", type=int, default=200, help="a pair")
    parser.add_argument("--kernel", choices=["packed", "sdpa", "eager"], default="packed", help="of attention")
    parser.add_argument("--tflops", type=float, default=790.0, help="rate of matrix products in bf16, 10^12 a second")
    parser.add_argument("--bandwidth", type=float, default=3000.0, help="of memory, GB a second")
    chosen = parser.parse_args(arguments)

    config = configuration(chosen.model, False)
    with META:
        plain = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    checkpoint: Any = RandomCheckpoint(plain, None)
    model, heads, _ = Weights(lambda: checkpoint, META, torch.bfloat16).at_depth(config.num_hidden_layers)
    layers, quarter = config.num_hidden_layers, config.num_hidden_layers // 4
    functions: dict[str, Any] = {
        "packed": attention_kernels.packed_flash,
        "sdpa": None,
        "eager": attention_kernels.eager,
    }
    pairs = batch(chosen.pairs, chosen.tokens)

    def run(cutoff: int, keep: dict[int, float] | None = None, **shape: Any) -> Roofline:
        with Roofline(1e12 * chosen.tflops, 1e9 * chosen.bandwidth) as counted:
            row, rows = embedded(model, PackedPairs(pairs)), pairs
            for depth, part in (keep or {}).items():
                options = {"kernel": functions[chosen.kernel], "resumable": True, **shape}
                _, row = run_layers(model, row, (depth,), **options)
                rows = pairs[: max(1, int(part * len(pairs)))]
                row = regrouped([(row, number) for number in range(len(rows))], rows)
            states, _ = run_layers(model, row, (cutoff,), kernel=functions[chosen.kernel], **shape)
            torch.einsum("cbw,cw->cb", states.float(), heads[:1])
        return counted

    part = 2 * layers // 3
    shapes = {
        "full depth": run(layers),
        f"{part} layers": run(part),
        f"{part} layers, ratio 2 after layer {quarter}": run(part, compress_layers=[quarter], compress_ratio=2),
        f"cascade: half after {quarter}, a fifth after {2 * quarter}": run(layers, {quarter: 0.5, 2 * quarter: 0.2}),
    }
    rows = []
    for name, counted in shapes.items():
        seconds = sum(counted.seconds.values())
        row: dict[str, Any] = {"shape": name}
        row["GFLOP a pair"] = round(sum(counted.operations.values()) / chosen.pairs / 1e9, 1)
        row |= {kind: f"{1000 * counted.seconds[kind]:.1f}" for kind in KINDS}
        row |= {"all, ms": f"{1000 * seconds:.1f}", "products": f"{counted.seconds[KINDS[0]] / seconds:.0%}"}
        row |= {"pairs/s": round(chosen.pairs / seconds), "kernels": counted.kernels}
        rows.append(row)
    print(markdown(rows))
    return rows


if __name__ == "__main__":
    main()
