"""Layers: `quant_*` train, `packed_*` serve."""
