"""Places that are not there: a store that is away for good, a folder that nodes do not share."""

import time
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cluster.rigged import config
from tests.cluster.test_ledger import here
from zsplg_ray import filesystems
from zsplg_ray.cluster import pipeline
from zsplg_ray.cluster.actor import ImageActor
from zsplg_ray.cluster.decode import decode_block
from zsplg_ray.cluster.label import label
from zsplg_ray.cluster.progress import Progress
from zsplg_ray.filesystems import StoreError
from zsplg_ray.part_index import PartIndex
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import WorkError
from zsplg_ray.sources import MANIFEST
from zsplg_ray.storage import Place

IMAGES = 6


@pytest.fixture
def images(bucket, scenes):
    bucket.put(scenes / "JPEGImages", "images")
    return bucket


def manifest(bucket, proxy) -> pa.Table:
    """Images of the bucket by way of the proxy."""
    names = sorted(bucket.files("images"))[:IMAGES]
    uris = [Place.parse(bucket.uri("", proxy)).child(name).uri for name in names]
    return pa.table({"image_id": names, "uri": uris}, MANIFEST)


def read(table: pa.Table) -> list[str | None]:
    """Why each image could not be read."""
    return pa.concat_tables(decode_block(table, 10**6, here()))["error"].to_pylist()


def away(proxy):
    proxy.down = True


def expired(proxy):
    proxy.answer = (400, "ExpiredToken")


@pytest.mark.parametrize(("fault", "worked"), [(away, True), (expired, True), (expired, False)])
def test_a_store_that_is_lost_ends_the_reading(images, faulty, monkeypatch, fault, worked):
    monkeypatch.setattr(filesystems, "PATIENCE_S", 0.0)
    with faulty() as proxy:
        table = manifest(images, proxy)
        if worked:
            assert read(table) == [None] * IMAGES
        fault(proxy)
        with pytest.raises(StoreError) as caught:
            read(table)
        assert caught.value.everything and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("fault", ["gone", "denied", "slow_down"])
def test_an_image_that_is_refused_costs_no_other(images, faulty, monkeypatch, fault):
    """Also if it is the first one that a process reads; `slow_down`: it fails for ever."""
    monkeypatch.setattr(filesystems, "PATIENCE_S", 0.0)
    names = sorted(images.files("images"))
    with faulty(faults=("answer" if fault == "denied" else fault,)) as proxy:
        table = manifest(images, proxy)
        if fault == "gone":
            images.fs.delete_file(f"{images.name}/{names[0]}")
        else:
            proxy.only = lambda _, path: names[0] in path
            proxy.share = 1.0
        if fault == "denied":
            monkeypatch.setattr("tests.s3._Handler._error", denied)
        errors = read(table)
    assert errors[0] and names[0] in errors[0] and errors[1:] == [None] * (IMAGES - 1)


def denied(handler, status, code):
    handler._give(403, [("Content-Type", "application/xml")], b"")


@pytest.mark.ray
def test_a_run_stops_where_its_images_cannot_be_had(images, faulty, ray_new, tmp_path):
    with faulty() as proxy:
        pq.write_table(manifest(images, proxy), tmp_path / "images.parquet")
        expired(proxy)
        began = time.monotonic()
        with pytest.raises(WorkError, match="check the credentials") as caught:
            label(config(tmp_path / "images.parquet", tmp_path / "run"))
        assert time.monotonic() - began < 100 and len(str(caught.value).splitlines()) == 1
    folder = RunFolder(str(tmp_path / "run"))
    run = folder.read_run()
    assert run is not None and run["state"] == "failed" and not folder.parts("errors")


def test_an_actor_refuses_a_folder_that_the_driver_does_not_write_to(tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    job = SimpleNamespace(folder=folder, task=SimpleNamespace(verb="label"))
    with pytest.raises(ValueError, match=f"every node sees, got {folder.uri}; use a shared disk"):
        ImageActor(job, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("state", ["complete", "interrupted"])
def test_a_run_whose_parts_are_elsewhere_is_not_complete(state, tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    job = SimpleNamespace(folder=folder, task=SimpleNamespace(verb="label"))
    todo = pa.table({"image_id": ["a", "b"], "uri": ["a", "b"]}, MANIFEST)
    run, before = {"state": state}, pipeline._Before(PartIndex(), 0, set())
    tracker, progress = SimpleNamespace(started=False), Progress("label", show=False)

    progress.plan(2)

    def settle():
        pipeline._settle(job, todo, run, progress, tracker, before)  # type: ignore[arg-type]

    if state == "complete":
        with pytest.raises(WorkError, match="2 of 2 images were done but are not there: out must"):
            settle()
    else:
        settle()
    assert run["state"] == ("failed" if state == "complete" else state)
    assert '"labelled": 0' in (tmp_path / "run" / "run.json").read_text()
