"""Writes token files shard by shard, so that a killed run can be resumed."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import hashlib
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np

from fsq_jax.data import image_source
from fsq_jax.tokens import image_states
from fsq_jax.tokens import manifest as manifests
from fsq_jax.tokens import shards
from fsq_jax.tokens import summary
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import urls

_JOB = 'job.json'
_STOP = 'stop'
# Seconds between two requests to an object store for that file.
STOP_INTERVAL = 5.0


class Damage(NamedTuple):
  """An image that could not be read.

  Attributes:
    index: its number in the source.
    name: of the image.
    reason: why.
  """

  index: int
  name: str
  reason: str


class TokenWriter:
  """Writes the shards of a folder in any order, and last the manifest.

  A shard is done once its file has its final name and its record is in the
  folder of partial results, which is deleted after the manifest is written. All
  files depend on the images and the job alone.
  """

  def __init__(self, folder: pathlib.Path, job: manifests.Job):
    """Creates the folder, or resumes in a folder of the same job.

    Args:
      folder: from `workdir.files.run_folder`; new, empty, or of the same job.
      job: the job.

    Raises:
      ValueError: the folder holds something else, or cannot be written.
    """
    self.folder = folder
    self._job = job
    self._unfinished = folder / manifests.UNFINISHED
    self._lock = contextlib.ExitStack()
    self._is_stopped = False
    self._looked_at = -STOP_INTERVAL
    manifest = folder / manifests.FILE
    record = self._unfinished / _JOB
    for path in (manifest, record):
      if workdirs.is_file(path):
        manifests.check_same_job(path, job)
    self.is_finished = workdirs.is_file(manifest)
    if self.is_finished:
      return
    names = workdirs.list_names(folder)
    if names and manifests.UNFINISHED not in names:
      raise ValueError(
          f'{folder} holds {names[0]!r} but no token files; give a new folder'
          ' with --tokens.'
      )
    workdirs.create(self._unfinished, '--tokens', urls.STORES)
    if not workdirs.is_file(record):
      workdirs.write_json(record, job.to_json())

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """Locks the folder until `finish`; entered in one process, before writing.

    Raises:
      ValueError: another run is writing the folder, or has just finished it.
    """
    with self._lock:
      self._lock.enter_context(workdirs.lock(self._unfinished, '--tokens'))
      self._check_unfinished()
      workdirs.delete(self._unfinished / _STOP)
      yield

  def stop(self) -> None:
    """Requests all processes of this run to stop."""
    workdirs.write_bytes(self._unfinished / _STOP, b'')
    self._is_stopped = True

  @property
  def is_stopped(self) -> bool:
    """Whether a process has requested a stop."""
    now = time.monotonic()
    is_due = now - self._looked_at >= STOP_INTERVAL
    if is_due or not workdirs.is_remote(self._unfinished):
      self._looked_at = now
      self._is_stopped = workdirs.is_file(self._unfinished / _STOP)
    return self._is_stopped

  def is_done(self, shard: int) -> bool:
    """Whether a shard is written and not corrupted."""
    record = self._read(shard)
    path = self.folder / self._job.shard_file(shard)
    if (
        record is None
        or 'num_upscaled' not in record  # Earlier versions did not write it.
        or not workdirs.is_file(path)
    ):
      return False
    with workdirs.local_copy(path) as local:
      return shards.hash_file(local) == record['sha256']

  def damaged(self, shard: int) -> list[Damage]:
    """Returns the unreadable images of a finished shard."""
    return [Damage(*image) for image in self._read(shard)['damaged']]

  def states(self, shard: int) -> image_states.ImageStates | None:
    """Returns the image states of a finished shard; None without files."""
    return _parse_states(self._read(shard))

  def write(
      self,
      shard: int,
      examples: Sequence[shards.Example],
      *,
      damaged: Sequence[Damage],
      source_bytes: int | None,
      states: image_states.ImageStates | None = None,
      num_upscaled: int = 0,
  ) -> None:
    """Writes a shard; when this returns, it is on disk or in the store.

    Args:
      shard: its number.
      examples: the tokens of its images, in the order of the source.
      damaged: images that could not be read.
      source_bytes: size of the image files; None if unknown.
      states: states of all images, readable or not; None without files.
      num_upscaled: number of images that were scaled up.
    """
    path = self.folder / self._job.shard_file(shard)
    with workdirs.write_locally(path, self._unfinished) as temporary:
      shards.write(temporary, examples, self._job)
      num_bytes = temporary.stat().st_size
      digest = shards.hash_file(temporary)
    tokens = [x.tokens.reshape(-1) for x in examples]
    codes, counts = np.unique(
        np.concatenate([np.zeros(0, np.int32), *tokens]), return_counts=True
    )
    workdirs.write_json(
        self._record(shard),
        {
            'num_images': len(examples),
            'num_bytes': num_bytes,
            'sha256': digest,
            'damaged': damaged,
            'grids': sorted({x.tokens.shape[:2] for x in examples}),
            'num_pixels': sum(_num_pixels(x, self._job) for x in examples),
            'num_without_label': sum(x.label < 0 for x in examples),
            'num_upscaled': num_upscaled,
            'source_bytes': source_bytes,
            'grid_hashes': ''.join(_hash_grid(x.tokens) for x in examples),
            'digests': states and states.digests.tobytes().hex(),
            'stamps': states and states.stamps.tolist(),
            'codes': codes.tolist(),
            'counts': counts.tolist(),
        },
    )

  def finish(self, *, max_damaged_share: float = 1.0) -> None:
    """Writes the manifest after all shards are done.

    Args:
      max_damaged_share: largest allowed fraction of unreadable images, over all
        processes.

    Raises:
      ValueError: more images, or all, cannot be read, or another run has
        finished the folder.
    """
    if not self.is_finished:
      self._check_unfinished()
      manifest, states = self._gather()
      image_source.check_damaged_share(
          {image['name']: image['reason'] for image in manifest.damaged},
          self._job.source['num_examples'], max_damaged_share,
      )
      if states is not None:
        image_states.write(self.folder, states)
      path = self.folder / manifests.FILE
      with workdirs.write_locally(path, self._unfinished) as temporary:
        workdirs.write_json(temporary, manifest.to_json())
    self._lock.close()  # In an object store, the lock is in the folder.
    workdirs.delete_folder(self._unfinished)

  def _check_unfinished(self) -> None:
    """Checks that no other run has written the manifest meanwhile."""
    if workdirs.is_file(self.folder / manifests.FILE):
      raise ValueError(f'{self.folder} has just been finished by another run.')

  def _gather(
      self,
  ) -> tuple[manifests.Manifest, image_states.ImageStates | None]:
    """Summarizes the records, holding one at a time in memory."""
    grids, parts, damaged, states = set(), [], [], []

    def read_records() -> Iterator[Mapping[str, Any]]:
      for i in range(self._job.num_shards):
        record = self._read(i)
        states.append(_parse_states(record))
        grids.update(map(tuple, record['grids']))
        fields = (record[x] for x in ('num_images', 'num_bytes', 'sha256'))
        parts.append(manifests.Shard(self._job.shard_file(i), *fields))
        damaged.extend(
            {'name': name, 'reason': reason}
            for _, name, reason in record['damaged']
        )
        yield record

    result = summary.summarize(read_records(), self._job)
    whole = None if None in states else image_states.concatenate(states)
    manifest = manifests.Manifest(
        job=self._job,
        grid=grids.pop() if len(grids) == 1 else None,
        shards=tuple(parts),
        damaged=tuple(damaged),
        content_sha256=whole and whole.content_hash,
        summary=result,
    )
    return manifest, whole

  def _record(self, shard: int) -> pathlib.Path:
    return self._unfinished / f'{self._job.shard_file(shard)}.json'

  def _read(self, shard: int) -> dict[str, Any] | None:
    return workdirs.read_json(self._record(shard))


def _parse_states(
    record: Mapping[str, Any],
) -> image_states.ImageStates | None:
  if record['digests'] is None:
    return None
  digests = np.frombuffer(bytes.fromhex(record['digests']), np.uint8)
  stamps = np.array(record['stamps'], np.int64)
  return image_states.ImageStates(
      digests.reshape((-1, 32)), stamps.reshape((-1, 3))
  )


def _hash_grid(tokens: np.ndarray) -> str:
  """Hashes shape and values of the tokens of an image."""
  result = hashlib.blake2b(
      repr(tokens.shape).encode(), digest_size=summary.GRID_HASH_BYTES
  )
  result.update(tokens.astype('<i4').tobytes())
  return result.hexdigest()


def _num_pixels(example: shards.Example, job: manifests.Job) -> int:
  """Returns the number of pixels that the tokens of an image represent."""
  height, width = example.size if job.fit == 'pad' else job.image_size
  return height * width
