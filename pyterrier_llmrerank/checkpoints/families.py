"""The model families whose layers this package runs one by one."""

from __future__ import annotations

#: Values of ``model_type`` whose models are a token embedding, layers with rotary positions and a final norm, and
#: nothing else. Other families scale embeddings or mix kinds of positions; transformers' own forward runs them.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
