"""What data sets that draw their samples share: captions written on demand, kinds of captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

from genscale.errors import ConfigError, did_you_mean

_Task = TypeVar("_Task", bound=str)


class WrittenCaptions(Sequence[str]):
    """Captions that are written when they are asked for.

    Args:
        count: their number.
        write: from a row, 0 to ``count - 1``, to its caption; an ``IndexError`` for any other.
    """

    def __init__(self, count: int, write: Callable[[int], str]) -> None:
        self._count = count
        self._write = write

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._write(index + len(self) if index < 0 else index)


def check_tasks(
    tasks: Sequence[_Task],
    known: tuple[_Task, ...],
    of: str = "",
) -> tuple[_Task, ...]:
    """Return the kinds of captions a data set was asked for.

    Args:
        tasks: their names.
        known: all names there are.
        of: whose kinds they are, for the error sentence, as " of moving sprites".

    Raises:
        ConfigError: an unknown kind, none, or one named twice.
    """
    for task in tasks:
        if task not in known:
            raise ConfigError(
                f"data.tasks names '{task}', which is no kind of caption{of} "
                f"({', '.join(known)}).{did_you_mean(task, known)}"
            )
    if not tasks or len(set(tasks)) < len(tasks):
        raise ConfigError(
            f"data.tasks=[{', '.join(tasks)}] must name one kind of caption or more, each once. "
            f"Choose from {', '.join(known)}."
        )
    return tuple(tasks)
