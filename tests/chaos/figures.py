"""Figures of the chaos suite: what a fault has cost, told on the terminal and kept for a table.

What enters: a run's folder after a fault, and the images that were to be done. What leaves: images
lost, duplicated and recomputed; a line on the terminal, whatever pytest captures; and with
ZSPLG_CHAOS_TABLE=FILE a line of JSON a trial, of which a table is made:

    ZSPLG_CHAOS_TIMES=3 ZSPLG_CHAOS_TABLE=t.jsonl pytest -n 0 tests/chaos
    python -m tests.chaos.figures t.jsonl

Folders are judged as anybody would read them, with a plain Parquet reader over each of their
folders, so that what the project's own code would overlook is counted all the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.dataset as pads
import pyarrow.fs as pafs

from zsplg_ray.rundir import Kind, RunFolder

TIMES = int(os.environ.get("ZSPLG_CHAOS_TIMES", "1"))
"""How many times each fault is tried."""
terminal: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
"""Within it stderr is the terminal; conftest.py lets pytest take its hands off."""
TITLES = ("fault", "times", "images", "lost", "duplicated", "recomputed", "seconds to recover")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What was tried and what it cost; numbers are sums over `times` trials."""

    fault: str
    """What was done, such as `kill -9 of the driver`."""
    times: int
    """How many times it was done."""
    images: int
    """Images of the runs it was done to (training: steps)."""
    lost: int
    """Images that stand nowhere in the end."""
    duplicated: int
    """Rows of images that stand somewhere already."""
    recomputed: int
    """Images that were started on more than once; each further time counts."""
    recover_s: float | None
    """From the fault to the first part that is committed after it, seconds; None: nothing broke."""
    note: str = ""
    """What else is to be said."""


def judge(
    folder: RunFolder, expected_ids: Collection[str], started: int | None
) -> tuple[int, int, int]:
    """Images lost, duplicated and recomputed in a folder where a run has finished.

    An image is there if it stands in errors/, or in labels/ and, if the run makes segments, in
    segments/ too.

    Args:
        folder: Of `zsplg label` or `zsplg predict`.
        expected_ids: Images that the run was given.
        started: How many times any actor began on an image (from the notes of a counting
            labeller); None: not known, then 0 are told as recomputed.

    Raises: AssertionError if images stand there that nobody has asked for.
    """
    run = folder.read_run()
    assert run is not None, f"{folder.uri} holds no run"
    kinds: tuple[Kind, ...] = ("segments", "labels", "errors")
    found = {kind: ids_in(folder, kind) for kind in kinds}
    done = set(found["labels"])
    commits: tuple[Kind, ...] = ("labels",)
    if run.get("verb", "label") == "label":
        done &= set(found["segments"])
        commits = ("segments", "labels")
    strangers = set().union(*found.values()) - set(expected_ids)
    assert not strangers, f"images that nobody asked for: {sorted(strangers)[:5]}"
    lost = len(set(expected_ids) - done - set(found["errors"]))
    # Errors count beside each commit, for an image may stand in one of the two only.
    twice = [Counter(found[kind]) + Counter(found["errors"]) for kind in commits]
    duplicated = sum(sum(ids.values()) - len(ids) for ids in twice)
    if started is None:
        return lost, duplicated, 0
    return lost, duplicated, started - len(done) - _failed_in_an_actor(folder)


def ids_in(folder: RunFolder, kind: Kind) -> list[str]:
    """The image ids of all rows of one kind, as any reader of Parquet folders finds them."""
    return [row["image_id"] for row in _rows(folder, kind, ["image_id"])]


def _failed_in_an_actor(folder: RunFolder) -> int:
    """Rows of errors/ of images that came as far as a model."""
    return sum(row["stage"] not in ("read", "decode") for row in _rows(folder, "errors", ["stage"]))


def _rows(folder: RunFolder, kind: Kind, columns: list[str]) -> list[dict[str, str]]:
    path = f"{folder.path}/{kind}"
    if folder.fs.get_file_info(path).type != pafs.FileType.Directory:
        return []
    files = pads.dataset(path, filesystem=folder.plain_fs, format="parquet")
    return files.to_table(columns=columns).to_pylist() if files.count_rows() else []


def tell(fault: Fault) -> None:
    """Print a fault's figures to the terminal, and keep them if ZSPLG_CHAOS_TABLE names a file."""
    line = "; ".join(f"{v} {k}" for k, v in zip(TITLES[2:], _cells([fault])[2:], strict=True))
    note = f" ({fault.note})" if fault.note else ""
    with terminal():
        print(f"\nchaos: {fault.fault}, {fault.times} x: {line}{note}", file=sys.stderr, flush=True)
    if table := os.environ.get("ZSPLG_CHAOS_TABLE"):
        with Path(table).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(fault)) + "\n")


def settle(
    folder: RunFolder,
    ids: Collection[str],
    started: int,
    fault: str,
    times: int,
    recover_s: float | None,
    note: str = "",
) -> Fault:
    """Judge a folder, tell the figures, and see that nothing is lost and nothing twice."""
    lost, duplicated, recomputed = judge(folder, ids, started)
    told = Fault(
        fault=fault,
        times=times,
        images=len(ids),
        lost=lost,
        duplicated=duplicated,
        recomputed=recomputed,
        recover_s=recover_s,
        note=note,
    )
    tell(told)
    assert (lost, duplicated) == (0, 0), told
    return told


def _cells(trials: list[Fault]) -> list[str]:
    """A row of the table: sums over trials of one fault, and the usual time and the worst."""
    names = ("times", "images", "lost", "duplicated", "recomputed")
    sums = [f"{sum(getattr(trial, name) for trial in trials):,}" for name in names]
    seconds = sorted(t.recover_s for t in trials if t.recover_s is not None)
    usual = f"{statistics.median(seconds):.1f}" if seconds else "-"
    if len(seconds) > 1:
        usual += f" (worst {seconds[-1]:.1f})"
    return [trials[0].fault, *sums, usual]


def markdown(trials: Iterable[Fault]) -> str:
    """A table with one row a fault, in the order in which they were first tried."""
    by_fault: dict[str, list[Fault]] = {}
    for trial in trials:
        by_fault.setdefault(trial.fault, []).append(trial)
    rows = [list(TITLES), ["--", *["--:"] * (len(TITLES) - 1)]]
    rows += [_cells(same) for same in by_fault.values()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    with Path(sys.argv[1]).open(encoding="utf-8") as kept:
        sys.stdout.write(markdown(Fault(**json.loads(line)) for line in kept) + "\n")
