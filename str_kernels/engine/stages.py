"""`TorchStages` serves every backend without row stages of its own, by torch calls."""

from __future__ import annotations

from str_kernels.engine.contract import Backend, RowStages
from str_kernels.engine.finish import join_rows
from str_kernels.engine.logits import exact_columns
from str_kernels.engine.penalty import gradient_rows, penalty_rows


class TorchStages:
    """``RowStages`` documents the stages."""

    columns = staticmethod(exact_columns)
    join = staticmethod(join_rows)
    penalty = staticmethod(penalty_rows)
    gradient = staticmethod(gradient_rows)


def row_stages(backend: Backend) -> RowStages:
    """Return a backend's own row stages, or those of torch."""
    return backend if isinstance(backend, RowStages) else TorchStages()
