"""Logits that are put off: what the patched head returns, and what may be done to it.

::

    head: F.linear ──▶ Fold ──recording──▶ Fold ──F.cross_entropy──▶ the fused loss of its owner
                         └── tensor: DeferredLogits, which computes the values when they are read

``forward`` replaces the forward of one module; ``modes`` and ``freshness`` say under which
conditions a value may still be computed later.
"""
