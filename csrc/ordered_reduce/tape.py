"""`record` and `replay`: the tickets of order "arrival", written to a file and given back.

A tape is a gzip file: a line of JSON, then for every sum, in the order in which they were made, a `Sum` and the tickets
of its stretches of 32 outputs: the groups of the first stretch as they arrived, those of the second, and so on. A Sum
is terms, groups, op and step in 8, 8, 4 and 8 bytes, the number of its dtype in _DTYPES and that of its dimensions in
one each, and these in 8 each; groups are numbered in one byte where there are at most 256, else in four. All is
little-endian.
"""

import contextlib
import gzip
import json
import os
import struct
import threading
import typing
import zlib

import numpy as np
import torch

STRETCH = 32   # consecutive outputs that share their tickets: kStretch of ../order.h
HEADER = {"format": "ordered_reduce tape", "version": 2, "stretch": STRETCH}
_DTYPES = ("float32", "float64", "float16", "bfloat16")
_WAITING = 1 << 20   # bytes that are compressed at once

_tape = None   # the open one. The process has one, for a backward pass runs in threads of its own
_claim = threading.Lock()   # held while one is open, or about to be


class Sum(typing.NamedTuple):
    """What a tape knows a sum by."""
    shape: tuple   # of the result; of a weight gradient: the weight's
    dtype: str
    terms: int     # of one output; for a weight gradient: samples
    groups: int
    op: int
    step: int

    def __str__(self):
        return (f"{self.dtype} outputs of shape {list(self.shape)}, of {self.terms} terms (in a weight gradient: "
                f"samples) in {self.groups} groups, op {self.op}, step {self.step}")


_SUM = struct.Struct("<QQIqBB")


def stretches(outputs):
    return -(-outputs // STRETCH)


def _number(groups):
    return np.dtype("u1" if groups <= 256 else "<i4")


class _Recorder:
    """Writes members of a gzip file. What an interrupt leaves half done is done again: `state` is what has been done,
    the end of the last whole member and the bytes after it, and changes at once."""
    writes = True

    def __init__(self, path, file):
        self.path, self.file, self.lock = path, file, threading.Lock()
        self.state = 0, bytearray(json.dumps(HEADER).encode() + b"\n")
        self.flush()

    def write(self, entry, tickets):
        head = _SUM.pack(*entry[2:], _DTYPES.index(entry.dtype), len(entry.shape))
        data = head + struct.pack(f"<{len(entry.shape)}Q", *entry.shape)
        data += tickets.cpu().numpy().astype(_number(entry.groups)).tobytes()
        with self.lock:
            self.state[1].extend(data)
            if len(self.state[1]) >= _WAITING:
                self.flush()

    def flush(self):
        end, waiting = self.state
        self.file.seek(end)
        self.file.write(gzip.compress(waiting, 6))
        self.file.truncate()
        self.state = self.file.tell(), bytearray()


class _Player:
    writes = False

    def __init__(self, path, file):
        self.path, self.file, self.count, self.lock = path, gzip.GzipFile(fileobj=file), 0, threading.Lock()
        self.failed = None   # why, from where on the rest of the file means nothing
        try:
            header = json.loads(self._bytes())
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"path must be a tape of ordered_reduce.record; {path} is none, or broken") from error
        if header != HEADER:
            raise ValueError(f"path must be a tape of {HEADER}; {path} is of {header}")

    def _bytes(self, count=None, or_none=False):
        """The next bytes, or the first line."""
        try:
            data = self.file.readline() if count is None else self.file.read(count)
            if count and len(data) < count and not (or_none and not data):
                raise EOFError("it ends within the next one")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise RuntimeError(f"the tape {self.path} is broken after sum {self.count}: {error}") from error
        return data

    def read_entry(self):
        """The next Sum, or None at the end."""
        data = self._bytes(_SUM.size, or_none=True)
        if not data:
            return None
        *numbers, dtype, dimensions = _SUM.unpack(data)
        shape = struct.unpack(f"<{dimensions}Q", self._bytes(8 * dimensions)) if dimensions else ()
        return Sum(shape, _DTYPES[dtype] if dtype < len(_DTYPES) else "unknown", *numbers)

    def read(self, entry, tickets):
        with self.lock:
            if self.failed:
                raise RuntimeError(self.failed)
            try:
                tickets.copy_(self._read(entry, tickets))
            except BaseException as error:
                self.failed = str(error) or f"the replay of {self.path} was interrupted in sum {self.count + 1}"
                raise
            self.count += 1

    def _read(self, entry, tickets):
        recorded = self.read_entry()
        if recorded is None:
            raise RuntimeError(f"the tape {self.path} ends after {self.count} sums, but this run makes another: "
                               f"{entry}")
        if recorded != entry:
            raise RuntimeError(f"the tape {self.path} is of another model, batch size, number of splits or course of "
                               f"training: its sum {self.count + 1} has {recorded}; this run's has {entry}")
        number = _number(entry.groups)
        data = self._bytes(tickets.numel() * number.itemsize)
        given = torch.from_numpy(np.frombuffer(data, number).astype(np.int32)).view(tickets.shape)
        if not torch.equal(given.sort(1)[0], torch.arange(entry.groups, dtype=torch.int32).expand_as(given)):
            raise RuntimeError(f"the tape {self.path} is broken in sum {self.count + 1}: its tickets are not a "
                               f"permutation of {entry.groups} groups")
        return given

    def finish(self):
        """After a run that raised nothing: raises where a sum of it failed, or the tape holds more."""
        if self.failed:
            raise RuntimeError(self.failed)
        if (left := self.read_entry()) is not None:
            raise RuntimeError(f"the tape {self.path} has more sums than the {self.count} of this run; the next has "
                               f"{left}")


def is_open():
    return _tape is not None


def given(entry, tickets):
    """Under replay, fills in the recorded tickets and returns True."""
    if _tape is None or _tape.writes:
        return False
    _tape.read(entry, tickets)
    return True


def keep(entry, tickets):
    """Under record, writes the tickets down."""
    if _tape is not None:
        _tape.write(entry, tickets)


def _leave_to_parent():
    """In a forked process: the tape stays the parent's, and what waits in the copies of its buffers goes nowhere."""
    global _tape, _claim
    _claim = threading.Lock()
    if _tape is not None:
        os.dup2(os.open(os.devnull, os.O_RDWR), _tape.file.fileno())
        _tape = None


if hasattr(os, "register_at_fork"):   # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_leave_to_parent)


@contextlib.contextmanager
def _alone():
    claim = _claim   # a process that is forked meanwhile gets another
    if not claim.acquire(blocking=False):
        path = f" {_tape.path}" if _tape is not None else ""
        raise RuntimeError(f"the tape{path} is open already: record and replay cannot be nested")
    try:
        yield
    finally:
        claim.release()


@contextlib.contextmanager
def _opened(path, writes):
    global _tape
    with _alone(), open(path, "wb" if writes else "rb") as file:
        _tape = tape = (_Recorder if writes else _Player)(path, file)
        try:
            yield
            if not writes and _tape is tape:
                tape.finish()
        finally:
            mine, _tape = _tape is tape, None   # closed before a full disk is found out
            if writes and mine:
                tape.flush()


def record(path):
    """While open (`with record(path): ...`), all sums in order "arrival" write down the order of their groups, and so
    do the weight gradients of layers in that order, for a whole training run or any part of one.

    The file is compressed. A step of constnet.py's network on the digits (173,840 weights in 16 layers, 8 groups) took
    0.7 to 3.3 kB on two CPU cores, 44 kB before compression; orders with no pattern at all would take 18 kB. Every
    process needs a tape of its own; one that is forked meanwhile has none. What was recorded before an exception is a
    tape, too, and of a process that was killed what it had written, a megabyte (before compression) at a time. On a GPU
    every sum then waits for the device. For another `with`, call it again.

    Raises OSError where the file cannot be written, RuntimeError where a tape is open already.
    """
    return _opened(path, True)


def replay(path):
    """While open, sums in order "arrival" add their groups in the order that `record` wrote down instead of racing.

    The run repeats bit for bit only where PyTorch's own kernels, forward and backward, give the same bits again: the
    tape holds orders, not the numbers that are added. From the same start, where they do, other numbers of threads and
    other kinds of device make no difference, provided that the same sums are made in the same sequence (which models
    that train in several threads at once do not do).

    Raises ValueError where the file is no tape, OSError where it cannot be read, RuntimeError at the first sum that
    differs from the tape's in shape, dtype, terms (samples of the batch), groups, op or step, where the tape ends
    early, is broken, or holds more sums than were made, and where a tape is open already. After one such error all
    later sums raise it again, and so does the end of the `with`.
    """
    return _opened(path, False)
