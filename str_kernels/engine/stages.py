"""`TorchStages` serves every backend without row stages of its own, by torch calls."""

from __future__ import annotations

import logging

from str_kernels.engine.contract import Backend, Head, RowStages, brings
from str_kernels.engine.finish import join_rows
from str_kernels.engine.logits import exact_columns
from str_kernels.engine.penalty import gradient_rows, penalty_rows
from str_kernels.notices import say_once


class TorchStages:
    """``RowStages`` documents the stages."""

    columns = staticmethod(exact_columns)
    join = staticmethod(join_rows)
    penalty = staticmethod(penalty_rows)
    gradient = staticmethod(gradient_rows)


def whole_head(head: Head, backend: Backend) -> Head:
    """Copy a strided W once a call, where a backend's kernels read contiguous rows alone.

    A backend that reads them so has a true ``contiguous``.
    """
    if head.weight.is_contiguous() or not getattr(backend, "contiguous", False):
        return head
    say_once(
        f"str_kernels: the weight is strided {head.weight.stride()}, and is copied once in each "
        "forward and in each backward that trains it; make it contiguous to save its memory",
        logging.WARNING,
    )
    return head._replace(weight=head.weight.contiguous())


def row_stages(backend: Backend) -> RowStages:
    """Return a backend's own row stages, or those of torch."""
    return backend if brings(type(backend), RowStages) else TorchStages()
