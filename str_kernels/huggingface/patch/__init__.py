"""A model that carries a patch: its loss is fused, and joined by the safety constraint.

::

    install ──▶ verify (a trial on a few tokens) ──▶ Patch
    Patch.run: forward(labels=...) ──▶ reference ──▶ LabelledForward ──▶ outputs.loss
                                                          └──▶ losses ──▶ meter, filtering, notices
"""
