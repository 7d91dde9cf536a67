"""Compare a tiny model of every architecture of transformers, patched and unpatched."""
