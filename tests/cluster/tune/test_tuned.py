"""tuned.yaml: what is read back is what was written, under comments."""

import yaml

from zsplg_ray.cluster.tune.tuned import NAME, tuned_file, write_tuned
from zsplg_ray.config import ComposeConfig, LabelConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import flatten, from_mapping


def test_settings_come_back(tmp_path):
    values = {
        "compose.min_similarity": {"cat": 0.31, "*": 0.2},
        "compose.min_area_px": 12,
        "prompts.templates": ("a {class}: 50 %", "ein {class}, schön"),
        "clip.model": "local-dir:/x y",
        "clip.embedder": "gem",
    }
    write_tuned(RunFolder(str(tmp_path)), values, ["made on\nMonday", "# by hand", ""])
    text = (tmp_path / NAME).read_text(encoding="utf-8")
    assert text.startswith("# made on Monday\n# # by hand\n#\ncompose:\n")
    given = {"images": "x", "classes": "cat", "out": "y"}
    made = flatten(from_mapping(LabelConfig, {**given, **yaml.safe_load(text)}))
    assert {k: made[k] for k in values} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in values.items()
    }
    assert made["compose.order"] == ComposeConfig().order


def test_its_place_is_one_that_config_takes():
    assert tuned_file("my run/") == "my run/tuned.yaml"
    store = "s3://bucket/run?endpoint_override=http%3A%2F%2Fhere"
    assert tuned_file(store) == store.replace("?", "/tuned.yaml?")


def test_a_newer_file_takes_the_place_of_the_older(tmp_path):
    folder = RunFolder(str(tmp_path))
    write_tuned(folder, {"a.b": 1}, [])
    write_tuned(folder, {"a.c": 2}, [])
    assert yaml.safe_load((tmp_path / NAME).read_text()) == {"a": {"c": 2}}
    assert [p.name for p in tmp_path.iterdir()] == [NAME]
