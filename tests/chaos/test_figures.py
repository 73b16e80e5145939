"""What counts as lost, duplicated and recomputed, on folders made by hand."""

import contextlib
import functools
import json

import pyarrow as pa
import pytest

from tests.chaos import figures
from tests.chaos.figures import Fault, judge, markdown, tell
from zsplg_ray.rundir import RunFolder


def folder(path, verb="label", **ids):
    """A folder with those ids in its kinds, one part for each list."""
    made = RunFolder(str(path))
    keys = {k: {} for k in ("config", "resolved", "classes", "weights", "labels_state")}
    made.write_run({**keys, "verb": verb})
    for kind, parts in ids.items():
        for i, part in enumerate(parts):
            table = pa.table({"image_id": part, "stage": ["label"] * len(part)})
            made.write_part(kind, f"part-{i:020x}", table, {})  # type: ignore[arg-type]
    return made


def test_everything_once(tmp_path):
    done = [["a", "b"], ["c"]]
    made = folder(tmp_path, labels=done, segments=done, errors=[["d"]])
    assert judge(made, ["a", "b", "c", "d"], None) == (0, 0, 0)
    assert judge(made, {"a", "b", "c", "d"}, 7) == (0, 0, 3)


def test_what_stands_in_one_of_two_places_is_lost(tmp_path):
    made = folder(tmp_path / "run", labels=[["a", "b"]], segments=[["b", "c"]])
    assert judge(made, "abcd", None) == (3, 0, 0)
    made = folder(tmp_path / "predicted", verb="predict", labels=[["a", "b"]])
    assert judge(made, "abcd", None) == (2, 0, 0)


def test_what_stands_twice_counts_each_time(tmp_path):
    made = folder(tmp_path / "parts", labels=[["a"]], segments=[["a"], ["a", "b"], ["a"]])
    assert judge(made, "ab", None)[1] == 2
    made = folder(tmp_path / "both", labels=[["a"]], segments=[["a"]], errors=[["a"]])
    assert judge(made, "a", None)[1] == 2
    made = folder(tmp_path / "half", verb="predict", labels=[["a"]], errors=[["b"], ["b"]])
    assert judge(made, "ab", None)[1] == 1


def test_strangers_are_told(tmp_path):
    made = folder(tmp_path, labels=[["a", "z"]], segments=[["a", "z"]])
    with pytest.raises(AssertionError, match="nobody asked for"):
        judge(made, "a", None)


def test_a_table_of_all_trials(tmp_path, monkeypatch):
    monkeypatch.setenv("ZSPLG_CHAOS_TABLE", str(tmp_path / "t.jsonl"))
    monkeypatch.setattr(figures, "terminal", contextlib.nullcontext)
    once = functools.partial(Fault, times=1, images=1000, lost=0, duplicated=0)
    tell(once(fault="kill -9", recomputed=3, recover_s=2.0))
    tell(once(fault="disk full", recomputed=0, recover_s=None))
    tell(once(fault="kill -9", recomputed=4, recover_s=9.04, note="two at once"))
    kept = [Fault(**json.loads(line)) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert markdown(kept).splitlines()[2:] == [
        "| kill -9 | 2 | 2,000 | 0 | 0 | 7 | 5.5 (worst 9.0) |",
        "| disk full | 1 | 1,000 | 0 | 0 | 0 | - |",
    ]


def test_figures_are_seen_though_pytest_captures(monkeypatch, capfd):
    monkeypatch.delenv("ZSPLG_CHAOS_TABLE", raising=False)
    told = "a line of the suite's own test"
    fault = Fault(fault=told, times=0, images=0, lost=0, duplicated=0, recomputed=0, recover_s=None)
    tell(fault)
    assert capfd.readouterr().err == "", "it has gone to the terminal"
    monkeypatch.setattr(figures, "terminal", contextlib.nullcontext)
    tell(fault)
    assert told in capfd.readouterr().err, "and is captured without pytest's help"
