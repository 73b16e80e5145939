"""What of a working directory a job gets, and which places it will find."""

import errno
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zsplg_ray import cli, config
from zsplg_ray.cluster.submit.places import NO_PLACES, check_places, holds_text
from zsplg_ray.cluster.submit.sent import HIDDEN, check_size, choose, pack
from zsplg_ray.settings import is_section, setting_types

SENT = {"a.yaml": "x", "lists/classes.txt": "cat", "lists/deep/split.txt": "a.jpg", "x y'$.txt": ""}
LEFT = {
    ".git/config": HIDDEN,
    ".hidden": HIDDEN,
    "__pycache__/a.pyc": HIDDEN,
    "venv/pyvenv.cfg": "a virtual environment",
    "venv/lib/x.py": "a virtual environment",
    "run/run.json": "a run's folder",
    "old/labels/part-00.parquet": "a run's folder",
    "model/train.json": "a run's folder",
    "photos/a.JPG": "an image",
    "photos/b.png": "an image",
    "sam.pth": "weights",
    "lists/best.safetensors": "weights",
    "mlflow.db": "MLflow's store",
    "zsplg_ray/cli.py": "the package, which is sent as it is installed",
    "secret.key": "it is in .gitignore",
    "build/x/y.txt": "it is in .gitignore",
    "lists/deep/big.csv": "it is in lists/.gitignore",
    "notes/n.txt": "it is in --exclude",
    "lists/scratch.txt": "it is in --exclude",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def folder(tmp_path):
    ignore = {".gitignore": "*.key\nbuild/\n", "lists/.gitignore": "*.csv\n"}
    return write(tmp_path / "work", {**SENT, **dict.fromkeys(LEFT, "y" * 1000), **ignore})


def chosen(folder: Path):
    return choose(folder, ["notes/", "scratch*"], package="zsplg_ray")


def test_texts_go_and_data_weights_runs_and_ignored_files_stay(folder):
    sent = chosen(folder)
    assert dict(sent.files) == {name: len(content) for name, content in SENT.items()}
    assert sent.size == sum(map(len, SENT.values()))
    for name, why in LEFT.items():
        told = sent.lacks(name)
        assert told is not None and told.endswith(f" stays here: {why}"), name


def test_what_is_whole_and_what_is_not(folder):
    sent = chosen(folder)
    assert sent.lacks("a.yaml") is None and sent.lacks("./lists/../a.yaml") is None
    assert sent.lacks("lists/deep") == "lists/deep/big.csv stays here: it is in lists/.gitignore"
    assert sent.lacks("photos/") == "photos/a.JPG stays here: an image"
    assert sent.lacks("none.txt") == "there is nothing at none.txt in it"
    assert sent.lacks("../a.yaml") == "../a.yaml lies outside of it"
    (folder / "lists/deep/big.csv").unlink()
    assert chosen(folder).lacks("lists/deep") is None


@pytest.mark.parametrize("odd", ["!", "\\", "a\\", "[z-a]"])
def test_lines_that_git_passes_over_are_passed_over(folder, odd):
    write(folder, {".rayignore": f"{odd}\na.yaml\n"})
    assert chosen(folder).lacks("a.yaml") == "a.yaml stays here: it is in .rayignore"
    told = f"exclude must be patterns as in .gitignore, got {odd}; mend it"
    with pytest.raises(ValueError, match=re.escape(told)):
        choose(folder, ["notes/", odd])


def test_a_run_is_not_sent_even_from_inside_its_folder(folder):
    files = {"run.json": "{}", "labels/part-00.parquet": "p", "preview.png": "", "classes.txt": ""}
    run = write(folder / "inside", files)
    sent = choose(run)
    assert list(sent.files) == ["classes.txt"]
    assert sent.lacks("run.json") == "run.json stays here: a file of a run"
    assert sent.lacks(".") == "labels/part-00.parquet stays here: a file of a run"
    assert not choose(run / "labels").files


def test_a_folder_that_may_not_be_read_is_named(folder, monkeypatch):
    shut = write(folder / "lists/vol", {"x.txt": ""})

    def guarded(do: Any) -> Any:
        def guard(path: Any, *more: Any, **named: Any) -> Any:
            if shut in Path(path).parents or (do is os.scandir and Path(path) == shut):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return do(path, *more, **named)

        return guard

    monkeypatch.setattr(Path, "is_file", guarded(Path.is_file))
    monkeypatch.setattr(os, "scandir", guarded(os.scandir))
    told = f"working_dir must be readable, got {shut}; --exclude it or make it readable (Perm"
    with pytest.raises(ValueError, match=re.escape(told)):
        choose(folder)
    assert "a.yaml" in choose(folder, ["vol"]).files


def test_the_zip_holds_just_that_and_is_the_same_again(folder, tmp_path):
    sent = chosen(folder)
    size = pack(sent, tmp_path / "one.zip")
    os.utime(folder / "a.yaml", (1, 1))
    pack(chosen(folder), tmp_path / "two.zip")
    assert size == (tmp_path / "one.zip").stat().st_size
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert {n: archive.read(n).decode() for n in archive.namelist()} == SENT


def test_links_are_followed_but_not_in_circles(folder, tmp_path):
    write(tmp_path / "elsewhere", {"more.txt": "m"})
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "lists" / "up").symlink_to(folder)
    (folder / "dead").symlink_to(folder / "nothing")
    assert dict(chosen(folder).files) == {
        **{n: len(c) for n, c in SENT.items()},
        "link/more.txt": 1,
    }


def test_a_folder_too_large_is_refused_and_its_biggest_entries_are_named(folder):
    write(folder, {"big/one.txt": "x" * 2_000_000, "table.csv": "x" * 700_000})
    sent = chosen(folder)
    check_size(sent, 3)
    with pytest.raises(ValueError) as caught:
        check_size(sent, 1)
    told = str(caught.value)
    assert told.startswith("working_dir must be a folder with at most 1 MiB to send, got 2.6 MiB")
    assert "most in big/ 1.9 MiB, table.csv 0.7 MiB" in told and "--exclude" in told


def test_a_giant_tree_is_not_walked_for_ever(folder, monkeypatch):
    write(folder, {f"many/{i}.txt": "" for i in range(60)})
    monkeypatch.setattr("zsplg_ray.cluster.submit.sent.MAX_ENTRIES", 50)
    with pytest.raises(ValueError, match=r"at most 50 files, got more .*many/ has the most"):
        choose(folder)
    assert choose(folder, ["many"]).files


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="working_dir must be a folder, got"):
        choose(tmp_path / "none")


# Places ------------------------------------------------------------------------------------------


def label(**given) -> config.LabelConfig:
    usual = {"images": "s3://b/photos", "classes": "voc", "out": "s3://b/run"}
    return config.LabelConfig(**{**usual, **given})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (label(out="run"), "out must be an address or an absolute path in a job"),
        (label(images="photos"), "got photos (photos/a.JPG stays here: an image)"),
        (label(images="photos/**/*.jpg"), "got photos/**/*.jpg (photos/a.JPG stays here"),
        (label(images="typo"), "got typo (there is nothing at typo in it)"),
        (label(images="../x"), "got ../x (../x lies outside of it)"),
        (label(classes="names.txt"), "classes must be an address, an absolute path, or in the"),
        (label(root="photos"), "root must be an address"),
        (label(sam=config.SamConfig(checkpoint="sam.pth")), "sam.pth stays here: weights"),
        (label(clip=config.ClipConfig(model="local-dir:clip")), "got clip (there is nothing"),
        (label(clip=config.ClipConfig(model="ViT/sam.pth")), "got sam.pth (sam.pth stays here"),
        (label(mlflow=config.MlflowConfig(uri="sqlite:///m.db")), "mlflow.uri must be an address"),
        (label(mlflow=config.MlflowConfig(uri="mlruns")), "mlflow.uri must be an address"),
        (label(mlflow=config.MlflowConfig(uri="sqlite+pysqlite:///m.db")), "mlflow.uri must be an"),
        (config.RelabelConfig(run="run"), "got run (run stays here: a run's folder)"),
        (config.TuneLabelsConfig(run=("/r", "old"), truth="/t"), "old stays here: a run's"),
        (config.TrainConfig(labeled="/l", zeroshot="run", out="/o"), "zeroshot must be"),
        (config.EvaluateConfig(labels="model", truth="/t"), "model stays here: a run's folder"),
        (config.DemoConfig(), "got zsplg_demo; give --out"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_places_that_a_job_would_not_find_are_refused(folder, settings, told):
    with pytest.raises(ValueError) as caught:
        check_places(settings, None, chosen(folder))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "shared"),
    [
        (label(), []),
        (label(images="/p", out="file:///o"), ["images /p", "out file:///o"]),
        (label(images="lists/deep/split.txt", root="~/d"), ["root ~/d"]),
        (label(classes="lists/classes.txt"), []),
        (label(classes="photos,cat"), []),
        (label(classes="cat"), []),
        (label(classes="coco"), []),  # there are folders of these names too
        (label(classes="run"), []),
        (label(clip=config.ClipConfig(model="ViT-B-16/photos")), []),
        (label(clip=config.ClipConfig(model="hf-hub:o/a.yaml")), []),
        (label(clip=config.ClipConfig(model="ViT-B-16/~/c.pt")), ["clip.model ~/c.pt"]),
        (label(sam=config.SamConfig(checkpoint="/w/sam.pth")), ["sam.checkpoint /w/sam.pth"]),
        (label(clip=config.ClipConfig(model="ViT-B-16//w/c.pt")), ["clip.model /w/c.pt"]),
        (label(mlflow=config.MlflowConfig(uri="off", experiment="photos")), []),
        (label(mlflow=config.MlflowConfig(uri="http://m:5000")), []),
        (label(mlflow=config.MlflowConfig(uri="sqlite:////x/m.db")), []),
        (label(mlflow=config.MlflowConfig(uri="databricks")), []),
        (label(mlflow=config.MlflowConfig(uri="databricks-uc")), []),
        (label(mlflow=config.MlflowConfig(uri="uc")), []),
        (label(mlflow=config.MlflowConfig(uri="postgresql:///mlflow?host=/run/pg")), []),
        (config.TrainConfig(labeled="/l", out="s3://o"), ["labeled /l"]),
        (config.DoctorConfig(), []),
    ],
)
def test_places_that_a_job_finds(folder, settings, shared):
    (folder / "lists/deep/big.csv").unlink()
    write(folder, {"coco/a.jpg": ""})
    assert check_places(settings, None, chosen(folder)) == shared


def test_the_config_file_goes_along_and_is_the_one_that_was_read(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    assert check_places(label(), "a.yaml", chosen(folder)) == []
    assert check_places(label(), "/x/a.yaml", chosen(folder)) == ["config /x/a.yaml"]
    with pytest.raises(ValueError, match="config must be an address"):
        check_places(label(), "b.yaml", chosen(folder))
    monkeypatch.chdir(write(tmp_path / "other", {"a.yaml": "z"}))
    with pytest.raises(ValueError, match="the one that was read here is not the one in"):
        check_places(label(), "a.yaml", chosen(folder))


def test_without_a_working_directory_nothing_is_relative():
    with pytest.raises(ValueError, match="no working directory is sent"):
        check_places(label(images="photos"), None, None)
    assert check_places(label(images="/p"), None, None) == ["images /p"]


KNOWN = {
    *("images", "classes", "out", "root", "run", "truth", "labeled", "labeled_masks", "unlabeled"),
    *("zeroshot", "val", "val_masks", "model", "fuse", "labels", "sam.checkpoint", "clip.model"),
    *("student.init", "mlflow.uri", "compare", "ids", "to", "corrected", "masks", "merged"),
}
"""Texts that somebody has thought about: places, or names that may be files."""


def free_texts(cls: type, prefix: str = "") -> Iterator[str]:
    for name, hint in setting_types(cls).items():
        if is_section(hint):
            yield from free_texts(hint, f"{prefix}{name}.")
        elif holds_text(hint):
            yield f"{prefix}{name}"


@pytest.mark.parametrize("verb", [v for v in cli.VERBS if v != cli.SUBMIT])
def test_every_text_of_every_verb_is_known_as_a_place_or_as_none(verb):
    """A new setting: is it a place? Then add it to KNOWN. Else it belongs into NO_PLACES."""
    assert set(free_texts(cli.VERBS[verb][0])) <= KNOWN | NO_PLACES
