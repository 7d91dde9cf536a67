"""What the safety constraint needs of a batch: which positions, and which reference.

::

    labels, mask, packing ──positions──▶ weights [B, T]
    the model, trained adapters off ──reference_pass──▶ reference [R, K]
    the same, computed beforehand ──references──▶ a cache file ──▶ reference [B, T, K]
    rows that are constrained and not learned ──anchors──▶ joined to every batch
"""
