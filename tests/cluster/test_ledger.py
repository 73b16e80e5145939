"""Who is blamed when a process dies. The book and those who write in it, without Ray."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from zsplg_ray.cluster import decode
from zsplg_ray.cluster.actor import ImageActor, Job
from zsplg_ray.cluster.ledger import MAX_KILLS, LedgerBook
from zsplg_ray.config import PredictConfig
from zsplg_ray.records import LABELS
from zsplg_ray.rundir import RunFolder, part_name


def test_an_image_begun_and_never_finished_is_to_blame():
    book = LedgerBook()
    assert book.open("label", ["a", "b"]) == {"a": 0, "b": 0}
    book.begin("label", ["a"])
    assert book.open("label", ["a", "b"]) == {"a": 1, "b": 0}
    book.begin("label", ["a"])
    assert book.open("label", ["a"]) == {"a": 2}


def test_an_image_that_was_finished_is_innocent():
    book = LedgerBook()
    book.begin("label", ["a"])
    book.finish("label", ["a"])
    book.finish("label", ["never begun"])
    assert book.open("label", ["a", "never begun"]) == {"a": 0, "never begun": 0}
    book.begin("label", ["a"])
    assert book.open("label", ["a"]) == {"a": 1}, "finishing cleared more than what was begun"


def test_stages_are_apart():
    book = LedgerBook()
    book.begin("decode", ["a"])
    assert (book.open("decode", ["a"]), book.open("label", ["a"])) == ({"a": 1}, {"a": 0})
    book.finish("label", ["a"])
    assert book.open("decode", ["a"]) == {"a": 1}


def test_what_is_written_is_not_open_at_any_stage():
    book = LedgerBook()
    book.begin("label", ["a"])
    book.commit("label", ["a", "b"])
    for stage in ("decode", "label"):
        assert book.open(stage, ["a", "b", "c"]) == {"c": 0}


def test_looking_notes_nothing():
    book = LedgerBook()
    book.open("label", [str(i) for i in range(1000)])
    assert not book.begun and not book.committed


def test_the_one_that_kills_is_found_and_its_neighbours_are_done():
    """A task of five images, of which the third kills its process each time it is tried."""
    book, done, deaths = LedgerBook(), [], 0
    while todo := book.open("label", list("abXcd")):
        for image in sorted(todo, key=lambda i: todo[i]):  # suspects last, as the actor does
            if todo[image] >= MAX_KILLS:
                book.commit("label", [image])  # quarantined
                continue
            book.begin("label", [image])
            if image == "X":
                deaths += 1
                break
            done.append(image)
            book.commit("label", [image])
        assert deaths <= MAX_KILLS, "tried for ever"
    assert sorted(done) == list("abcd") and deaths == MAX_KILLS


def test_entering_notes_the_innocent_together_and_leaves_suspects_to_be_noted_alone():
    book = LedgerBook()
    book.commit("label", ["written"])
    assert book.enter("decode", ["a", "b", "written"]) == {"a": 0, "b": 0}
    assert book.open("decode", ["a", "b"]) == {"a": 1, "b": 1}, "noted before the work begins"
    assert book.enter("decode", ["a", "b", "c"]) == {"a": 1, "b": 1, "c": 0}
    assert book.open("decode", ["a", "b", "c"]) == {"a": 1, "b": 1, "c": 1}, "suspects twice"


def test_written_is_innocent_at_its_stage():
    book = LedgerBook()
    book.begin("decode", ["a"])
    book.begin("label", ["a", "b"])
    book.commit("label", ["a"])
    assert set(book.begun) == {("decode", "a"), ("label", "b")}


class Here:
    """A ledger without Ray that counts its calls."""

    def __init__(self):
        self.book, self.calls = LedgerBook(), []

    def __getattr__(self, name):
        def call(*args):
            self.calls.append(name)
            return getattr(self.book, name)(*args)

        return call


def here() -> Any:
    return Here()


def block_of(tmp_path, names):
    for name in names:
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / f"{name}.png")
    uris = [str(tmp_path / f"{name}.png") for name in names]
    return pa.table({"image_id": list(names), "uri": uris})


class Killed(BaseException):
    """Stands for the death of the process."""


def read_all(block, ledger, killers, monkeypatch):
    """Decode a block as Ray would: again and again, until no process dies; deaths, errors."""
    decoded = decode.decode_row

    def dying(row, max_px):
        if row["image_id"] in killers:
            raise Killed
        return decoded(row, max_px)

    monkeypatch.setattr(decode, "decode_row", dying)
    for deaths in range(20):
        try:
            tables = list(decode.decode_block(block, 100, ledger))
        except Killed:
            continue
        return deaths, {t["image_id"][0].as_py(): t["error"][0].as_py() for t in tables}
    raise AssertionError("tried for ever")


def test_reading_a_block_takes_two_calls_and_finds_who_kills(tmp_path, monkeypatch):
    names = list("abcdefgh")
    quiet = here()
    deaths, errors = read_all(block_of(tmp_path, names), quiet, (), monkeypatch)
    assert quiet.calls == ["enter", "finish"] and deaths == 0
    assert set(errors.values()) == {None} and not quiet.book.begun

    ledger = here()
    deaths, errors = read_all(block_of(tmp_path, names), ledger, ("c", "g"), monkeypatch)
    assert {i for i, error in errors.items() if error} == {"c", "g"}
    assert deaths <= 2 * MAX_KILLS and list(errors) == names
    assert errors["c"] == f"killed its process {MAX_KILLS} times while it was read"


class Trivial:
    """A verb that writes one label an image, at once."""

    verb, images_at_once, weights = "predict", 1, None

    @property
    def schemas(self):
        return {"labels": LABELS}

    def load(self, device):
        return self

    def process(self, images, pixels):
        return [None] * len(images)

    def rows(self, image, result):
        return {"labels": {"image_id": image["image_id"], "uri": image["uri"]}}


def test_an_actor_makes_little_more_than_a_call_an_image_and_tells_what_it_wrote(tmp_path):
    names = [f"{i:02}" for i in range(16)]
    ledger, folder = here(), RunFolder(str(tmp_path / "run"))
    block = pa.concat_tables(decode.decode_block(block_of(tmp_path, names), 100, ledger))
    ledger.calls.clear()
    config = PredictConfig(model="m", images="i", out="o", device="cpu")
    job = Job(config, Trivial(), folder, {}, {})  # type: ignore[arg-type]
    actor = object.__new__(ImageActor)
    actor.job, actor.ledger, actor.stage, actor.worker = job, ledger, "predict", Trivial()
    actor._come_to_work()
    (counts,) = actor(block).to_pylist()
    assert Counter(ledger.calls) == {"open": 2, "begin": 16, "commit": 1}
    assert not ledger.book.begun and ledger.book.committed == set(names)

    (written,) = counts.pop("written")
    assert 0 <= counts.pop("busy_s") <= counts.pop("alive_s")
    assert counts == {"labelled": 16, "failed": 0, "actor": actor.name, "through": 16}
    name = part_name(names)
    size = folder.listing("labels")[name].size
    assert written == {"kind": "labels", "name": name, "size": size, "image_ids": names}


class Late(Trivial):
    """Its process dies of one image only after the model is through with it."""

    def __init__(self, killer):
        self.killer = killer

    def rows(self, image, result):
        if image["image_id"] == self.killer:
            raise Killed
        return super().rows(image, result)


def test_an_image_of_which_its_process_dies_late_is_found_too(tmp_path):
    names = list("abXcd")
    ledger, folder = here(), RunFolder(str(tmp_path / "run"))
    block = pa.concat_tables(decode.decode_block(block_of(tmp_path, names), 100, ledger))
    config = PredictConfig(model="m", images="i", out="o", device="cpu")
    deaths = 0
    while True:  # as Ray would
        actor = object.__new__(ImageActor)
        actor.job = Job(config, Late("X"), folder, {}, {})  # type: ignore[arg-type]
        actor.ledger, actor.stage, actor.worker = ledger, "predict", Late("X")
        actor._come_to_work()
        try:
            actor(block)
            break
        except Killed:
            deaths += 1
            assert deaths <= MAX_KILLS, "tried for ever"
    labels, errors = folder.read("labels"), folder.read("errors")
    assert labels is not None and sorted(labels["image_id"].to_pylist()) == list("abcd")
    assert errors is not None and errors["image_id"].to_pylist() == ["X"]
