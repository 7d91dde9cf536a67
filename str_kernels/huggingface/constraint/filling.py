"""A reference cache that fills itself: a row is computed when it is first met, and then read.

Stage: a batch → the rows that are not there, from the pass with the adapters off → the file → the
references ``[B, T, K]`` of the batch, read back, so that the first epoch has the same rounding as
those after it, and a resumed run the references of the first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from str_kernels.huggingface.constraint.references import (
    SCHEMA,
    ReferenceCache,
    halves,
    reference_unit,
    references_of,
    require_writable,
)
from str_kernels.huggingface.constraint.sequences import Sequences
from str_kernels.options import SafetyConstraint
from str_kernels.tensor_rows import TensorRows


class FillingCache(ReferenceCache):
    """A cache file that grows while a model is trained; ``patch_model(reference=...)`` takes it.

    Each sequence is there whole or absent, whenever the process is killed; several processes may
    fill one file on a local disk. The file can be given to later runs by its path.

    Args:
        path: the file; made if it is not there. One of other weights must be removed first: rows
            are known by their tokens alone.
        safety: the constraint of this run.

    Raises:
        ValueError: a folder that cannot be written to, or a cache of another constraint.
    """

    def __init__(self, path: str | os.PathLike, safety: SafetyConstraint) -> None:
        """Open the file, or make it."""
        self.path, self._safety = Path(path), safety
        require_writable(self.path)
        metadata = {
            "schema": SCHEMA,
            "token_ids": json.dumps(list(safety.token_ids)),
            "unit": reference_unit(safety),
        }
        self._saved = TensorRows(path, f"reference={os.fspath(path)!r}", metadata)
        self.check(safety)

    def lacks(self, sequences: Sequences) -> bool:
        """Whether a sequence of this batch is not there."""
        if sequences.missing is not None:
            return False  # the look-up says what it needs
        return any(key not in self._saved.names for _, _, key in sequences.rows())

    def fill(
        self, model: nn.Module, arguments: dict[str, Tensor], any_lacks: Callable[[bool], bool]
    ) -> None:
        """Compute and keep what a batch lacks; the pass is of the whole batch.

        Args:
            model: whose adapters are switched off meanwhile.
            arguments: of the training forward, by name.
            any_lacks: whether any process that makes the same forwards lacks something: a sharded
                model needs all of them in a pass.
        """
        if any_lacks(self.lacks(Sequences.of(model, arguments))):
            self._saved.add(halves(references_of(model, arguments, self._safety)))
