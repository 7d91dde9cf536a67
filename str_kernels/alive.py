"""One object of a class for the process, for as long as anybody keeps it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self


class SharedWhileAlive:
    """Base of what a process has one of; it goes, with what it set up, when nobody has it."""

    _alive: ClassVar[weakref.ref | None] = None

    @classmethod
    def shared(cls) -> Self:
        """The one that is alive, or a new one."""
        found = None if cls._alive is None else cls._alive()
        if found is None:
            found = cls()
            cls._alive = weakref.ref(found)
        return found

    def __deepcopy__(self, memo: dict) -> Self:
        return self
