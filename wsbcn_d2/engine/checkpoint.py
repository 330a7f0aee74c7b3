"""Checkpoint files that are either complete or not there: reading and writing.

Detectron2 writes ``model_final.pth`` and ``last_checkpoint`` in place. A process that is killed
while it does leaves half a file behind, under a name that the next ``--resume`` trusts: the final
checkpoint of a run that is prolonged is overwritten while ``last_checkpoint`` names it, and
``last_checkpoint`` itself is empty for a moment at every save.
"""

import contextlib
import os
from typing import IO, Any, Dict, Iterator, List, Optional

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..config import ConfigError
from ..weights.files import (
    SAFETENSORS,
    CheckpointError,
    cause_of,
    read_safetensors,
    unwrapped,
    without_wrappers,
)
from ..weights.training import as_options, differences, keys_of

_COUNTER = ".num_batches_tracked"
# Detectron2 reads files of these names in formats that this package does not write.
_FORMATS_OF_OTHERS = (".pkl", SAFETENSORS)


def check_output(path: str, source: str = "") -> None:
    """Finds out, before long work, whether a file can be written later; makes nothing.

    Args:
        path: the file to write; one that is there will be replaced.
        source: a file that is read, and must not be replaced.

    Raises:
        IsADirectoryError: if ``path`` is a folder, or names one by a "/" at its end, or is empty.
        NotADirectoryError: if what should be its folder, or one above, is a file.
        PermissionError: if the folder must not be written to.
        ValueError: if ``path`` is ``source``, or a device, or its name is that of another format.
    """
    if os.path.isdir(path) or not os.path.basename(path):
        raise IsADirectoryError(f"{path!r} is a folder; give a file to write")
    if path.endswith(_FORMATS_OF_OTHERS):
        raise ValueError(f"cannot write {path!r}: checkpoints are written as .pth")
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise ValueError(f"cannot write {path!r}: it is a device, or no regular file")
        if os.path.exists(source) and os.path.samefile(path, source):
            raise ValueError(f"{path!r} is the file to read; give another one to write")
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(folder) and folder != os.path.dirname(folder):  # a missing drive
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise NotADirectoryError(f"cannot write {path!r}: {folder!r} is not a folder")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write {path!r}: {folder!r} must not be written to")


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a temporary file that takes the place of ``path`` if the context ends without error.

    At every moment, and after a crash of the machine too, ``path`` is the old file or the new one.
    Its folder is made if it is not there.
    The temporary file is ``path`` with ``.tmp`` behind it; one that a killed process has left is
    overwritten by the next.

    Args:
        path: a local path.
        mode: "w" or "wb".
    """
    temporary = path + ".tmp"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, RuntimeError) and "inline_container" in str(error):
            # What torch.save makes of a full disk.
            raise OSError(f"cannot write {path!r}: is the disk full? ({error})") from error
        raise


class AtomicCheckpointer(DetectionCheckpointer):
    """A :class:`detectron2.checkpoint.DetectionCheckpointer` whose files appear when they are
    complete. It reads and writes the same files, and reads ``.safetensors`` and what was saved from
    within a wrapper (torch.compile, FSDP) or under another name than "model"; only local folders
    are protected.

    Loading raises ConfigError

    - if the file is no checkpoint, or only a part of one;
    - if it has no parameter of the model, which would stay random, or lacks some that are frozen;
    - if a convolution was trained with weight standardization, and that of the model is without;
    - if the file is of tools/convert_weights.py, for a config with other inputs, stride or poolers;
    - if a training is resumed with it that had another model, whose optimizer would fail with its
      first step.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, resumes: bool = False, **kwargs: Any
    ) -> None:
        """
        Args:
            model, save_dir, kwargs: those of DetectionCheckpointer.
            resumes: whether the model alone is loaded as for a training that is resumed.
        """
        super().__init__(model, save_dir, **kwargs)
        self._always_resumes = resumes
        self.path_manager = _AtomicPathManager(self.path_manager)

    def load(self, path: str, checkpointables: Optional[List[str]] = None) -> Dict[str, Any]:
        self._path = path
        everything = checkpointables is None and bool(self.checkpointables)
        self._resumes = everything or self._always_resumes
        try:
            return super().load(path, checkpointables)
        except ConfigError:
            raise
        except (AssertionError, OSError) as error:  # of Detectron2, if there is none
            raise ConfigError(f"{path!r} cannot be read: {error}") from error
        except (KeyError, ValueError) as error:
            if not self._resumes:
                raise ConfigError(f"{path!r}: {error}") from error
            raise ConfigError(self._not_resumable(str(error))) from error

    def _load_model(self, checkpoint: Dict[str, Any]) -> Any:
        names = list(checkpoint["model"])
        trained_with = checkpoint.get("trained_with", {})
        incompatible = super()._load_model(checkpoint)
        lacking = {*incompatible.missing_keys, *(key for key, *_ in incompatible.incorrect_shapes)}
        parameters = dict(self.model.named_parameters())
        if parameters and lacking.issuperset(parameters):
            raise ConfigError(
                f"{self._path!r}: none of its {len(names)} entries ({', '.join(names[:3])}, ...) "
                f"is a parameter of the model ({', '.join(sorted(parameters)[:2])}, ...); "
                "tools/convert_weights.py reads the names of other projects"
            )
        more = list(filter(self._is_of_a_layer, incompatible.unexpected_keys))
        if self._resumes:
            wrong = [
                f"{key} has the shape {tuple(found)} there and {tuple(expected)} in the model"
                for key, found, expected in incompatible.incorrect_shapes
            ]
            missing = (k for k in incompatible.missing_keys if not k.endswith(_COUNTER))
            wrong += [f"it has no {key}" for key in missing]
            wrong += [f"it has {key}, and the model has not" for key in more]
            if wrong:
                raise ConfigError(self._not_resumable(f"{wrong[0]} ({len(wrong)} such entries)"))
        self._check_use(
            [key[: -len(".ws_eps")] for key in more if key.endswith(".ws_eps")],
            [name for name, p in parameters.items() if name in lacking and not p.requires_grad],
            differences(trained_with, keys_of(self.model)),
        )
        return incompatible

    def _check_use(
        self, standardized: List[str], frozen: List[str], inputs: Dict[str, Any]
    ) -> None:
        """Raises ConfigError where a model would run, and compute something else than it should.

        Args:
            standardized: convolutions whose filters are standardized in the checkpoint only.
            frozen: parameters that the checkpoint lacks and that are not trained.
            inputs: what the weights were trained with, where the model has something else.
        """
        if standardized:
            raise ConfigError(
                f"{self._path!r}: {len(standardized)} convolutions were trained with weight "
                f"standardization and are without in the model, the first of them "
                f"{standardized[0]}: use a config with '+WS'"
            )
        if frozen:
            raise ConfigError(
                f"{self._path!r} lacks {len(frozen)} frozen parameters of the model, the first of "
                f"them {frozen[0]}: nothing would train them; set MODEL.BACKBONE.FREEZE_AT 0"
            )
        if inputs:
            raise ConfigError(
                f"{self._path!r} was converted for another config, with {as_options(inputs)}: use "
                "these keys, or convert it for this config"
            )

    def _is_of_a_layer(self, key: str) -> bool:
        """Whether an entry belongs to a layer of the model, or to the norm of its convolution."""
        if key.endswith(_COUNTER):
            return False
        modules = dict(self.model.named_modules())
        owner = name = key.rpartition(".")[0]
        while name and name not in modules:
            name = name.rpartition(".")[0]
        if not name:  # the model itself has the mean and deviation of pixels
            return False
        if name != owner:
            return isinstance(modules[name], nn.Conv2d)
        own = (modules[name]._parameters, modules[name]._buffers)
        return any(t is not None for tensors in own for t in tensors.values())

    def _not_resumable(self, why: str) -> str:
        return (
            f"cannot resume from {self._path!r}, which is of another model or optimizer: {why}. "
            "Resume with the config that it was made with, or begin anew in another output folder "
            "with this file as the weights"
        )

    def _load_file(self, filename: str) -> Any:
        try:
            if filename.endswith(SAFETENSORS):
                content: Dict[str, Any] = {"model": read_safetensors(filename)}
            else:
                content = super()._load_file(filename)
            content["model"] = without_wrappers(unwrapped(content["model"]))
            return content
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        except OSError:
            raise
        except Exception as error:  # of many kinds: of zip, pickle, torch
            raise ConfigError(f"{filename!r} is not a checkpoint: {cause_of(error)}") from error


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


class CompleteCheckpointer(AtomicCheckpointer):
    """A checkpointer that refuses what Detectron2's only warns about.

    Loading raises ConfigError if entries of the model are missing in the checkpoint or have other
    shapes there, or if the checkpoint has more entries for a layer that the model has, as it has
    where the model was built with other norms: what is made of such a model would pass for that of
    the checkpoint. The checkpoint may have parts that the model lacks altogether, a mask head, say.
    """

    def _load_model(self, checkpoint: Dict[str, Any]) -> Any:
        incompatible = super()._load_model(checkpoint)
        wrong = [*incompatible.missing_keys, *(key for key, *_ in incompatible.incorrect_shapes)]
        # Of no use but to train BatchNorm, and older frozen ones have none.
        wrong = [key for key in wrong if not key.endswith(_COUNTER)]
        if wrong:
            raise ConfigError(
                f"{self._path!r}: {len(wrong)} entries of the model are missing in the checkpoint "
                f"or have other shapes there, the first of them {', '.join(wrong[:3])}"
            )
        more = [key for key in incompatible.unexpected_keys if self._is_of_a_layer(key)]
        if more:
            raise ConfigError(
                f"{self._path!r}: the checkpoint has {len(more)} entries more than the model for "
                f"layers of it, the first of them {', '.join(more[:3])}; the config's norms are "
                "not those that it was trained with"
            )
        return incompatible
