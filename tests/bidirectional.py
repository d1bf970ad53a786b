"""A kind of model that sees both sides of a token: the blocks of the decoder without the causal mask."""

from __future__ import annotations

from model.registry import ModelKind

BIDIRECTIONAL = "bidirectional"
KIND = ModelKind("model.decoder:DecoderLM", causal=False, generates=False, exports=False)
