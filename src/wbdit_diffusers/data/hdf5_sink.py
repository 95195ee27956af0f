"""A file for HDF5 that survives a full disk."""

import fcntl
import os
from pathlib import Path


class HDF5Sink:
    """
    What h5py writes to, so that a write that fails raises in [`HDF5Sink.check`] and nowhere else. HDF5 does not
    survive one: it goes on with wrong numbers, and the process ends in a segmentation fault. From the first error on,
    nothing is written any more; what HDF5 wants back is there until the end, in memory.

    Args:
        path (`Path`): The file, made or written over.

    Raises:
        BlockingIOError: If another process is writing to it.
    """

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise BlockingIOError("another process is writing to it") from error
        os.ftruncate(self._file, 0)
        self._position = self._size = 0
        self._error: BaseException | None = None  # also a Ctrl-C that comes while HDF5 writes
        self._unwritten: list[tuple[int, bytes]] = []

    def check(self):
        """Raises what went wrong; else everything that HDF5 has flushed is on the disk."""
        if self._error is not None:
            raise self._error
        os.fsync(self._file)

    def close(self):
        os.close(self._file)

    # ==================== What HDF5 calls ====================

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def write(self, data) -> int:
        view, start = memoryview(data).cast("B"), self._position
        while self._position < start + len(view):
            rest = view[self._position - start :]
            if self._error is None:
                try:
                    self._position += os.pwrite(self._file, rest, self._position)
                    continue
                except BaseException as error:
                    self._error = error
            self._unwritten.append((self._position, bytes(rest)))
            self._position += len(rest)
        self._size = max(self._size, self._position)
        return len(view)

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        start, size = self._position, len(view)
        found = os.pread(self._file, size, start)
        view[: len(found)] = found
        view[len(found) :] = bytes(size - len(found))
        for offset, data in self._unwritten:
            first, last = max(start, offset), min(start + size, offset + len(data))
            if first < last:
                view[first - start : last - start] = data[first - offset : last - offset]
        self._position += size
        return size

    def read(self, size: int) -> bytes:
        buffer = bytearray(size)
        self.readinto(buffer)
        return bytes(buffer)

    def truncate(self, size: int):
        self._size = size
        if self._error is None:
            try:
                os.ftruncate(self._file, size)
            except BaseException as error:
                self._error = error

    def flush(self):
        """HDF5 asks for it often; what counts is `check`."""
