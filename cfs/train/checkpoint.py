"""Checkpoints of a run: written in the background, and there whole or not at all.

All ranks, on whichever node, must see one file system.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cfs.errors import MainRankError, UserError
from cfs.files import blaming, fsync
from cfs.ranks import Ranks
from cfs.train.manifest import (
    FileRecord,
    Manifest,
    complete_steps,
    latest,
    on_all,
    read_facts,
    step_name,
    verify,
)
from cfs.train.tensor_files import Staged, file_name, load, saved_tensors, stage, write_tensors

__all__ = ["Checkpoints", "latest", "load", "read_facts", "saved_tensors", "verify"]

WRITING_PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others to write their parts of a checkpoint."""


class Checkpoints:
    """The checkpoints of one run, under `directory`."""

    def __init__(self, directory: Path, ranks: Ranks, keep: int = 2) -> None:
        """keep  how many of the newest stay. Collective."""
        assert keep >= 1, "the one just written stays"
        self.directory = directory
        self.keep = keep
        self._ranks = _apart(ranks)
        self._writing: Future[None] | None = None
        self._last_step: int | None = None

    def save(
        self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], wait: bool = False
    ) -> None:
        """Copy everything to the host, and write it in the background. Collective.

        tensors  DTensors, which are cut anew on loading; or plain ones, alike on all ranks that
                 have the key. They may change as soon as this returns
        facts    JSON-able; rank 0's are kept
        wait     until the checkpoint stands

        One checkpoint is written at a time: this waits for the one before, and raises what it
        met. The step that was written last is not written again.
        """
        self.finish()
        if step != self._last_step:
            staged, noted = stage(tensors), json.dumps(facts)
            self._writing = _in_background(lambda: self._write(step, staged, noted))
        if wait:
            self.finish()

    @property
    def failed(self) -> bool:
        """Has a background write failed that `finish` has not raised yet? Not collective."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def poll(self) -> None:
        """Raise on this rank what the background write met. Not collective, and costs nothing.

        Ranks may come to know some steps apart. To stop them together, with rank 0 alone to
        speak, let `failed` ride on a sum that each step makes anyway, and call `finish`.
        """
        if self.failed:
            try:
                self.finish()
            except MainRankError as error:
                raise UserError(str(error)) from error

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and raise what it met. Collective."""
        writing = self._writing
        if writing is None:
            return
        try:
            writing.result()
        finally:
            if writing.done():  # a signal may have ended the wait instead
                self._writing = None

    def _write(self, step: int, staged: Staged, facts: str) -> None:
        """In the background, on every rank: the files, the manifest, the final name."""
        ranks, final = self._ranks, self.directory / step_name(step)
        if ranks.device.type == "cuda":
            torch.cuda.set_device(ranks.device)  # a new thread is on device 0
        temporary = final.with_name(f".{final.name}.tmp")
        blamed = blaming(final, self._remedy(step))  # to decorate what a full disk can stop
        try:
            ranks.on_main(blamed(lambda: self._begin(temporary)))
            parts = on_all(blamed(lambda: _write_part(staged, temporary, ranks)), ranks)
            files = {name: record for part in parts for name, record in part.items()}
            manifest = Manifest(step, ranks.world_size, json.loads(facts), files)
            ranks.on_main(blamed(lambda: self._publish(temporary, final, manifest)))
        except UserError:
            if ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._last_step = step

    def _remedy(self, step: int) -> str:
        older = [path for number, path in complete_steps(self.directory).items() if number < step]
        if not older:
            return "free or mend the disk, and start again: there is no earlier checkpoint"
        return (
            f"free or mend the disk, and --resume goes on from {older[-1].name}, which still stands"
        )

    def _begin(self, temporary: Path) -> None:
        """Make an empty directory, and remove what killed runs left half done."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(".step-*"):
            shutil.rmtree(leftover)
        temporary.mkdir()

    def _publish(self, temporary: Path, final: Path, manifest: Manifest) -> None:
        """Add the manifest, give the directory its final name and remove what is too old."""
        unseen = manifest.files.keys() - {file.name for file in temporary.iterdir()}
        if unseen:
            raise UserError(
                f"{self.directory}: rank 0 does not see {min(unseen)}, which another rank wrote; "
                "give an --out on a file system that all nodes share"
            )
        manifest.write(temporary)
        fsync(temporary)
        replaced = _aside(final)
        if final.exists():
            final.rename(replaced)
        try:
            temporary.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        fsync(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        older = [path for n, path in complete_steps(self.directory).items() if n < manifest.step]
        for path in older[: max(0, len(older) + 1 - self.keep)]:
            shutil.rmtree(path.rename(_aside(path)))  # a kill meanwhile leaves no half step-*


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _write_part(staged: Staged, directory: Path, ranks: Ranks) -> dict[str, FileRecord]:
    """Write this rank's file, if it has anything to write, and read back what is to be noted."""
    write_tensors(staged, directory, ranks)
    file = directory / file_name(ranks.rank)
    return {file.name: FileRecord.of(file)} if file.exists() else {}


def _apart(ranks: Ranks) -> Ranks:
    """The same ranks over a group of their own, as two threads must not share one. Collective."""
    if ranks.world_size == 1:
        return ranks
    group = dist.new_group(backend="gloo", timeout=WRITING_PATIENCE)
    assert isinstance(group, dist.ProcessGroup), "every rank is in the group of all"
    return replace(ranks, hosts=group)


def _in_background(function: Callable[[], None]) -> Future[None]:
    """Run in a daemon thread, which a pool's is not: one that hangs must let the process end."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # whatever it is, the main thread raises it
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future
