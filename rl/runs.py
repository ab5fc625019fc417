"""Files and folders of a run: atomic writes, stage folders, the lock, checkpoints. Standard library only.

Three rules hold everywhere:

* A file appears under its name only when it is whole: it is written beside, synced, and renamed.
* A stage folder is `<stage>-<hash8>.partial` while it is written. Its `manifest.json`, with a sha256 per file, comes
  last; then the folder is renamed to `<stage>-<hash8>`. A folder without a manifest does not exist.
* What is finished is never overwritten.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rl.faults import fault

MANIFEST = "manifest.json"
CARD = "README.md"  # of a model folder, as the hub reads it
CHECKPOINTS = "checkpoints"
CHECKPOINT_HASHES = "checkpoint.json"


class RunLocked(RuntimeError):
    """Another process runs in this folder; the message names it."""


class DamagedFolder(ValueError):
    """A finished folder's files are not those that its manifest names."""


# --- one file ---------------------------------------------------------------------------------------------------------


def write_file(path: Path, data: str | bytes, site: str) -> None:
    """Write `path` atomically: a reader sees the old file or the whole new one, after a crash too.

    `site` is the fault point between the synced temporary file and its rename. On a full or broken disk the temporary
    file is removed and the OSError's message names the path and the bytes that were needed.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            middle = len(content) // 2
            file.write(content[:middle])
            fault("write.temp")
            file.write(content[middle:])
            file.flush()
            os.fsync(file.fileno())
        fault(site)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno or errno.EIO,
            f"{error.strerror or error} while {len(content):,} bytes were written; free space there and run again",
            str(path),
        ) from error
    fault("write.rename")
    _sync_folder(path.parent)


def write_json(path: Path, value: Any, site: str) -> None:
    """Write `value` as indented JSON with sorted keys, atomically. ValueError for NaN and infinities."""
    try:
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: not written, its value is not JSON: {error}") from error
    write_file(path, text + "\n", site)


def read_json(path: Path) -> Any:
    """The value in `path`; ValueError that names the file where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


# --- logs of JSON lines -----------------------------------------------------------------------------------------------


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON object as a line and flush it.

    A line that an earlier kill tore off is removed first, so that the new one starts on a line of its own. A number
    that is not finite is written as null: a log must survive the step that it is there to explain.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False).encode("utf-8")
    with path.open("a+b") as file:
        _mend_end(file)
        file.write(line + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in `path`, one a line. A torn last line is left out; any other bad line is a ValueError.

    Example: `{"step": 1}\\n{"step": 2}\\n{"st` gives `[{"step": 1}, {"step": 2}]`.
    """
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop()  # what follows the last newline: nothing, unless the writer was killed
    values = [_parse_line(path, number, line) for number, line in enumerate(lines, 1)]
    if torn and (value := _object(torn)) is not None:
        values.append(value)
    return values


def rewind_lines(path: Path, step: int) -> None:
    """Keep the lines of a log with `"step" <= step`: what a run that goes on from a checkpoint has really done.

    Example: lines of steps 1, 2, 3, 4 and a checkpoint of step 2 leave steps 1 and 2. A missing file stays missing.
    """
    if not path.exists():
        return
    kept = [value for value in read_lines(path) if value["step"] <= step]
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in kept)
    write_file(path, text, "write.rewind")


def _mend_end(file: Any) -> None:
    """Make the file end in a newline: complete its last line if it is whole, cut it off if it is torn."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    content = file.read()
    start = content.rfind(b"\n") + 1
    if _object(content[start:]) is None:
        file.truncate(start)
    else:
        file.write(b"\n")


def _parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    value = _object(line)
    if value is None:
        raise ValueError(f"{path}:{number}: not a JSON object: {line[:80]!r}")
    return value


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


# --- hashes -----------------------------------------------------------------------------------------------------------


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hash(path: Path) -> dict[str, str]:
    """sha256 of every file below `path`: {name relative to it: 64 hex digits}, sorted by name, hidden ones left out.

    Example: a model folder gives `{"config.json": "5d41…", "model.safetensors": "9a0f…"}`.
    """
    return {name: file_hash(path / name) for name in _names(path)}


def model_hash(folder: Path) -> str:
    """One sha256 for a model folder's content, 64 hex digits. Its card counts for nothing: it is about the model."""
    files = folder_hash(folder)
    files.pop(CARD, None)
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def stage_hash(method: str, config: Mapping[str, Any], inputs: Mapping[str, str], version: str) -> str:
    """8 hex digits that change with anything that can change what a stage makes, and with nothing else.

    `config` is the resolved config as JSON values, `inputs` maps what the stage reads to the hash of it. The order of
    keys does not matter: `{"a": 1, "b": 2}` and `{"b": 2, "a": 1}` give one hash.
    """
    what = {"method": method, "config": config, "inputs": inputs, "version": version}
    text = json.dumps(what, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:8]


def versions(*more: str) -> dict[str, str | None]:
    """Versions of what made a folder, and of `more` packages, from their metadata; nothing is imported for it. None:
    not installed."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    names = ("reason", "torch", "transformers", "trl", *more)
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _names(path: Path, leave_out: Iterable[str] = ()) -> list[str]:
    """The files below `path`, relative, sorted, without hidden ones and without those under a name in `leave_out`."""
    left_out = set(leave_out)
    names = []
    for folder, folders, files in os.walk(path):
        here = Path(folder).relative_to(path)
        folders[:] = [name for name in folders if not name.startswith(".") and (here / name).as_posix() not in left_out]
        names += [(here / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(name for name in names if name not in left_out)


# --- the folder of a stage --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StageFolder:
    """The folder of one stage with one hash, partial or finished.

    Example: `StageFolder(Path("runs/tiny"), "teacher", "0a1b2c3d").final` is `runs/tiny/teacher-0a1b2c3d`.
    """

    root: Path  # runs/<recipe>
    stage: str
    hash: str  # of stage_hash

    @property
    def final(self) -> Path:
        return self.root / f"{self.stage}-{self.hash}"

    @property
    def partial(self) -> Path:
        return self.root / f"{self.stage}-{self.hash}.partial"

    @property
    def finished(self) -> bool:
        return (self.final / MANIFEST).is_file()

    def manifest(self) -> dict[str, Any]:
        """The manifest of the finished folder."""
        return read_json(self.final / MANIFEST)

    def open(self) -> Path:
        """The partial folder to write into: the one that a killed run left, so that it goes on there, or a new one."""
        if self.finished:
            raise ValueError(f"{self.final} is finished and is never overwritten")
        if self.final.exists():
            raise DamagedFolder(
                f"{self.final} has the name of a finished stage and no {MANIFEST}: move it away and run again"
            )
        self.partial.mkdir(parents=True, exist_ok=True)
        for leftover in self.partial.rglob(".*.tmp"):  # of write_file, killed before its rename
            leftover.unlink()
        return self.partial

    def commit(self, *, method: str, config: Mapping[str, Any], inputs: Mapping[str, str], seconds: float) -> Path:
        """Finish the partial folder: sync its files, write the manifest, rename, move the `<stage>.latest` pointer.

        Checkpoints serve only the unfinished stage: they are not in the manifest and go after the rename.
        """
        files = {}
        for name in _names(self.partial, leave_out=(CHECKPOINTS, MANIFEST)):
            files[name] = file_hash(self.partial / name)
            _sync(self.partial / name)
        manifest = {
            "stage": self.stage,
            "hash": self.hash,
            "method": method,
            "config": dict(config),
            "inputs": dict(inputs),
            "versions": versions(),
            "seconds": round(seconds, 3),
            "files": files,
        }
        write_json(self.partial / MANIFEST, manifest, "run.manifest")
        return self._rename()

    def recover(self) -> bool:
        """Finish what a kill left between the manifest and what follows the rename. True if the stage is finished."""
        if self.finished:
            self._after_rename()
            return True
        if (self.partial / MANIFEST).is_file():
            self._rename()
            return True
        return False

    def verify(self) -> None:
        """Compare the finished folder's files with its manifest; DamagedFolder names those that differ."""
        listed: dict[str, str] = self.manifest()["files"]
        present = _names(self.final, leave_out=(CHECKPOINTS, MANIFEST))
        wrong = [f"{name} is missing" for name in listed if name not in present]
        wrong += [f"{name} is not in the manifest" for name in present if name not in listed]
        wrong += [f"{n} has changed" for n in present if n in listed and file_hash(self.final / n) != listed[n]]
        if wrong:
            raise DamagedFolder(f"{self.final}: {'; '.join(wrong)}. Move the folder away and run again to make it anew")

    def _rename(self) -> Path:
        fault("run.rename")
        self.partial.rename(self.final)
        _sync_folder(self.root)
        self._after_rename()
        return self.final

    def _after_rename(self) -> None:
        pointer = self.root / f"{self.stage}.latest"
        if not pointer.is_file() or pointer.read_text(encoding="utf-8").strip() != self.final.name:
            write_file(pointer, self.final.name + "\n", "run.latest")
        shutil.rmtree(self.final / CHECKPOINTS, ignore_errors=True)


def latest_folder(root: Path, stage: str) -> Path | None:
    """The folder that was finished last under this stage's name, or None."""
    pointer = root / f"{stage}.latest"
    if not pointer.is_file():
        return None
    folder = root / pointer.read_text(encoding="utf-8").strip()
    return folder if (folder / MANIFEST).is_file() else None


# --- the lock ---------------------------------------------------------------------------------------------------------


class RunLock:
    """One run at a time in a folder: `with RunLock(root): ...`, else RunLocked, which names the holder.

    The kernel drops the lock when its process ends, however it ends, so that a killed run leaves none behind.
    """

    def __init__(self, root: Path) -> None:
        self.path = root / ".lock"
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise RunLocked(
                f"{self.path.parent} is in use by {self._holder()}: wait for that run, or stop it"
            ) from None
        self._descriptor = descriptor
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "start": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode("utf-8"), 0)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)  # this drops the lock; the file stays, removing it would race with a new holder
            self._descriptor = None

    def _holder(self) -> str:
        holder = _object(self.path.read_bytes())
        if holder is None:  # it has the lock and has not yet written who it is
            return "another process"
        return f"process {holder['pid']} on {holder['host']} (since {holder['start']})"


# --- checkpoints of a stage that can go on ----------------------------------------------------------------------------


def save_checkpoint(folder: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Save what `write` puts into a folder as the checkpoint of `step`, then delete the older ones.

    `folder` is the stage's partial folder. The checkpoint is written to `checkpoints/step-000020.tmp`, gets a
    `checkpoint.json` with a sha256 per file, and is renamed to `checkpoints/step-000020`.
    """
    final = folder / CHECKPOINTS / f"step-{step:06d}"
    temporary = final.with_name(final.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    fault("checkpoint.write")
    hashes = folder_hash(temporary)
    for name in hashes:
        _sync(temporary / name)
    write_json(temporary / CHECKPOINT_HASHES, {"step": step, "files": hashes}, "checkpoint.manifest")
    fault("checkpoint.commit")
    if final.exists():  # a damaged one of the same step: latest_checkpoint passed over it, so this step was done again
        shutil.rmtree(final)
    temporary.rename(final)
    _sync_folder(final.parent)
    fault("checkpoint.prune")
    for other in final.parent.iterdir():
        if other != final:
            shutil.rmtree(other)
    return final


def latest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """The newest checkpoint below a stage's partial folder that is complete and intact: (step, folder), or None."""
    found = {}
    for path in (folder / CHECKPOINTS).glob("step-*"):
        step = path.name.removeprefix("step-")
        if step.isdecimal():  # not a temporary name
            found[int(step)] = path
    return next(((step, found[step]) for step in sorted(found, reverse=True) if _intact(found[step])), None)


def _intact(checkpoint: Path) -> bool:
    try:
        listed = read_json(checkpoint / CHECKPOINT_HASHES)["files"]
    except (OSError, ValueError, KeyError):
        return False
    present = folder_hash(checkpoint)
    present.pop(CHECKPOINT_HASHES, None)
    return present == listed


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
