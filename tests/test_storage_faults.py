"""Stores that fail: single requests, half transfers, long outages, and errors that stay."""

import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.s3 import FAULTS
from zsplg_ray import filesystems
from zsplg_ray.exactly_once import repair
from zsplg_ray.filesystems import BadAddress, StoreError, open_store
from zsplg_ray.rundir import RunFolder, part_name
from zsplg_ray.storage import Place, cell_uris, read_bytes

LARGE = bytes(range(256)) * 50_000  # 12.8 MB: more than one part of an upload


def table(ids):
    return pa.table({"image_id": ids, "uri": [f"uri of {i}" for i in ids]})


def use(folder: RunFolder, place: Place) -> None:
    """Every operation that runs do on a store, with what must come of it."""
    for n in range(6):
        ids = [f"{n}-{i}" for i in range(3)]
        folder.write_part("labels", part_name(ids), table(ids), {"n": n})
        if n:  # the first one has no commit
            folder.write_part("segments", part_name(ids), table(ids), {"n": n})
    found = repair(folder)
    wanted = {f"{n}-{i}" for n in range(1, 6) for i in range(3)}
    assert found.done == wanted and not found.unlabelled
    for kind in ("labels", "segments"):
        read = folder.read(kind)
        assert read is not None and sorted(read["image_id"].to_pylist()) == sorted(wanted)
    folder.write_bytes("large.bin", LARGE)
    assert folder.read_bytes("large.bin") == LARGE == place.child("large.bin").read()
    folder.fs.copy_file(f"{folder.path}/large.bin", f"{folder.path}/copy.bin")
    assert place.child("copy.bin").stamp()[0] == len(LARGE)
    assert folder.read_bytes("none") is None and place.child("none").kind() is None
    part = f"segments/{part_name([f'1-{i}' for i in range(3)])}.parquet"
    uris = cell_uris(place.child(part), "uri", 3)
    with pytest.raises(ValueError, match="holds bytes"):  # text: but it was read
        read_bytes(uris[0])
    assert len([p for p in place.walk() if p.endswith("parquet")]) == 10
    folder.fs.delete_dir(f"{folder.path}/segments")
    assert folder.parts("segments") == [] and len(folder.parts("labels")) == 5


@pytest.mark.parametrize("seed", range(2))
def test_one_request_of_five_fails_in_some_way_and_nobody_notices(bucket, faulty, seed):
    with faulty(share=0.2, seed=seed) as proxy:
        use(RunFolder(bucket.uri("run", proxy)), Place.parse(bucket.uri("run", proxy)))
    assert len(proxy.failed) >= 5 and proxy.failed.total() > 10
    files = bucket.files("run")
    assert files["run/large.bin"] == files["run/copy.bin"] == LARGE
    assert len(files) == 2 + 5


def test_a_write_that_fails_for_good_leaves_nothing_to_read(bucket, faulty, monkeypatch):
    monkeypatch.setattr(filesystems, "PATIENCE_S", 0.0)
    with faulty(share=1.0, faults=("half",), only=lambda _, path: "partNumber=2" in path) as proxy:
        folder = RunFolder(bucket.uri("run", proxy))
        folder.write_bytes("old.bin", b"old")
        with pytest.raises(StoreError, match=r"got s3://.*/old.bin .*; mend it; the same command"):
            folder.write_bytes("old.bin", LARGE)
        assert proxy.asked["CompleteMultipartUpload"] == 0 < proxy.asked["UploadPart"]
    assert bucket.files() == {"run/old.bin": b"old"}


def test_an_outage_is_waited_for(bucket, faulty, monkeypatch, caplog):
    """Longer than the 6 s for which the client tries by itself."""
    monkeypatch.setattr(filesystems, "FIRST_PAUSE_S", 0.1)
    with faulty() as proxy:
        folder = RunFolder(bucket.uri("run", proxy))
        folder.write_bytes("file", b"x")
        proxy.down = True
        ends = threading.Timer(8.0, setattr, (proxy, "down", False))
        ends.start()
        began = time.monotonic()
        assert folder.read_bytes("file") == b"x"
        assert time.monotonic() - began > 7
        ends.join()
    assert "trying again for up to 120 s" in caplog.text and "/run/file" in caplog.text


def refusal(act) -> str:
    """What a store that says no is told to be; at once."""
    began = time.monotonic()
    with pytest.raises(StoreError) as caught:
        act()
    assert time.monotonic() - began < 3
    text = str(caught.value)
    assert text.startswith("address must be ") and len(text.splitlines()) == 1
    return text


@pytest.mark.parametrize(
    ("status", "code", "fix"),
    [
        (403, "AccessDenied", "check the credentials"),
        (403, "InvalidAccessKeyId", "check the credentials"),
        (403, "SignatureDoesNotMatch", "check the credentials"),
        (400, "ExpiredToken", "they may have expired"),
        (301, "PermanentRedirect", "add .region="),
    ],
)
def test_what_stays_wrong_is_told_at_once(bucket, faulty, status, code, fix):
    with faulty() as proxy:
        folder = RunFolder(bucket.uri("run", proxy))
        proxy.answer = (status, code)
        text = refusal(lambda: folder.read_bytes("run.json"))
        assert fix.replace(".region", "?region") in text and "/run/run.json" in text
        proxy.answer = None
        folder.write_bytes("run.json", b"{}")
        proxy.answer = (status, code)
        for act in (
            lambda: folder.write_bytes("x", b"x"),
            lambda: folder.parts("labels"),
            lambda: folder.delete_part("labels", "part-0"),
            lambda: Place.parse(bucket.uri("run", proxy)).walk(),
        ):
            refusal(act)


def test_before_a_store_has_worked_the_address_is_bad_input_and_later_it_is_not(bucket, faulty):
    with faulty() as proxy:
        folder = RunFolder(bucket.uri("run", proxy))
        proxy.answer = (403, "AccessDenied")
        with pytest.raises(BadAddress):  # a ValueError: exit code 2
            folder.write_bytes("x", b"x")
        proxy.answer = None
        folder.write_bytes("x", b"x")
        proxy.answer = (403, "AccessDenied")
        with pytest.raises(StoreError) as caught:  # an OSError: exit code 1
            folder.write_bytes("x", b"x")
        assert not isinstance(caught.value, ValueError)


def test_a_bucket_or_a_host_that_is_not_there(bucket, s3_server):
    options = bucket.options()
    no_bucket = RunFolder(f"s3://no-such-bucket/run?{options}")
    text = refusal(lambda: no_bucket.write_bytes("x", b"x"))
    assert "one in a bucket that exists, got s3://no-such-bucket/run/x" in text
    nobody = options.replace(s3_server.endpoint.rpartition(":")[2], "1")
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=r"that answers, got s3://b/run/run.json .*127.0.0.1:1"
    ) as caught:
        RunFolder(f"s3://KEY:SECRET@b/run?{nobody}").read_run()
    assert time.monotonic() - began < 20
    assert "SECRET" not in str(caught.value) and "KEY" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("nope://x/y", "Unrecognized filesystem type"),
        ("s3://b/x?wrong=1", "Unexpected query parameter .*wrong"),
        ("gs://b/x?wrong=1", "Unexpected query parameter .*wrong"),
        ("abfs://c@a.dfs.core.windows.net/x?wrong=1", "Unexpected query parameter .*wrong"),
        ("s3:///x", "Missing bucket name"),
    ],
)
def test_addresses_that_nobody_can_open(address, told):
    with pytest.raises(ValueError, match=f"address must be a path, .*{told}"):
        RunFolder(address)
    with pytest.raises(ValueError, match=told):
        Place.parse(address).kind()


def test_options_reach_every_kind_of_store():
    s3 = RunFolder("s3://anonymous@b/x?region=us-east-1&allow_delayed_open=false")
    assert s3.plain_fs.type_name == "s3" and s3.path == "b/x" and not s3.local
    gs = open_store("gs://anonymous@b", "endpoint_override=localhost:9&scheme=http")
    assert gs.plain.type_name == "gcs" and gs.root == "b"
    assert open_store("gs://anonymous@b", "endpoint_override=localhost:9&scheme=http") is gs
    azure = "account_key=a2V5&blob_storage_authority=127.0.0.1:9&blob_storage_scheme=http"
    abfs = Place.parse(f"abfs://account@container/x?{azure}")
    assert abfs.prefix.startswith("abfs://") and abfs.query == azure


def test_the_endpoint_may_come_from_the_environment(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
    folder = RunFolder(bucket.plain("by environment") + "?region=us-east-1")
    folder.write_bytes("file", b"x")
    assert bucket.files() == {"by environment/file": b"x"}
    assert read_bytes(bucket.plain("by environment/file") + "?region=us-east-1") == b"x"
    open_store.cache_clear()  # this client would outlive the environment


def test_a_file_is_read_on_from_where_its_connection_broke(bucket, faulty):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"bytes": [LARGE[i : i + 1000] for i in range(64)]}), sink)
    folder = RunFolder(bucket.uri())
    folder.write_bytes("cells.parquet", sink.getvalue())
    faults = tuple(f for f in FAULTS if f != "slow")
    gets = {"only": lambda operation, _: operation == "GetObject"}
    with faulty(share=0.5, faults=faults, **gets) as proxy:
        place = Place.parse(bucket.uri("cells.parquet", proxy))
        with place.open() as file:
            file.seek(100)
            assert file.read(5) == bytes(sink.getvalue())[100:105] and file.tell() == 105
            assert file.size() == sink.getvalue().size
        for row, uri in enumerate(cell_uris(place, "bytes", 64)):
            assert read_bytes(uri) == LARGE[row : row + 1000]
    assert proxy.failed


def test_a_word_in_a_path_is_no_verdict(bucket, faulty, monkeypatch):
    """Only what the store says counts: a folder may be called like an error."""
    monkeypatch.setattr(filesystems, "FIRST_PAUSE_S", 0.01)
    with faulty() as proxy:
        folder = RunFolder(bucket.uri("ACCESS_DENIED/Expired/Forbidden", proxy))
        store = folder.fs
        assert isinstance(store, filesystems.Store)
        folder.write_bytes("file", b"x")
        tries = []

        def act():
            tries.append(1)
            if len(tries) < 3:
                raise OSError(
                    f"When reading key '{folder.path}' in bucket 'b': AWS Error NETWORK_CONNECTION"
                )
            return "there"

        assert store._again(act, folder.path) == "there" and len(tries) == 3


def test_whoever_has_waited_in_vain_waits_no_more_until_it_works(bucket, monkeypatch):
    monkeypatch.setattr(filesystems, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(filesystems, "PATIENCE_S", 0.1)
    store = RunFolder(bucket.uri()).fs
    assert isinstance(store, filesystems.Store)
    tries = []

    def fails():
        tries.append(1)
        raise OSError("AWS Error SLOW_DOWN")

    for least, most in ((2, 100), (1, 1), (1, 1)):
        tries.clear()
        with pytest.raises(StoreError):
            store._again(fails, "x")
        assert least <= len(tries) <= most
    store.get_file_info(bucket.name)
    tries.clear()
    with pytest.raises(StoreError):
        store._again(fails, "x")
    assert len(tries) > 1
