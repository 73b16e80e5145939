"""`estimate` says what `label` then takes, from a sample alone, and writes nothing."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.cluster import rigged
from zsplg_ray import cli
from zsplg_ray.cluster import decode
from zsplg_ray.cluster.estimate.estimate import estimate, with_gpus
from zsplg_ray.cluster.estimate.forecast import Work, forecast
from zsplg_ray.cluster.estimate.sample import STAGES, Measured, spread
from zsplg_ray.cluster.estimate.told import told
from zsplg_ray.cluster.estimate.watch import Watch
from zsplg_ray.cluster.label import label
from zsplg_ray.cluster.nodes import Cluster
from zsplg_ray.cluster.session import Plan
from zsplg_ray.config import EstimateConfig, LabelConfig
from zsplg_ray.label.labeler import Labeler
from zsplg_ray.settings import WorkError, flatten, from_mapping


def config(images, **changes) -> EstimateConfig:
    values = flatten(rigged.config(images, "unused")) | {"out": None, **changes}
    return from_mapping(EstimateConfig, values)


def some(folder: Path, scenes: Path, count: int) -> Path:
    """A folder of some scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((scenes / "JPEGImages").iterdir())[:count]:
        shutil.copy(path, folder)
    return folder


def below(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Which images ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "most"), [(1, 20), (20, 20), (21, 20), (10**9, 7), (50, 49)])
def test_the_sample_is_spread_evenly(total, most):
    at = spread(total, most)
    assert len(at) == min(total, most) and at.dtype == np.int64
    assert at[0] >= 0 and at[-1] < total
    gaps = np.diff(at, prepend=-1 - at[0], append=2 * total - 1 - at[-1])  # mirrored at its ends
    assert gaps.max() - gaps.min() <= 2 and (np.diff(at) > 0).all()


def test_only_the_sample_is_read(tmp_path, scenes, monkeypatch):
    files = [str(p) for p in sorted((scenes / "JPEGImages").iterdir())]
    ids = [f"{i:06}" for i in range(20_000)]
    uris = [files[i // 1000] if i % 1000 == 500 else f"/nowhere/{i}.jpg" for i in range(20_000)]
    pq.write_table(pa.table({"image_id": ids, "uri": uris}), tmp_path / "list.parquet")
    read, real = [], decode.read_bytes
    monkeypatch.setattr(decode, "read_bytes", lambda uri: read.append(uri) or real(uri))
    found = estimate(config(tmp_path / "list.parquet"), load=rigged.load_blind)
    assert found["images"] == found["todo"] == 20_000
    assert read == files[:20] and found["sample"]["failed"] == []
    assert below(tmp_path).keys() == {str(tmp_path / "list.parquet")}, "nothing was written"


# From a sample to all ----------------------------------------------------------------------------


def measured(**changes) -> Measured:
    """Ten images of 0.1 + 1.0 + 0.5 + 0.5 s, 1,000 + 200 bytes, on one thread of a CPU."""
    each = dict(zip(STAGES, (0.1, 1.0, 0.5, 0.5), strict=True))
    seconds = {stage: [s] * 10 for stage, s in each.items()}
    values = {
        "device": "cpu",
        "threads": 1,
        "images_at_once": 1,
        "start_s": 36.0,
        "wall_s": seconds,
        "cpu_s": seconds,
        "size_hw": [(10, 20)] * 10,
        "segments": [3] * 10,
        "row_bytes": {"segments": [1000.0] * 10, "labels": [200.0] * 10},
        "part_bytes": {"segments": 1600.0, "labels": 160.0},
        "embedding_share": 0.5,
    }
    return Measured(**(values | changes))  # type: ignore[arg-type]


def work(plan=None, **changes) -> Work:
    plan = plan or Plan(1, 1, gpus=0.0, cpus=1.0, decode_cpus=1.0)
    values = {"images": 18_000, "cpus": 2.0, "gpus_asked": None, "in_flight": 16, "flush_s": 60.0}
    return Work(plan=plan, **(values | {"price": None} | changes))  # type: ignore[arg-type]


def sure(guess) -> float:
    assert guess["low"] == pytest.approx(guess["mid"]) == pytest.approx(guess["high"])
    return guess["mid"]


def test_equal_images_leave_no_doubt_on_cpus():
    found = forecast(measured(), work(price=0.05))
    assert sure(found["images_per_s"]) == pytest.approx(0.5), "reading goes on beside"
    assert sure(found["hours"]["wall"]) == pytest.approx(10.01), "with the models' start"
    assert sure(found["hours"]["cpu"]) == pytest.approx(20.02), "both CPUs are held"
    assert sure(found["cpu_hours_of_work"]) == pytest.approx(10.5)
    assert sure(found["cost"]) == pytest.approx(20.02 * 0.05)
    size = found["bytes"]
    assert size["images_a_part"] == 16
    assert sure(size["segments"]) == pytest.approx(18_000 * 1100)
    assert sure(size["total"]) == pytest.approx(18_000 * (1100 + 210))
    assert size["embedding_share"] == pytest.approx(0.5 * 1100 / 1310)
    assert found["reading"]["keep_up"] and found["slowed"] == pytest.approx(1)


def test_gpus_share_the_work_and_are_paid_for():
    plan = Plan(1, 4, gpus=1.0, cpus=0.0, decode_cpus=1.0)
    found = forecast(measured(device="H200"), work(plan, cpus=64.0, price=2.0))
    assert sure(found["images_per_s"]) == pytest.approx(4 * 0.5)
    assert sure(found["hours"]["wall"]) == pytest.approx(2.51)
    assert sure(found["hours"]["gpu"]) == pytest.approx(4 * 2.51)
    assert sure(found["cost"]) == pytest.approx(8 * 2.51)
    assert sure(found["reading"]["cpus_wanted"]) == pytest.approx(0.05), "a GPU"
    idle = forecast(measured(device="H200"), work(plan, cpus=64.0, price=2.0, gpus_asked=8))
    assert sure(idle["hours"]["gpu"]) == pytest.approx(8 * 2.51), "idle ones are paid for too"


def test_readers_that_do_not_keep_up_decide():
    plan = Plan(1, 4, gpus=1.0, cpus=0.0, decode_cpus=1.0)
    slow = measured(wall_s=measured().wall_s | {"read_decode": [4.0] * 10})
    found = forecast(slow, work(plan, cpus=4.0))
    assert not found["reading"]["keep_up"]
    assert sure(found["images_per_s"]) == pytest.approx(4 / 4.0), "4 CPUs, not 4 GPUs"


def test_a_cap_on_actors_holds_and_few_images_need_few():
    capped = Plan(1, 2, gpus=1.0, cpus=0.0, decode_cpus=1.0)
    assert sure(forecast(measured(), work(capped, cpus=64.0))["images_per_s"]) == pytest.approx(1.0)
    many = Plan(1, 64, gpus=1.0, cpus=0.0, decode_cpus=1.0)
    assert work(many, images=17).actors == 2, "a block each"
    half = Plan(1, 4, gpus=0.5, cpus=0.0, decode_cpus=1.0)
    assert work(half, cpus=64.0).gpus == 2 and work(half, cpus=64.0).devices == 2


def test_slow_images_are_written_before_a_part_is_full():
    found = forecast(measured(), work(flush_s=4.0))
    assert found["bytes"]["images_a_part"] == 2
    assert sure(found["bytes"]["labels"]) == pytest.approx(18_000 * (200 + 80))


def test_failed_images_take_no_room_and_less_time():
    values = measured()
    wall = {s: [0.0, *v[1:]] if s != "read_decode" else v for s, v in values.wall_s.items()}
    rows = {kind: [None, *sizes[1:]] for kind, sizes in values.row_bytes.items()}
    found = forecast(measured(wall_s=wall, row_bytes=rows), work())
    assert found["failures"]["mid"] == pytest.approx(1800)
    assert found["failures"]["low"] < 1800 < found["failures"]["high"]
    assert found["images_per_s"]["mid"] == pytest.approx(0.5 / 0.9)
    assert found["bytes"]["segments"]["mid"] == pytest.approx(0.9 * 18_000 * 1100)
    assert found["bytes"]["segments_an_image"]["mid"] == pytest.approx(1100)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    pixels = rng.lognormal(0, 0.7, 5000)  # some images are many times as large
    held = 0
    for _ in range(100):
        drawn = rng.choice(pixels, 20, replace=False)
        zero = [0.0] * 20
        wall = dict.fromkeys(STAGES, zero) | {"sam": drawn.tolist()}
        rows = {"segments": zero, "labels": zero}
        found = forecast(
            measured(wall_s=wall, cpu_s=wall, row_bytes=rows, start_s=0.0), work(images=5000)
        )
        hours = found["hours"]["wall"]
        held += hours["low"] <= pixels.sum() / 3600 <= hours["high"]
    assert held >= 82, "a bootstrap over 20 is a little too sure of itself, not more"


def test_nodes_for_as_many_gpus_as_asked():
    have = Cluster(({"CPU": 4.0}, {"CPU": 16.0, "GPU": 8.0, "label_node": 1.0}))
    wanted = with_gpus(have, 12)
    assert [node["GPU"] for node in wanted.nodes] == [8, 4]
    assert wanted.total("CPU") == 24 and wanted.nodes[1]["label_node"] == 1


def test_seconds_belong_to_the_image_and_the_model():
    now = np.zeros(2)

    class Slow:
        images_at_once = 2

        def propose_many(self, images, points_per_batch=None):
            now[:] += (6, 3)
            return images

        def embed(self, image_HWC, segments):
            now[:] += (1, 1) if image_HWC is images[0] else (2, 1)

    images = [np.zeros((1, 1, 3), np.uint8) for _ in range(2)]
    slow = Slow()
    labeler = Labeler(slow, slow, None)  # type: ignore[arg-type]
    watch = Watch(now.copy, images)
    with watch.on(labeler):
        assert labeler.images_at_once == 2
        labeler.proposer.propose_many(images)
        for image in images:
            labeler.embedder.embed(image, None)  # type: ignore[arg-type]
    assert watch.seconds["sam"].tolist() == [[3, 1.5], [3, 1.5]]
    assert watch.seconds["clip"].tolist() == [[1, 1], [2, 1]]
    assert watch.total.tolist() == [9, 5] and labeler.proposer is slow


# The whole ---------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
def test_it_tells_what_label_writes_then_only_what_is_missing(tmp_path, scenes, ray_local):
    images, out = some(tmp_path / "images", scenes, 12), tmp_path / "run"
    more = {"sample": 12, "actors.in_flight": 6}
    found = estimate(config(images, **more))
    assert not out.exists() and found["done"] == 0 and found["sample"]["segments"] > 0
    words = shlex.split(found["command"])
    assert words[:2] == ["zsplg", "label"] and words[words.index("--out") + 1] == "run/"
    label(rigged.config(images, out, **{"actors.in_flight": 6}))
    for kind in ("segments", "labels"):
        truth = sum(p.stat().st_size for p in (out / kind).iterdir())
        assert found["bytes"][kind]["mid"] == pytest.approx(truth, rel=0.02)
    shutil.copy(sorted((scenes / "JPEGImages").iterdir())[20], images)
    before = below(out)
    rest = config(images, out=str(out), **more, **{"ray.address": "auto"})
    found = estimate(rest)
    assert (found["images"], found["done"], found["todo"]) == (13, 12, 1)
    assert found["sample"]["images"] == 1 and str(out) in found["command"], "by way of a task"
    assert below(out) == before
    with pytest.raises(ValueError, match=r"sam\.points_per_side must be 4"):
        estimate(config(images, out=str(out), **{"sam.points_per_side": 5}))
    (images / "more.jpg").unlink(missing_ok=True)
    shutil.rmtree(images)
    some(images, scenes, 12)
    text = told(estimate(config(images, out=str(out))))
    assert "nothing is left to do" in text and "zsplg label" in text and below(out) == before


def test_bad_images_are_counted_and_told(tmp_path, scenes):
    images = some(tmp_path / "images", scenes, 6)
    Image.new("RGB", (8, 8), (0, 255, 0)).save(images / "green.png")  # SAM fails on it
    (images / "bad\x1b[31m\n.jpg").write_bytes(b"no image")
    (images / "empty.jpg").write_bytes(b"")

    class Choosy(rigged.Blind):
        def propose_many(self, images, points_per_batch=None):
            if any((image == (0, 255, 0)).all() for image in images):
                raise ArithmeticError("green\nand more")
            return super().propose_many(images, points_per_batch)

    def load(config, naming, device):
        return Labeler(Choosy(), Labeler.load(config, naming, device).embedder, naming)

    found = estimate(config(images, max_errors=2), load=load)
    failed = {f["image_id"]: (f["stage"], f["error"]) for f in found["sample"]["failed"]}
    assert len(failed) == 3 and failed["green.png"] == ("label", "ArithmeticError: green and more")
    assert failed["empty.jpg"][0] == "decode" and found["failures"]["mid"] == pytest.approx(3)
    assert any("max_errors, 2" in note for note in found["notes"])
    text = told(found)
    assert "3 of 9 sampled" in text and text.replace("\n", "").isprintable()
    assert found["seconds"]["clip"]["mean"] >= 0 and found["bytes"]["total"]["mid"] > 0


def test_nothing_but_bad_images_is_an_error(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(WorkError, match=r"none of 1 sampled .* bad\.jpg: decode: image must be"):
        estimate(config(tmp_path), load=rigged.load_blind)


def test_the_command_line(tmp_path, scenes, capsys):
    images = some(tmp_path / "images", scenes, 3)
    flags = ["--sam", "shapes", "--clip", "shapes", "--sam.points-per-side", "4", "--quiet"]
    argv = ["estimate", "--images", str(images), "--classes", "shapes", *flags]
    assert (
        cli.main([*argv, "--price", "0.1", "--compose.min-similarity", "circle", "0.3", "*", "0.2"])
        == 0
    )
    out = capsys.readouterr().out
    assert "at $0.1 an hour of a CPU" in out and "images/s with 1 actor" in out
    command = shlex.split(next(x for x in out.splitlines() if x.startswith("next")))[1:]
    given = cli.parse(LabelConfig, command[2:], "label")
    assert (
        given.compose.min_similarity == {"circle": 0.3, "*": 0.2} and given.sam.points_per_side == 4
    )
    assert given.quiet and not given.json
    assert cli.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 3


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--sampel", "3"], "did you mean --sample?"),
        (["--sample", "0"], "sample must be in [1, 10000], got 0"),
        (["--price", "-1"], "price must be"),
        (["--gpus", "4", "--device", "cpu"], "gpus must be left out where no GPU"),
        (["--images", "EMPTY"], "images must be a source with images in it"),
        (["--actors.cpus", "1000"], "actors.cpus must be within"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(tmp_path, scenes, capsys, more, line):
    (tmp_path / "empty").mkdir()
    more = [word.replace("EMPTY", str(tmp_path / "empty")) for word in more]
    flags = ["--images", str(scenes), "--classes", "shapes", "--sam", "shapes", "--clip", "shapes"]
    assert cli.main(["estimate", *flags, *more]) == 2
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1


def test_settings_of_label_are_those_of_estimate():
    theirs = {f.name for f in dataclasses.fields(LabelConfig)}
    ours = {f.name for f in dataclasses.fields(EstimateConfig)}
    assert ours - theirs == {"sample", "price", "gpus"} and theirs <= ours
