"""The benchmark of large runs, in small: what it tells is measured, and nothing is lost in it."""

import os
import time

import pyarrow.parquet as pq
import pytest

from zsplg_ray import part_index
from zsplg_ray.cluster.meter import Meter, role
from zsplg_ray.cluster.scale_benchmark import label_simulated, main, session
from zsplg_ray.cluster.scale_folder import resume, row_bytes
from zsplg_ray.cluster.simulated import DIM, Work, plausible
from zsplg_ray.exactly_once import repair
from zsplg_ray.records import LABELS, segments_schema
from zsplg_ray.rundir import RunFolder


def test_a_finished_run_is_looked_through_twice_and_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(part_index, "WORTH", 2)
    monkeypatch.setattr(part_index, "SETTLED_NS", -1)  # parts as old as the newest one count too
    without, with_index = resume(RunFolder(str(tmp_path)), images=50, in_flight=8)
    assert (without["parts of each kind"], without["parts opened"]) == (7, 14)
    assert (with_index["parts opened"], with_index["pages listed"]) == (0, 3)


def test_a_row_costs_what_its_embeddings_do():
    few, many = row_bytes(4, 16), row_bytes(20, 16)
    grown = many["segments/, KiB"] - few["segments/, KiB"]
    assert 16 * DIM * 2 / 1024 < grown < 2 * 16 * DIM * 2 / 1024
    assert many["labels/, KiB"] > few["labels/, KiB"] > 0.5


def test_the_made_up_result_is_one_that_can_be_written():
    segments, composed = plausible(3)
    assert len(segments) == 3 and segments.embedding_RD is not None
    assert segments.embedding_RD.shape == (3, DIM)
    assert set(map(int, composed.label_HW[composed.painted_HW])) <= {1, 2, 3}


def test_notes_tell_when_all_were_at_work(tmp_path):
    (tmp_path / "1").write_text("10 11\n11 12\n12 13\n13 14\n")
    (tmp_path / "2").write_text("12 13\n13 14\n14 15\n")
    (tmp_path / "3").write_text("")
    seen = Work.read(tmp_path)
    assert (seen.first, seen.last, seen.steady, seen.actors) == (10, 15, (12, 14), 2)
    assert seen.images_per_s == 2.0
    (tmp_path / "2").write_text("20 21\n")  # never together
    assert Work.read(tmp_path).images_per_s != Work.read(tmp_path).images_per_s


def test_the_meter_sees_what_this_process_spends():
    with Meter(every_s=0.05) as meter:
        began = time.process_time()
        while time.process_time() - began < 0.3:
            pass
    assert 0.2 < meter.cpu_s()["driver"] < 5
    assert meter.cpu_s(time.time() + 1)["driver"] == 0
    assert min(meter.driver_mib) > 1


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("ray::LedgerBook", "ledger"),
        ("ray::MapWorker(MapBatches(ImageActor)).submit()", "actors"),
        ("ray::MapBatches(decode_block)", "other workers"),
        ("ray::DashboardAgent", "agents"),
        ("/x/ray/core/src/ray/raylet/raylet --a=b", "raylets"),
        ("python -u log_monitor.py", "agents"),
    ],
)
def test_processes_are_told_apart(command, name):
    assert role(command) == name


def test_the_command_line_prints_a_table(capsys):
    assert main(["row", "--segments", "2", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| segments | segments/, KiB | labels/, KiB |"
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| 2", "| 3"]


@pytest.mark.ray
def test_two_pretended_nodes_label_each_image_once_and_no_part_is_read_back(tmp_path, reads):
    with session(nodes=2, cpus=2, raylets=False):
        meter, seen, _ = label_simulated(tmp_path, 40, actors=2, latency_s=0.02, in_flight=8)
    assert not reads, "the actors told of the parts that they wrote"
    assert seen.actors <= 2 and not (tmp_path / "notes" / str(os.getpid())).exists()
    assert meter.cpu_s()["actors"] > 0 and meter.cpu_s()["driver"] > 0
    folder = RunFolder(str(tmp_path / "run"))
    assert len(repair(folder).done) == 40 and len(folder.parts("segments")) == 5
    for kind, schema in (("labels", LABELS), ("segments", segments_schema(DIM))):
        tables = [pq.read_table(p) for p in (tmp_path / "run" / kind).iterdir()]
        assert all(t.schema.equals(schema) for t in tables)
        assert sum(map(len, tables)) == 40
