"""Every architecture of transformers, tiny, patched against unpatched: what fuses and what not."""
