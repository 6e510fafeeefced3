"""A layer run by its parts equals transformers' own layer, on all tokens and on the last ones."""

import pytest
import torch
from test_decoder import CONFIGS, models, pairs

from pyterrier_llmrerank.engine.attention import AttentionTap, Layout
from pyterrier_llmrerank.engine.layers import call_layer, is_compiled, run_last, run_layer
from pyterrier_llmrerank.engine.packing import PackedPairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_parts_compute_the_same_as_the_layer(name: str, dtype: torch.dtype) -> None:
    ours, _ = models(name)
    ours = ours.to(dtype)
    packed = PackedPairs(pairs())
    layout = Layout(packed, torch.device("cpu"), in_groups=True)
    hidden = ours.embed_tokens(torch.from_numpy(packed.ids))[None]
    rotary = ours.rotary_emb(hidden, position_ids=layout.positions[None])
    taps = AttentionTap(), AttentionTap()
    error = 1e-5 if dtype == torch.float32 else 0.05
    for layer in ours.layers:
        before = hidden.clone()
        got = run_layer(layer, hidden, rotary, layout, taps[0])
        assert torch.equal(hidden, before)
        hidden = call_layer(layer, hidden, rotary, layout, taps[1])
        torch.testing.assert_close(got, hidden, atol=error, rtol=error)
        torch.testing.assert_close(taps[0].log_weights, taps[1].log_weights, atol=error, rtol=error)
        last = run_last(layer, before, rotary, layout)
        torch.testing.assert_close(last, hidden[0, layout.last], atol=error, rtol=error)


def test_a_compiled_layer_is_known() -> None:
    ours, _ = models("llama")
    ours.layers[1].compile(backend="eager")
    assert [is_compiled(layer) for layer in ours.layers] == [False, True, False, False]
