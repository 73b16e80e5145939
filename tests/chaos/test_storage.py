"""An object store that fails: 5 % of all requests, and for a while altogether."""

import time
from pathlib import Path

import pytest

from tests.chaos.figures import settle
from tests.chaos.runs import GOOD, LoadStudent
from tests.student.models import write_model
from zsplg_ray.rundir import RunFolder

pytestmark = pytest.mark.ray
KEYS = "test:test@"
"""In the addresses: the cluster's processes may have started before there was a store."""


def on_the_store(start_run, standing, bucket, proxy, count, *flags, **options):
    """A run whose images and folder are in a bucket, by way of a proxy."""
    out = bucket.uri("run", proxy, keys=KEYS)
    flags = ("--actors.cpus", "1", *flags)
    run = start_run(standing, [GOOD] * count, *flags, out=out, **options)
    bucket.put(run.images, "images")
    run.images = bucket.uri("images", proxy, keys=KEYS)
    return run


def settle_run(run, fault: str, recover_s: float | None, started: int, note: str) -> None:
    """Judge the folder, which is on no disk, and tell the figures."""
    settle(run.folder, run.ids, started, fault, 1, recover_s, note)
    assert run.folder.read("errors") is None, "a failure of the store is no fault of an image"


def shown(proxy) -> str:
    return f"{proxy.failed.total()} of {proxy.asked.total()} requests failed"


def test_5_percent_of_all_requests_fail(standing, start_run, bucket, faulty, tmp_path, seed):
    """`label`, the same again, `relabel`, and `predict` with labels and model from the store."""
    with faulty(share=0.05, seed=seed) as proxy:
        run = on_the_store(start_run, standing, bucket, proxy, 60)
        run.start().end()
        settle_run(run, "5 % of storage requests fail: label", None, len(run.notes()), shown(proxy))
        started = len(run.notes())
        run.start().end()
        assert len(run.notes()) == started, "the same command again has nothing to do"
        relabel = ["--run", run.folder.uri, "--compose.min-similarity", "0.9", "--quiet"]
        run.other("relabel", *relabel, "--ray.address", standing).end()
        state = run.folder.read_run()
        assert state is not None and state["labels_state"] == "complete"
        names = run.folder.parts("labels")
        metas = [run.folder.part_meta("labels", name) for name in names]
        assert {m["labels_fingerprint"] for m in metas} == {state["labels_fingerprint"]}
        settle_run(run, "5 % of storage requests fail: relabel", None, started, shown(proxy))
        model = Path(write_model(tmp_path / "best.pt")).read_bytes()
        RunFolder(bucket.uri()).write_bytes("best.pt", model)
        flags = ("--model", bucket.uri("best.pt", proxy, keys=KEYS), "--fuse", run.folder.uri)
        predict = on_the_store(start_run, standing, bucket, proxy, 60, *flags)
        predict.folder = RunFolder(bucket.uri("predicted", proxy, keys=KEYS))
        predict.load = LoadStudent(predict.load.notes)
        predict.start().end()
        began = len(predict.notes())
        settle_run(predict, "5 % of storage requests fail: predict", None, began, shown(proxy))
    assert proxy.failed.total() > 10


def test_the_store_is_away_for_a_while(standing, start_run, bucket, faulty, seed):
    """For longer than its client tries by itself, which is 6 s; nobody has to start again."""
    with faulty(seed=seed) as proxy:
        options = {"seconds": 0.2}
        run = on_the_store(start_run, standing, bucket, proxy, 60, **options)
        driver = run.start()
        driver.wait_for(15)
        proxy.down = True
        went = time.time()
        driver.until(lambda: time.time() - went > 9)
        parts = len(bucket.files("run/segments"))
        proxy.down, back = False, time.time()
        driver.until(lambda: len(bucket.files("run/segments")) > parts)
        recover_s = time.time() - back
        driver.end()
        note = f"away for 9 s: {proxy.failed.total()} requests refused"
        settle_run(run, "storage away in the middle of a run", recover_s, len(run.notes()), note)
        assert proxy.failed["refused"] > 30
