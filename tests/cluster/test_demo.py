"""`demo`: the whole pipeline on a few scenes, through the command line."""

import io

import pytest
from PIL import Image

from zsplg_ray import cli

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_local")]


def test_demo_prints_scores_and_makes_pictures_and_a_page(tmp_path, capsys):
    command = ["demo", "--out", str(tmp_path / "demo"), "--n", "12", "--epochs", "2"]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    for run in ("crop_12", "gem_12", "enhanced_12_2"):
        sheet = tmp_path / "demo" / run / "pictures.png"
        assert str(sheet) in told
        assert min(Image.open(io.BytesIO(sheet.read_bytes())).size) > 300
    scores = [float(line.split()[1]) for line in told.splitlines() if line.startswith("miou")]
    assert len(scores) == 3 and min(scores) > 0.3
    page = tmp_path / "demo" / "report.html"
    assert told.splitlines()[-1] == f"look at it all: {page.as_uri()}"
    assert all(run in page.read_text() for run in ("crop_12", "gem_12", "enhanced_12_2"))
    for student in ("unimatch", "fused"):
        assert any(line.startswith(f"{student} ") and "mIoU" in line for line in told.splitlines())
        assert (tmp_path / "demo" / f"{student}_12_2" / "best.pt").exists()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "demo").rglob("*.parquet")}
    assert cli.main(command) == 0  # does only what is missing, and tells the same
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "demo").rglob("*.parquet")}
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("miou")] == [
        line for line in told.splitlines() if line.startswith("miou")
    ]
