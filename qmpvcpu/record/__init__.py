"""Floor 5: durable state on disk, and the only door to aiofiles.

A record is one file, replaced whole or not at all: a reader sees what one save wrote. A save is one hop to a
thread (a hop per system call takes over twice as long) and follows no symlink. The directory is opened once, and
written to even if its path leads elsewhere meanwhile. What others write into a record stays: each save starts from
what is on disk.

Next to the record ``NAME``:

- ``.NAME.lock`` exists while a record is open, from ``Record.open`` to ``Record.close``. Its lock (``flock``), which
  the kernel drops if the process dies, is what counts; the file alone means nothing.
- ``.NAME.<8 hex digits>.tmp`` is a save under way. Its writer holds a lock on it, and keeps that once the file is the
  record. ``Record.open`` removes those that nobody holds.

A ``DomainConfig`` is any domain document, changed for the next boot under the same lock.
"""
