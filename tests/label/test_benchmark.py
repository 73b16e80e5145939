"""The benchmark runs, on the tiny model, and both sides of every stage agree."""

import json
import re

import pytest

from zsplg_ray.label import benchmark, stages

QUICK = ["--sam", "shapes", "--points", "4", "--width", "120", "--height", "100", "--rounds", "1"]


def rows(capsys, *arguments: str) -> dict[str, dict]:
    assert benchmark.main([*QUICK, *arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["unit"] == "CPU s" and told["points"] == 4
    for row in told["rows"]:
        assert row["official"] > 0 and row["ratio"] == pytest.approx(row["official"] / row["ours"])
    return {row["stage"]: row for row in told["rows"]}


def test_encoder_decoder_and_pooling_agree(capsys):
    found = rows(capsys, "--stages", "encoder", "decoder", "pooling")
    exact = re.fullmatch(r"relative (.*)", found.pop("encoder float32")["same"])
    assert exact and float(exact[1]) < 1e-5
    half = re.fullmatch(r"relative (.*)", found.pop("encoder bfloat16")["same"])
    assert half and 1e-4 < float(half[1]) < 0.1
    kept = re.match(r"(\d+) of 48 kept, largest gap (\S+)", found.pop("decoder, 16 points")["same"])
    assert kept and 0 < int(kept[1]) < 48 and float(kept[2]) < 1e-4
    assert len(found) == 2
    for row in found.values():
        assert float(row["same"].removeprefix("relative ")) < 1e-5


def test_fed_masks_give_identical_records_on_both_sides(capsys):
    found = rows(capsys, "--stages", "post-processing", "whole", "records", "throughput")
    assert {"post-processing D", "post-processing S", "whole image float32"} <= set(found)
    fed = {k: v["same"] for k, v in found.items() if not k.startswith("records")}
    for stage, same in fed.items():
        assert re.search(r"[1-9]\d* records bit-identical", same), (stage, same)
    for layers in (0, 1):
        same = found[f"records, {layers} crop layers, regions of 0 px"]["same"]
        n = re.match(r"\d+", same)
        assert n and int(n[0]) >= 48
        assert same.startswith((f"{n[0]} records bit-", f"{n[0]}/{n[0]} records, {n[0]} in order"))


def test_nothing_of_the_scene_is_left_changed():
    scene = stages.Scene("shapes", None, "cpu", 4, (100, 120), None)
    head = scene.model.mask_decoder.iou_prediction_head
    for pair in stages.whole(scene):
        pair.official()
        pair.ours()
    assert scene.model.mask_decoder.iou_prediction_head is head
    assert not scene.model.mask_decoder._forward_hooks


def test_a_table_for_people(capsys):
    assert benchmark.main([*QUICK, "--stages", "pooling"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "shapes on cpu, 1 threads, default malloc" in lines[0]
    assert re.search(r"pooling 60 masks, weights +\S+ +\S+ +\d+\.\dx  relative", lines[2])


def test_operations_are_counted_as_published():
    scene = stages.Scene("vit_b", None, "cpu", 32, (480, 640), None)
    assert stages.official_tflop(scene) == pytest.approx(0.97 + 3.71, rel=0.01)


def test_peak_memory_of_both_sides(capsys):
    (row,) = rows(capsys, "--stages", "memory").values()
    assert 0 < row["official"] < 4 and 0 < row["ours"] < 4


def test_a_device_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--device", "cuda:7"])
    assert stopped.value.code == 2 and "--device must be" in capsys.readouterr().err
