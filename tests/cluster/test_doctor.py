"""`doctor` says what is there, what is missing and how to mend it, and leaves nothing behind."""

import json
import re

import pytest

from zsplg_ray import cli
from zsplg_ray.cluster.doctor.examine import examine
from zsplg_ray.config import DoctorConfig
from zsplg_ray.label.weights import OFFICIAL
from zsplg_ray.settings import from_mapping

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


def looked(**settings):
    findings = examine(from_mapping(DoctorConfig, settings))
    return {f["what"]: f for f in findings}


def test_the_shapes_world_needs_nothing(tmp_path):
    out = tmp_path / "new" / "run"
    found = looked(sam="shapes", clip="shapes", out=str(out))
    assert {f["state"] for f in found.values()} <= {"ok", "warn"}
    assert found["sam"]["state"] == found["clip"]["state"] == found["storage"]["state"] == "ok"
    assert "4 CPUs" in found["ray"]["told"]
    assert re.search(r"sam.memory_gib .* on \w+: \d+ images, \d+ points", found["memory"]["told"])
    assert not out.exists()


def test_what_is_missing_is_named_with_its_fix(tmp_path, monkeypatch):
    monkeypatch.setenv("ZSPLG_CACHE", str(tmp_path))
    found = looked(sam="vit_b", clip="ViT-B-61/openai", out=str(tmp_path))
    assert found["sam"]["state"] == "warn" and OFFICIAL["vit_b"].url in found["sam"]["fix"]
    assert found["clip"]["state"] == "fail" and "ViT-B-16" in found["clip"]["fix"]
    (tmp_path / OFFICIAL["vit_b"].name).write_bytes(b"half a download")
    assert looked(sam="vit_b", clip="shapes")["sam"]["state"] == "fail"
    gone = looked(**{"sam.checkpoint": str(tmp_path / "no.pth"), "clip.model": "shapes"})
    assert gone["sam"]["state"] == "fail" and "no.pth" in gone["sam"]["told"]


def test_how_many_images_go_together_follows_the_memory_given(monkeypatch):
    def images(gib, model="vit_b"):
        told = looked(**{"sam.model": model, "sam.memory_gib": gib, "clip.model": "shapes"})
        return int(re.findall(r"(\d+) images", told["memory"]["told"])[0]), told["memory"]["state"]

    assert images(0.1) == (1, "warn"), "less than one image needs"
    few, many = images(4)[0], images(40)[0]
    assert 1 < few < many and images(4, "shapes")[0] > few


def test_exit_code_and_json(tmp_path, capsys):
    good = ["doctor", "--sam", "shapes", "--clip", "shapes", "--out", str(tmp_path), "--json"]
    assert cli.main(good) == 0
    assert {f["what"] for f in json.loads(capsys.readouterr().out)} >= {"gpu", "ray", "storage"}
    assert cli.main(["doctor", "--sam-checkpoint", str(tmp_path / "no.pth")]) == 1
    assert "fail" in capsys.readouterr().out
