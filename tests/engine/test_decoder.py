"""Layer-wise execution equals transformers' own forward, and compression equals its definition."""

import pytest
import torch
from test_pooling import by_definition
from transformers import AutoConfig, AutoModel, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from pyterrier_llmrerank.checkpoints.families import FAMILIES
from pyterrier_llmrerank.engine.attention import ATTENTION, PrefixCache
from pyterrier_llmrerank.engine.decoder import decode, embedded, run_layers
from pyterrier_llmrerank.engine.inputs import Ids
from pyterrier_llmrerank.engine.packing import PackedPairs

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "llama": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama, stray window": LlamaConfig(**SIZES, sliding_window=5),  # its layers ignore it
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral, window": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}
ROWS = [(4, 9, 3), (2, 0, 2), (3, 17, 2), (4, 6, 3)]


def models(name: str) -> tuple[AutoModel, AutoModel]:
    """The same random weights with our attention and with transformers' eager one."""
    torch.manual_seed(1)
    ours = AutoModel.from_config(CONFIGS[name], attn_implementation=ATTENTION).eval()
    theirs = AutoModel.from_config(AutoConfig.for_model(**CONFIGS[name].to_dict()), attn_implementation="eager").eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def pairs() -> list[Ids]:
    """Random pairs of the lengths in ROWS; the first and the last share a prefix."""
    generator = torch.Generator().manual_seed(2)
    made = [Ids(*(torch.randint(0, 60, (size,), generator=generator).tolist() for size in row)) for row in ROWS]
    return [*made[:-1], made[-1]._replace(prefix=made[0].prefix)]


def test_every_family_is_tested() -> None:
    assert {name.split(",")[0] for name in CONFIGS} == set(FAMILIES)


@pytest.mark.parametrize("whole_layers", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_equals_the_models_own_forward(name: str, whole_layers: bool) -> None:
    ours, theirs = models(name)
    states = decode(ours, PackedPairs(pairs()), [1, 2, 4], whole_layers=whole_layers)
    for row, pair in enumerate(pairs()):
        out = theirs(torch.tensor([pair.flat()]), output_hidden_states=True)
        for state, wanted in zip(states[:, row], [1, 2, 4], strict=True):
            hidden = out.last_hidden_state if wanted == 4 else theirs.norm(out.hidden_states[wanted])
            torch.testing.assert_close(state, hidden[0, -1], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "window" not in name])
@pytest.mark.parametrize("ratio", [2, 4])
@torch.inference_mode()
def test_compression_equals_full_attention_matrices(name: str, ratio: int) -> None:
    """Pooling before layers 1 and 3 gives the same as weights out of transformers' eager attention, row by row."""
    ours, theirs = models(name)
    states = decode(ours, PackedPairs(pairs()), [2, 4], compress_layers={1, 3}, compress_ratio=ratio)
    for row, (prefix, body, suffix) in enumerate(ROWS):
        attention = torch.empty(0)
        hidden = theirs.embed_tokens(torch.tensor([pairs()[row].flat()]))
        for index, layer in enumerate(theirs.layers):
            if index in (1, 3):
                weights = attention[0, :, -1].sum(0)  # of the layer before
                hidden = by_definition(hidden[0], weights, (prefix, body, suffix), ratio)[None]
                body = -(-body // ratio)
            length = hidden.shape[1]
            positions = torch.arange(length)[None]
            rotary = theirs.rotary_emb(hidden, position_ids=positions)
            mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
            caught: list[torch.Tensor] = []
            hook = layer.self_attn.register_forward_hook(lambda module, args, out, caught=caught: caught.append(out[1]))
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            hook.remove()
            attention = caught[0]
            if index + 1 in (2, 4):
                wanted = theirs.norm(hidden[0, -1])
                torch.testing.assert_close(states[(index + 1) // 2 - 1, row], wanted, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("pooling", [{}, {"compress_layers": {1, 3}, "compress_ratio": 2}])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_batch_reuses_the_prefix_of_the_one_before(name: str, pooling: dict) -> None:
    ours, _ = models(name)
    one, *others, two = pairs()
    prefix = PrefixCache(one.prefix)
    first, _ = run_layers(ours, embedded(ours, PackedPairs([*others, one])), [2, 4], save_prefix=prefix, **pooling)
    row = embedded(ours, PackedPairs([two, others[0]], cached_prefix=prefix.ids))
    assert len(row.states) == len(two.body + two.suffix) + others[0].length
    second, _ = run_layers(ours, row, [2, 4], reuse_prefix=prefix, **pooling)
    for got, pair in ((first[:, 2], one), (second[:, 0], two), (second[:, 1], others[0])):
        alone = decode(ours, PackedPairs([pair]), [2, 4], **pooling)
        torch.testing.assert_close(got, alone[:, 0], atol=2e-5, rtol=2e-5)


@torch.inference_mode()
def test_a_sliding_window_is_honoured_after_compression_and_never_gives_nan() -> None:
    ours, _ = models("mistral, window")
    together = decode(ours, PackedPairs(pairs()), [4], compress_layers={1, 2}, compress_ratio=2)
    assert together.isfinite().all()
    for row, pair in enumerate(pairs()):
        alone = decode(ours, PackedPairs([pair]), [4], compress_layers={1, 2}, compress_ratio=2)
        torch.testing.assert_close(together[:, row], alone[:, 0], atol=2e-5, rtol=2e-5)


@torch.inference_mode()
def test_layers_above_the_cutoff_do_not_run() -> None:
    ours, _ = models("mistral")
    ours.layers[2] = ours.layers[3] = torch.nn.Identity()  # fails on the arguments of a layer
    assert decode(ours, PackedPairs(pairs()), [2]).shape == (1, len(ROWS), 32)


def test_gradients_flow_through_the_pooling_weights() -> None:
    """In training with compression, the attention that weighs the pooling learns too."""
    ours, _ = models("mistral")
    for projection in (ours.layers[0].self_attn.q_proj, ours.layers[0].self_attn.k_proj):
        projection.weight.data *= 30  # sharp attention, so that the weights are far from equal
    ours.layers[0].self_attn.o_proj.weight.data.zero_()  # this attention now acts through pooling alone
    query = ours.layers[0].self_attn.q_proj.weight
    direction = torch.randn(1, len(ROWS), 32, generator=torch.Generator().manual_seed(3))

    def readout() -> torch.Tensor:
        states = decode(ours, PackedPairs(pairs()), [2], compress_layers={1}, compress_ratio=4)
        return (states * direction).sum()

    (gradient,) = torch.autograd.grad(readout(), query)
    step = 2e-2 * gradient / gradient.norm()
    with torch.no_grad():
        query += step
        further = readout()
        query -= 2 * step
        slope = (further - readout()) / 4e-2
    torch.testing.assert_close(slope, gradient.norm(), rtol=2e-2, atol=0)
