"""Floor 4: durable state on disk, and the only door to aiofiles.

A record is one file. It is replaced whole or not at all: what is read is always what one save wrote. A save is one
hop to a thread (a hop per system call takes over twice as long), and no symlink is followed on the way. Its directory
is opened once, and written to wherever its path leads meanwhile. What others write into a record stays: each save
starts from what is on disk.

Beside the record ``NAME``:

- ``.NAME.lock`` is there while somebody keeps the record, from ``Record.open`` to ``Record.close``. Its lock
  (``flock``), which the kernel drops if the keeper dies, is what counts; that it exists says nothing.
- ``.NAME.<8 hex digits>.tmp`` is a save under way; its writer holds a lock on it too, also once it is the record.
  ``Record.open`` removes those that nobody holds.

A ``DomainConfig`` is any domain document, changed for the next boot under the same lock.
"""
