"""Training data: sources, hold-out and class lists; and the batches that a loader makes of them."""

import logging
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from zsplg_ray.config import TrainConfig
from zsplg_ray.records import LABELS, encode_png, encode_score
from zsplg_ray.rundir import RunFolder, part_name
from zsplg_ray.settings import WorkError, from_mapping
from zsplg_ray.student import loader
from zsplg_ray.student.augment import weak_view
from zsplg_ray.student.batch import Batch
from zsplg_ray.student.data import TrainingData, agreed_classes, check_indices, split_holdout
from zsplg_ray.student.draws import image_seed
from zsplg_ray.student.loader import batches
from zsplg_ray.student.zeroshot import find_labels, read_label
from zsplg_ray.vocab import ClassList, class_list

CLASSES = class_list("cat,dog")
SIZE_HW = (40, 56)


def picture(number: int) -> np.ndarray:
    """An image by which one can tell its number: its red channel is it, everywhere."""
    image_HWC = np.random.default_rng(number).integers(0, 256, (*SIZE_HW, 3), dtype=np.uint8)
    image_HWC[..., 0] = number
    return image_HWC


def mask(number: int) -> np.ndarray:
    return np.random.default_rng(1000 + number).integers(0, 3, SIZE_HW, dtype=np.uint8)


def write_images(folder: Path, numbers: Iterable[int], prefix: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.fromarray(picture(number)).save(folder / f"{prefix}{number:03}.png")
    return folder


def write_masks(folder: Path, numbers: Iterable[int], prefix: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.fromarray(mask(number)).save(folder / f"{prefix}{number:03}.png")
    return folder


def label_row(image_id: str, label_HW: np.ndarray, score: float = 0.5) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "uri": image_id,
        "width": label_HW.shape[1],
        "height": label_HW.shape[0],
        "label_png": encode_png(label_HW),
        "score_png": encode_score(np.full(label_HW.shape, score)),
        "class_px": np.bincount(label_HW.ravel(), minlength=3)[:3].tolist(),
        "source": "zeroshot",
        "confidence": score,
    }


def write_run(
    folder: Path,
    parts: Iterable[Iterable[Mapping[str, Any]]],
    classes: ClassList = CLASSES,
    state: str = "complete",
) -> Path:
    """A run's folder as `zsplg label` leaves it, without segments."""
    run = RunFolder(str(folder))
    meta = {"classes": classes.to_dict(), "labels_fingerprint": "of-the-part"}
    for rows in parts:
        rows = list(rows)
        name = part_name([row["image_id"] for row in rows] + [str(len(run.parts("labels")))])
        run.write_part("labels", name, pa.Table.from_pylist(rows, schema=LABELS), meta)
    run.write_run(
        {
            "config": {},
            "resolved": {},
            "classes": classes.to_dict(),
            "weights": {},
            "labels_state": state,
            "labels_fingerprint": "of-the-run",
        }
    )
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """10 labelled images (0 to 9), 12 unlabelled (100 to 111) with zero-shot labels."""
    root = tmp_path_factory.mktemp("world")
    write_images(root / "labelled", range(10), "l")
    write_masks(root / "masks", range(10), "l")
    write_images(root / "unlabelled", range(100, 112), "u")
    rows = [label_row(f"u{n}.png", mask(n)) for n in range(100, 112)]
    write_run(root / "run", (rows[:5], rows[5:]))
    return root


def config_of(world: Path, **changes: Any) -> TrainConfig:
    values = {
        "labeled": str(world / "labelled"),
        "labeled_masks": str(world / "masks"),
        "unlabeled": str(world / "unlabelled"),
        "zeroshot": str(world / "run"),
        "out": str(world / "out"),
        "augment.crop_px": 32,
        "train.batch_labeled": 4,
        "train.batch_unlabeled": 6,
    }
    return from_mapping(TrainConfig, {k: v for k, v in (values | changes).items() if v is not None})


def make(world: Path, steps: int = 4, first_step: int = 0, **changes: Any) -> list[list[Batch]]:
    share = {k: changes.pop(k) for k in ("rank", "world_size", "workers") if k in changes}
    share["world"] = share.pop("world_size", 1)
    config = config_of(world, **changes)
    data = TrainingData.open(config)
    return list(batches(data, config, first_step=first_step, steps=steps, **share))


def joined(parts: Iterable[Batch]) -> dict[str, torch.Tensor]:
    parts = list(parts)
    names = [f.name for f in fields(Batch) if getattr(parts[0], f.name) is not None]
    return {n: torch.cat([getattr(p, n) for p in parts]) for n in names if n != "bad"}


def assert_same(a: Iterable[Batch], b: Iterable[Batch]) -> None:
    ours, theirs = joined(a), joined(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# Batches ---------------------------------------------------------------------------------------


def test_a_batch_is_views_of_whole_images_with_their_labels(world):
    """Every image of every batch, made again by hand from its files."""
    config = config_of(world)
    data = TrainingData.open(config)
    seen = set()
    for (batch,) in batches(data, config, first_step=0, steps=4):
        for b, seed in enumerate(batch.u_seed_B.tolist()):
            number = int(batch.u_image_BCHW[b, 0].max())
            seen.add(number)
            maps = [(mask(number), 255), (np.full(SIZE_HW, 128, np.uint8), 0)]
            image, (label, score), padding = weak_view(picture(number), maps, config.augment, seed)
            assert torch.equal(batch.u_image_BCHW[b], image)
            assert torch.equal(batch.u_label_BHW[b], label)
            assert torch.equal(batch.u_score_BHW[b], score)
            assert torch.equal(batch.u_padding_BHW[b], padding)
            index = data.unlabelled["image_id"].to_pylist().index(f"u{number:03}.png")
            assert seed in {image_seed(0, "unlabelled", p, index) for p in range(3)}
        assert batch.x_image_BCHW.shape == (4, 3, 32, 32)
        assert batch.x_label_BHW.dtype == batch.u_label_BHW.dtype == torch.uint8
        assert batch.x_label_BHW[batch.x_image_BCHW.sum(1) == 0].eq(255).all(), "padding"
        assert batch.mix_image_BCHW is None and batch.bad == 0
    assert seen == set(range(100, 112)), "two passes of 12 images in 4 steps of 6"


def test_a_pass_shows_every_image_once_and_the_next_in_other_views(world):
    steps = make(world, steps=4)
    first, second = (joined(b for s in part for b in s) for part in (steps[:2], steps[2:]))
    for passed in (first, second):
        assert sorted(passed["u_image_BCHW"][:, 0].amax((1, 2)).tolist()) == list(range(100, 112))
    assert not set(first["u_seed_B"].tolist()) & set(second["u_seed_B"].tolist())


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_workers_together_see_what_one_would(world, workers, accumulate):
    one = make(world)
    shares = [
        make(world, rank=rank, world_size=workers, **{"train.accumulate": accumulate})
        for rank in range(workers)
    ]
    for step, whole in enumerate(one):
        assert all(len(share[step]) == accumulate for share in shares)
        assert_same(whole, [micro for share in shares for micro in share[step]])


def test_a_resumed_run_goes_on_where_it_stopped(world):
    straight = make(world, steps=5)
    resumed = make(world, steps=2, first_step=3)
    for a, b in zip(straight[3:], resumed, strict=True):
        assert_same(a, b)


def test_another_seed_gives_other_batches(world):
    a, b = (make(world, steps=1, **{"train.seed": seed})[0] for seed in (0, 1))
    assert not torch.equal(a[0].u_image_BCHW, b[0].u_image_BCHW)


@pytest.mark.parametrize("start", [None, "spawn"])
def test_loading_processes_change_nothing(world, start, monkeypatch):
    if start:
        monkeypatch.setattr(loader, "_start_method", lambda data: start)
    before = torch.get_rng_state()
    alone, apart = make(world), make(world, workers=1 if start else 2)
    for a, b in zip(alone, apart, strict=True):
        assert_same(a, b)
    assert torch.equal(before, torch.get_rng_state())


def test_processes_start_anew_for_object_stores(world):
    data = TrainingData.open(config_of(world))
    assert loader._start_method(data) is None
    remote = data.labelled.set_column(1, "uri", pa.array(["s3://b/x.png"] * len(data.labelled)))
    there = pickle.loads(pickle.dumps(data))
    object.__setattr__(there, "labelled", remote)
    assert loader._start_method(there) == "spawn"


def test_same_image_brings_another_view_of_it(world):
    (batch,) = make(world, steps=1, **{"unimatch.same_image": True})[0]
    (without,) = make(world, steps=1)[0]
    assert_same([without], [Batch(**{f.name: getattr(batch, f.name) for f in fields(Batch)[:7]})])
    assert batch.mix_image_BCHW is not None and batch.mix_seed_B is not None
    numbers = [i[:, 0].amax((1, 2)).tolist() for i in (batch.u_image_BCHW, batch.mix_image_BCHW)]
    assert numbers[0] == numbers[1]
    assert not torch.equal(batch.mix_image_BCHW, batch.u_image_BCHW)
    assert not set(batch.mix_seed_B.tolist()) & set(batch.u_seed_B.tolist())
    assert batch.mix_label_BHW is not None and batch.mix_padding_BHW is not None
    assert (batch.mix_label_BHW[batch.mix_padding_BHW] == 255).all()


def test_without_unlabelled_images_there_are_none_in_a_batch(world):
    (batch,) = make(world, steps=1, unlabeled=None, zeroshot=None, classes="cat,dog")[0]
    assert batch.x_image_BCHW.shape == (4, 3, 32, 32)
    assert batch.u_image_BCHW.shape == (0, 3, 32, 32) and batch.u_seed_B.shape == (0,)
    assert batch.u_label_BHW.shape == batch.u_padding_BHW.shape == (0, 32, 32)


def test_without_zero_shot_labels_all_is_255(world):
    (batch,) = make(world, steps=1, zeroshot=None, classes="cat,dog")[0]
    assert (batch.u_label_BHW == 255).all() and (batch.u_score_BHW == 0).all()


def test_parts_without_images_have_the_right_shape(world):
    changes = {"train.accumulate": 3, "train.batch_labeled": 1, "train.batch_unlabeled": 2}
    parts = make(world, steps=1, **changes)[0]
    assert [len(p.x_image_BCHW) for p in parts] == [0, 0, 1]
    assert sum(len(p.u_image_BCHW) for p in parts) == 2


def test_a_batch_goes_to_a_device_with_all_it_has(world):
    (batch,) = make(world, steps=1, **{"unimatch.same_image": True})[0]
    there = batch.to("meta")
    for field in fields(Batch):
        value = getattr(there, field.name)
        if isinstance(value, torch.Tensor):
            assert value.device.type == ("cpu" if field.name.endswith("seed_B") else "meta")
    assert there.bad == batch.bad


# What cannot be used ---------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path) -> Path:
    """A small world that a test may damage."""
    write_images(tmp_path / "labelled", range(4), "l")
    write_masks(tmp_path / "masks", range(4), "l")
    write_images(tmp_path / "unlabelled", range(100, 108), "u")
    write_run(tmp_path / "run", [[label_row(f"u{n}.png", mask(n)) for n in range(100, 108)]])
    return tmp_path


def test_a_bad_image_is_replaced_and_told_once(own, caplog):
    config = config_of(own, **{"train.holdout": 0.0})
    data = TrainingData.open(config)
    good = list(batches(data, config, first_step=0, steps=8))
    (own / "unlabelled/u103.png").write_bytes(b"no picture")
    (own / "unlabelled/u105.png").unlink()
    Image.fromarray(mask(2)[:20]).save(own / "masks/l002.png")
    with caplog.at_level(logging.WARNING):
        bad = list(batches(data, config, first_step=0, steps=8))
    told = [record.getMessage() for record in caplog.records]
    assert sorted(re.findall(r"the place of (\S+):", " ".join(told))) == [
        "l002.png",
        "u103.png",
        "u105.png",
    ]
    assert any("56 x 20" in t and "56 x 40" in t for t in told), "both sizes are told"
    assert all("\n" not in t for t in told)
    assert sum(batch.bad for step in bad for batch in step) >= 8 * 6 // 4
    before, after = (joined(b for s in x for b in s) for x in (good, bad))
    numbers = before["u_image_BCHW"][:, 0].amax((1, 2))
    untouched = (numbers != 103) & (numbers != 105)
    assert torch.equal(before["u_image_BCHW"][untouched], after["u_image_BCHW"][untouched])
    assert not {103, 105} & set(after["u_image_BCHW"][:, 0].amax((1, 2)).tolist())
    assert after["u_seed_B"].unique().numel() == len(numbers), "the same image, but another view"


def test_a_bad_zero_shot_label_is_no_more_than_a_bad_image(own, caplog):
    rows = [label_row(f"u{n}.png", mask(n)) for n in range(100, 108)]
    rows[2]["label_png"] = b"torn"
    rows[3] = label_row("u103.png", mask(103)[:10])
    write_run(own / "run2", [rows])
    made = make(own, steps=4, zeroshot=str(own / "run2"))
    numbers = joined(b for s in made for b in s)["u_image_BCHW"][:, 0].amax((1, 2)).tolist()
    assert set(numbers) == set(range(100, 108)) - {102, 103}
    assert "u102.png" in caplog.text and "zero-shot label of u103.png" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_many_bad_images_in_a_row_stop_the_work(own, workers):
    config = config_of(own)
    data = TrainingData.open(config)
    for path in (own / "unlabelled").iterdir():
        path.unlink()
    with pytest.raises(WorkError, match=r"20 unlabelled images in a row.*u10\d.png.*No such file"):
        list(batches(data, config, first_step=0, steps=1, workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_numbers_that_no_class_has_stop_the_work_in_one_line(own, workers):
    config = config_of(own)
    data = TrainingData.open(config)
    Image.fromarray(mask(1) + 5).save(own / "masks/l001.png")
    with pytest.raises(ValueError, match=r"mask of l001.png must be of class indices 0 to 2") as e:
        list(batches(data, config, first_step=0, steps=9, workers=workers))
    assert "\n" not in str(e.value)


def test_check_indices_lets_255_pass():
    check_indices(np.array([[0, 2, 255]], np.uint8), 3, "mask")
    check_indices(np.full((2, 2), 255, np.uint8), 3, "mask")
    with pytest.raises(ValueError, match="got 254"):
        check_indices(np.array([[254, 255]], np.uint8), 3, "mask")


# Sources ---------------------------------------------------------------------------------------


def test_what_is_found(world, caplog):
    with caplog.at_level(logging.INFO):
        data = TrainingData.open(config_of(world))
    assert data.classes == CLASSES
    assert (len(data.labelled), len(data.validation), len(data.unlabelled)) == (8, 2, 12)
    assert data.zeroshot_fingerprint == "of-the-run"
    assert "8 labelled images, 12 unlabelled (12 with zero-shot labels), 2 for valid" in caplog.text
    for row in data.validation.to_pylist():
        assert data.validation_truth.read(row["image_id"]).shape == SIZE_HW
        assert Path(row["uri"]).exists()
    again = pickle.loads(pickle.dumps(data))
    assert again.labelled == data.labelled and again.classes == data.classes


def test_holdout_is_seeded_and_apart(world):
    ids = []
    for seed in (0, 0, 1):
        data = TrainingData.open(config_of(world, **{"train.seed": seed, "train.holdout": 0.3}))
        held = data.validation["image_id"].to_pylist()
        kept = data.labelled["image_id"].to_pylist()
        assert sorted(held + kept) == [f"l{n:03}.png" for n in range(10)] and len(held) == 3
        ids.append(held)
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    ("n", "share", "held"), [(10, 0.2, 2), (3, 0.1, 1), (2, 0.9, 1), (1, 0.5, 0), (5, 0.0, 0)]
)
def test_at_least_one_is_held_out_and_one_is_left(n, share, held, caplog):
    table = pa.table({"image_id": [str(i) for i in range(n)], "uri": [str(i) for i in range(n)]})
    config = from_mapping(TrainConfig, {"labeled": "x", "out": "y", "train.holdout": share}).train
    kept, aside = split_holdout(table, config)
    assert (len(kept), len(aside)) == (n - held, held)
    assert ("one labelled image" in caplog.text) == (n == 1)


def test_with_val_all_labelled_images_are_trained_on(world, tmp_path):
    write_images(tmp_path / "val", range(50, 53), "v")
    masks = write_masks(tmp_path / "val_masks", range(50, 53), "v")
    data = TrainingData.open(config_of(world, val=str(tmp_path / "val"), val_masks=str(masks)))
    assert len(data.labelled) == 10
    assert data.validation["image_id"].to_pylist() == ["v050.png", "v051.png", "v052.png"]
    assert (data.validation_truth.read("v051.png") == mask(51)).all()


def test_labelled_images_stay_unlabelled_ones_but_not_the_held_out(world, tmp_path, caplog):
    both = write_images(tmp_path / "both", range(10), "l")
    write_images(both, range(100, 103), "u")
    with caplog.at_level(logging.INFO):
        data = TrainingData.open(
            config_of(world, unlabeled=str(both), zeroshot=None, classes="cat,dog")
        )
    held = set(data.validation["image_id"].to_pylist())
    assert set(data.unlabelled["image_id"].to_pylist()) == {p.name for p in both.iterdir()} - held
    assert "2 of 13 unlabelled images are held out" in caplog.text


def test_the_same_file_under_another_id_is_held_out_too(world, tmp_path):
    """A split file's ids are paths, a folder's are names: the address tells."""
    lines = [f"labelled/l{n:03}.png masks/l{n:03}.png" for n in range(10)]
    split = tmp_path / "split.txt"
    split.write_text("\n".join(lines))
    data = TrainingData.open(
        config_of(
            world,
            labeled=str(split),
            labeled_masks=None,
            root=str(world),
            unlabeled=str(world / "labelled"),
            zeroshot=None,
            classes="cat,dog",
        )
    )
    assert len(data.unlabelled) == 8
    assert not set(data.unlabelled["uri"].to_pylist()) & set(data.validation["uri"].to_pylist())


def test_labelled_images_in_val_are_warned_of(world, caplog):
    TrainingData.open(config_of(world, val=str(world / "labelled"), val_masks=str(world / "masks")))
    assert "10 of 10 labelled images are also in --val" in caplog.text


def test_missing_zero_shot_labels_are_counted(world, tmp_path, caplog):
    run = write_run(tmp_path / "run", [[label_row("u104.png", mask(104))]])
    config = config_of(world, zeroshot=str(run))
    data = TrainingData.open(config)
    assert "11 of 12 unlabelled images have no zero-shot label, such as u100.png" in caplog.text
    ((batch,),) = batches(
        data, config_of(world, **{"train.batch_unlabeled": 12}), first_step=0, steps=1
    )
    labelled = (batch.u_label_BHW != 255).flatten(1).any(1)
    assert batch.u_image_BCHW[labelled][:, 0].amax((1, 2)).tolist() == [104]


def test_zero_shot_labels_are_found_by_id_and_the_first_counts(tmp_path):
    rows = [label_row("sub/a.jpg", mask(1), 0.2), label_row("b", mask(2), 0.4)]
    twice = [label_row("sub/a.png", mask(3), 0.9)]
    run = write_run(tmp_path / "run", (rows, twice))
    first = RunFolder(str(run)).parts("labels")[0]
    a_is_in_rows = len(RunFolder(str(run)).read_part("labels", first)) == 2
    found = find_labels(str(run), ["b.png", "sub/a.jpeg", "a.jpg"])
    assert found.label_uris[2] is None and found.score_uris[2] is None
    assert found.classes == CLASSES
    label_HW, score_HW = read_label(str(found.label_uris[0]), str(found.score_uris[0]))
    assert (label_HW == mask(2)).all() and (score_HW == 102).all()
    label_HW, score_HW = read_label(str(found.label_uris[1]), str(found.score_uris[1]))
    number, score = (1, 51) if a_is_in_rows else (3, 230)
    assert (label_HW == mask(number)).all() and (score_HW == score).all()


def test_zero_shot_labels_of_a_folder_serve_a_split_file(world, tmp_path):
    """The ids differ (u100.png and unlabelled/u100.png); the address tells."""
    rows = [label_row(f"u{n}.png", mask(n)) for n in range(100, 112)]
    for row in rows:
        row["uri"] = str(world / "unlabelled" / row["image_id"])
    run = write_run(tmp_path / "run", [rows])
    split = tmp_path / "split.txt"
    split.write_text("".join(f"unlabelled/u{n}.png\n" for n in range(101, 105)))
    data = TrainingData.open(
        config_of(world, unlabeled=str(split), root=str(world), zeroshot=str(run))
    )
    assert data.unlabelled["label_uri"].null_count == 0
    row = data.unlabelled.slice(2, 1).to_pylist()[0]
    assert row["image_id"] == "unlabelled/u103.png"
    assert (read_label(row["label_uri"], row["score_uri"])[0] == mask(103)).all()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"labeled_masks": None}, r"labeled must be a source whose.*8-bit RGB.*--labeled-masks"),
        ({"labeled": "MADE/one"}, r"labeled must be images that all have masks, got 1 of 11 .*x9"),
        ({"labeled": "MADE/nowhere"}, "labeled must be something that exists"),
        ({"labeled": "MADE/empty"}, "labeled must be a source with images in it"),
        ({"unlabeled": None}, "unlabeled must be given with zeroshot"),
        ({"zeroshot": "MADE/other"}, "zeroshot must be labels of the unlabelled images"),
        ({"zeroshot": "MADE/half"}, "zeroshot must be whole, got a half relabelled run"),
        ({"zeroshot": "MADE/empty"}, "zeroshot must be a run's folder with labels/ in it"),
        ({"zeroshot": "MADE/torn"}, "zeroshot must be a run whose parts can be read"),
        ({"zeroshot": None}, "classes must be given, got nothing; add --classes"),
        ({"classes": "cat,cow"}, "class 2 is cow, got dog in the zero-shot labels"),
        ({"classes": "cat"}, "class 2 is nothing, got dog in the zero-shot labels"),
        ({"zeroshot": None, "classes": "cat"}, r"mask of l\d+.png must be of class"),
        (
            {"unlabeled": "WORLD/labelled", "val": "WORLD/labelled", "val_masks": "WORLD/masks"},
            "unlabeled must be images that may be trained on, got all 10",
        ),
        ({"val": "WORLD/unlabelled", "val_masks": "WORLD/masks"}, "val must be images that all"),
    ],
)
def test_what_is_wrong_with_sources_is_told_in_one_line(world, tmp_path, changes, text):
    write_images(write_images(tmp_path / "one", range(10), "l"), [9], "x9")
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "other", [[label_row("elsewhere.png", mask(0))]])
    rows = [label_row(f"u{n}.png", mask(n)) for n in range(100, 112)]
    write_run(tmp_path / "half", [rows], state="relabelling")
    torn = write_run(tmp_path / "torn", [rows])
    (part,) = (torn / "labels").iterdir()
    os.truncate(part, part.stat().st_size // 2)
    for word, folder in (("MADE", tmp_path), ("WORLD", world)):
        changes = {k: v and v.replace(word, str(folder)) for k, v in changes.items()}
    with pytest.raises(ValueError, match=text) as e:
        TrainingData.open(config_of(world, **changes))
    assert "\n" not in str(e.value) and "; " in str(e.value)


def test_class_lists_agree_by_name_whatever_their_aliases():
    plain, more = class_list("cat,dog"), ClassList.of(("cat", "dog"), {"cat": ["kitten"]})
    assert agreed_classes({"a": None, "b": more, "c": plain}) is more


def test_one_damaged_mask_does_not_keep_training_from_starting(own):
    (own / "masks/l000.png").write_bytes(b"")
    assert len(TrainingData.open(config_of(own, **{"train.holdout": 0.0})).labelled) == 4
