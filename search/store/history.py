"""The history of a run: an append-only log of events, which is the checkpoint.

A folder:

    000002.arrows                          live segment: an event is appended and synced as it happens
    part-000000.parquet part-000001...     sealed segments, listed with hashes in manifest.json
    manifest.json
    items/ scores/                         lists of item ids; scores of trials with many items
    torn/                                  what crashes left half-written, kept in case it is wanted
    lock                                   held by the one writer

`search.store.columns` describes the columns. Anyone can read it:

    python -c "from search.store.history import read_table as read; print(read('RUN/history').to_pandas())"
    python -c "import pandas; print(pandas.read_parquet('RUN/history/part-000000.parquet'))"
    python -c "import pyarrow; print(pyarrow.ipc.open_stream('RUN/history/000000.arrows').read_all())"
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from search.errors import HistoryError
from search.store import segment
from search.store.atomic import explained, make_folder, sweep, sync_folder
from search.store.columns import decode, encode, schema
from search.store.contents import live_path, read_contents, read_once
from search.store.events import Event
from search.store.lock import LOCK, FileLock
from search.store.parts import Part, part_path, save_manifest, write_part
from search.store.segment import TORN, Segment, read_bounded, scan
from search.store.side_files import SideFiles

if TYPE_CHECKING:
    import pyarrow as pa

EVENTS_PER_SEGMENT = 500
INLINE_VALUES = 4096


class History:
    """The events of a run, on disk. Not for several threads at once. Use `History.open`.

    Attributes:
        folder: where it is.
        recovered: what was cut from the end when it was opened for writing, and where that is kept; None
            when the last writer had finished its last append. A reader cuts nothing: always None.
    """

    def __init__(self, folder: Path, events_per_segment: int, inline_values: int) -> None:
        self.folder = folder
        self.events_per_segment = events_per_segment
        self.recovered: str | None = None
        self._side = SideFiles(folder, inline_values)
        self._lock: FileLock | None = None
        self._live: Segment | None = None
        self._parts: list[Part] = []
        self._rows = 0
        self._broken = False

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        writable: bool = True,
        events_per_segment: int = EVENTS_PER_SEGMENT,
        inline_values: int = INLINE_VALUES,
    ) -> History:
        """Open a history; one that is opened for writing is created when it is not there.

        Everything is verified: hashes of parts, checksums of records. A torn end is cut (see
        `recovered`). A reader never changes a file and may look while a writer works.

        Args:
            events_per_segment: the live segment is sealed when it has this many.
            inline_values: trials with more scores than this put them into a file of their own.

        Raises:
            HistoryError: damage that is not a torn end; a folder that is not there (reading).
            RunError: another process writes it.
        """
        history = cls(Path(folder), events_per_segment, inline_values)
        if not writable:
            history._rows = read_contents(history.folder).rows
            return history
        with explained(f"{history.folder}: cannot open the history for writing"):
            make_folder(history.folder)
            history._lock = FileLock(history.folder / LOCK, f"history {history.folder}")
            history._lock.acquire()
            try:
                history._take_over()
            except BaseException:
                history.close()
                raise
        return history

    def _take_over(self) -> None:
        """Bring the folder from whatever a crash left into order, and open the live segment."""
        sweep(self.folder)
        self._side.sweep()
        contents = read_once(self.folder)
        self._parts = contents.parts
        index = len(self._parts)
        path = live_path(self.folder, index)
        whole_bytes, rows, appendable = 0, 0, True
        if (live := contents.live) is not None:
            whole_bytes, rows, appendable = live.whole_bytes, live.table.num_rows, live.appendable
            if live.torn_bytes:
                kept = segment.cut_tail(path, contents.live_data, live)
                self.recovered = (
                    f"cut {live.torn_bytes} bytes off the end of {path}, an append that never finished; "
                    f"{contents.rows} events are whole; the bytes are kept in {kept}"
                )
            elif not whole_bytes:
                self.recovered = f"{path} was empty; {contents.rows} events are whole"
        if not whole_bytes or not (rows or appendable):
            segment.create(path)
            whole_bytes, appendable = path.stat().st_size, True
        self._live = Segment(path, whole_bytes, rows)
        self._finish_sealing(index)
        if not appendable:  # begun by an older Meiosis, whose records had fewer columns
            self.seal()

    def _finish_sealing(self, index: int) -> None:
        """What counts is the live segment until the manifest lists its part, and then the part."""
        unlisted = part_path(self.folder, index)
        if unlisted.exists():
            make_folder(self.folder / TORN)
            unlisted.replace(self.folder / TORN / unlisted.name)
        if index:
            live_path(self.folder, index - 1).unlink(missing_ok=True)
        sync_folder(self.folder)

    def append(self, event: Event) -> None:
        """Record an event; it is durable on return. Raises as `append_all` does."""
        self.append_all((event,))

    def append_all(self, events: Sequence[Event]) -> None:
        """Record events in their order, with one sync for all; they are durable on return.

        A crash before that leaves the first of them, or none.

        Raises:
            HistoryError: the disk is full or fails. Those events that would be in one segment with the first
                that failed are not recorded, what was written of them is taken back, and this object takes no more.
            ValueError: scores whose shape does not fit their items; of its segment nothing is recorded.
        """
        rest = list(events)
        while rest:
            live = self._writable()
            with self._failing_for_good(f"cannot write event {len(self)}"):
                if live.rows >= self.events_per_segment:
                    self.seal()
                    live = self._writable()
                room = self.events_per_segment - live.rows
                together, rest = rest[:room], rest[room:]
                first = len(self)
                records = [encode(one, first + place, self._side, place) for place, one in enumerate(together)]
                live.append(b"".join(records), len(records))

    def seal(self) -> None:
        """Turn the live segment into a Parquet part and begin the next one.

        `append` does it when the segment is full; at the end of a run it makes the history readable by
        tools that know Parquet only. The segment goes after its part and the manifest are durable.
        Raises HistoryError as `append` does.
        """
        live = self._writable()
        if not live.rows:
            return
        self._broken = True  # until all is done: appends to a segment whose part is listed would be lost
        with self._failing_for_good(f"cannot seal {live.path.name}"):
            index = len(self._parts)
            found = scan(live.path, read_bounded(live.path), self._sealed_rows)
            if found.torn_bytes or found.table.num_rows != live.rows:
                raise HistoryError(
                    f"{live.path} changed under the run: {found.table.num_rows} whole events, "
                    f"expected {live.rows}; stop what else writes it and resume the run"
                )
            parts = [*self._parts, write_part(self.folder, index, found.table)]
            save_manifest(self.folder, parts)
            path = live_path(self.folder, index + 1)
            segment.create(path)
            self._parts, self._live = parts, Segment(path, path.stat().st_size, 0)
            live.close()
            live.path.unlink()
            sync_folder(self.folder)
        self._broken = False

    def _writable(self) -> Segment:
        if self._broken:
            raise HistoryError(f"{self.folder}: an earlier write failed, so the history takes no more; resume the run")
        if self._live is None:
            raise HistoryError(f"{self.folder}: the history is not open for writing")
        return self._live

    @contextmanager
    def _failing_for_good(self, what: str) -> Iterator[None]:
        try:
            with explained(f"{self.folder}: {what}"):
                yield
        except HistoryError:
            self._broken = True
            raise

    def events(self) -> list[Event]:
        """All events in order, read and verified from disk. Raises HistoryError."""
        return list(self)

    def __iter__(self) -> Iterator[Event]:
        for table in read_contents(self.folder).all_tables:
            yield from decode(table, self._side)

    def __len__(self) -> int:
        """Number of events; of a reader, when it was opened."""
        return self._sealed_rows + self._live.rows if self._live else self._rows

    @property
    def _sealed_rows(self) -> int:
        return self._parts[-1].last_seq + 1 if self._parts else 0

    def digest(self) -> str:
        """sha256 over what is deterministic in all events, in order."""
        return digest(self)

    def close(self) -> None:
        """Release the files. May be called twice."""
        if self._live is not None:
            self._rows = len(self)
            self._live.close()
            self._live = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> History:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def digest(events: Iterable[Event]) -> str:
    """sha256 over what is deterministic in `events`, in order; 64 hex digits."""
    total = hashlib.sha256()
    for event in events:
        text = json.dumps(event.deterministic(), default=bytes.hex, separators=(",", ":"))
        total.update(text.encode() + b"\n")
    return total.hexdigest()


def read_table(folder: Path | str) -> pa.Table:
    """All events of a history as one table, verified; see `search.store.columns`. Changes nothing.

    Raises:
        HistoryError: no history there, or damage.
    """
    import pyarrow as pa

    nothing = pa.Table.from_batches([], schema())
    return pa.concat_tables([nothing, *read_contents(Path(folder)).all_tables])
