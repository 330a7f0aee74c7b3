"""Checkpoints that are either complete or not there.

Detectron2 writes ``model_final.pth`` and ``last_checkpoint`` in place. A process that is killed
while it does leaves half a file behind, under a name that the next ``--resume`` trusts: the final
checkpoint of a run that is prolonged is overwritten while ``last_checkpoint`` names it, and
``last_checkpoint`` itself is empty for a moment at every save.
"""

import contextlib
import os
from typing import IO, Any, Iterator

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a temporary file that takes the place of ``path`` if the context ends without error.

    At every moment, and after a crash of the machine too, ``path`` is the old file or the new one.
    The temporary file is ``path`` with ``.tmp`` behind it; one that a killed process has left is
    overwritten by the next.

    Args:
        path: a local path.
        mode: "w" or "wb".
    """
    temporary = path + ".tmp"
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


class AtomicCheckpointer(DetectionCheckpointer):
    """A :class:`detectron2.checkpoint.DetectionCheckpointer` whose files appear when they are
    complete. It reads and writes the same files; only local folders are protected."""

    def __init__(self, model: nn.Module, save_dir: str = "", **kwargs: Any) -> None:
        """
        Args:
            model, save_dir, kwargs: those of DetectionCheckpointer.
        """
        super().__init__(model, save_dir, **kwargs)
        self.path_manager = _AtomicPathManager(self.path_manager)


class _AtomicPathManager:
    """An iopath PathManager that opens local files for writing by :func:`atomic_write`."""

    def __init__(self, path_manager: Any) -> None:
        self._path_manager = path_manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._path_manager, name)

    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        if mode in ("w", "wb") and "://" not in path:
            return atomic_write(path, mode)
        return self._path_manager.open(path, mode, **kwargs)
