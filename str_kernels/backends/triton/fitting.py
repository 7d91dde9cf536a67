"""What happens where a kernel needs more of a chip than it has: the default sizes, said once.

The table's sizes were compiled ahead by a few versions of Triton; another one may take more shared
memory for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Protocol

from triton.runtime.errors import OutOfResources

from str_kernels.backends.triton.launch import Kind, Launch, Stage, arch_of, take_default
from str_kernels.engine.contract import Block
from str_kernels.notices import say_once

Method = Callable[..., Any]


class Launching(Protocol):
    """An owner of launches that replace the table's."""

    launches: Mapping[tuple[Stage, Kind], Launch]


def with_default(*stages: Stage) -> Callable[[Method], Method]:
    """Run a method again with the default sizes where a launch of ``stages`` does not fit the chip.

    A method has changed nothing before its launches, and a launch that does not fit changes
    nothing. Sizes that the user gave are not replaced.
    """

    def decorate(method: Method) -> Method:
        @wraps(method)
        def run(self: Launching, block: Block, *given: Any, **named: Any) -> Any:
            try:
                return method(self, block, *given, **named)
            except OutOfResources as error:
                arch = arch_of(block.head.weight.device)
                chosen = any(stage in stages for stage, _ in self.launches)
                if chosen or not take_default(arch, stages):
                    raise
                say_once(
                    f"str_kernels: {method.__name__} does not fit this GPU ({arch}) with the sizes "
                    f"of its chip, and runs with the default ones: {error}",
                    logging.WARNING,
                )
            # outside the handler, whose traceback holds the failed attempt's tensors
            return method(self, block, *given, **named)

        return run

    return decorate
