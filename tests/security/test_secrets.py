"""Credentials in addresses: used while a command runs, in nothing that it writes or says."""

import io
import logging
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.s3 import bucket, s3_server  # noqa: F401 (fixtures)
from zsplg_ray import cli
from zsplg_ray.config import LabelConfig, PredictConfig, TrainConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.runinfo import recorded
from zsplg_ray.safe_text import SafeFormatter, masked, one_line, shortened, without_credentials
from zsplg_ray.settings import WorkError, complain, from_mapping
from zsplg_ray.shapes.scenes import write_voc
from zsplg_ray.storage import Place, read_bytes

KEY, SECRET = "AKIAUNUSUALKEYNAME", "wJalrXUtnFEMIsecretbPxRfiCY"

ADDRESSES = {
    f"s3://{KEY}:{SECRET}@bucket/a/b.jpg?region=eu#x": "s3://bucket/a/b.jpg?region=eu#x",
    f"s3://{KEY}:{SECRET}%2Fz@bucket/a": "s3://bucket/a",
    f"s3://b/a?access_key={KEY}&secret_key={SECRET}&region=eu": "s3://b/a?region=eu",
    f"s3://b/a?region=eu&session_token={SECRET}": "s3://b/a?region=eu",
    f"s3://b/a?session_token={SECRET}": "s3://b/a",
    f"gs://b/a?access_token={SECRET}&retry_limit_seconds=5": "gs://b/a?retry_limit_seconds=5",
    f"abfss://box:{SECRET}@account.dfs.core.windows.net/a?sas_token={SECRET}": (
        "abfss://box@account.dfs.core.windows.net/a"
    ),
    f"https://me:{SECRET}@host:5000/x": "https://host:5000/x",
    f"https://host/x?X-Amz-Signature={SECRET}&X-Amz-Credential={KEY}%2Feu": "https://host/x",
    f"s3://b/a?endpoint_override=http://{KEY}:{SECRET}@h:9": "s3://b/a?endpoint_override=http://h:9",
    f"s3://b/a?endpoint_override=http%3A%2F%2F{KEY}%3A{SECRET}%40h%3A9": (
        "s3://b/a?endpoint_override=http%3A%2F%2Fh%3A9"
    ),
    f"postgresql://me:{SECRET}@host/db?password={SECRET}": "postgresql://host/db",
    f"parquet+s3://{KEY}:{SECRET}@b/x.parquet?region=eu#row=1&column=q": (
        "parquet+s3://b/x.parquet?region=eu#row=1&column=q"
    ),
}
PUBLIC = [
    *("s3://bucket/a@b.jpg", "s3://bucket/a:b@c.jpg?region=eu", "gs://anonymous@bucket/x"),
    *("abfss://box@account.dfs.core.windows.net/a", "/data/a@b:c.jpg", "C:\\a", "a://", ""),
    *("/data/x?secret_key=1", "s3://b/a?endpoint_override=http%3A%2F%2Fh%3A9", "cat,dog"),
    "/weird://me:word@host/x.jpg",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_are_kept_without_credentials(address):
    public = without_credentials(address)
    assert public == ADDRESSES[address] == without_credentials(public)
    for text in (masked(address), masked(f"Cannot parse '{address}': no ({address})"), public):
        assert KEY not in text and SECRET not in text
    if not address.startswith("parquet"):
        assert without_credentials(Place.parse(address).uri) == Place.parse(public).uri


@pytest.mark.parametrize("address", PUBLIC)
def test_others_stay_as_they_are(address):
    assert without_credentials(address) == address


SLASHED = [
    *(f"s3://{KEY}:{start}/{SECRET}@bucket/x" for start in ("abc", "", "12")),
    *(f"gs://{KEY}:a/b/{SECRET}/@bucket/x", f"abfss://box:{SECRET}/=@bucket/x"),
    f"parquet+s3://{KEY}:{SECRET}/@bucket/x",
]


@pytest.mark.parametrize("address", SLASHED)
def test_a_secret_with_a_slash_is_masked_too(address):
    """Such an address is not opened: it only ever comes into an error."""
    for call in (lambda: Place.parse(address), lambda: read_bytes(address)):
        with pytest.raises(ValueError, match=r"address must be .*written as %2F, got .*/x; ") as e:
            call()
        assert SECRET not in str(e.value) and KEY not in str(e.value)
    kept = without_credentials(address)
    for text in (masked(address), masked(f"({address}) of s3://{address}"), kept):
        assert SECRET not in text and KEY not in text and "bucket/x" in text
    assert without_credentials(kept) == kept and "***" not in kept


@pytest.mark.parametrize("address", ["http://h:5000/a@b", "https://h:1/a@b", "hdfs://h:8020/a@b"])
def test_a_port_is_no_secret(address):
    assert masked(address) == address == without_credentials(address)
    assert f"{Place.parse(address).prefix}/a@b" == address


def test_a_command_tells_no_secret_with_a_slash(capsys, tmp_path):
    argv = ["evaluate", str(tmp_path), "--truth", f"s3://{KEY}:wJ/{SECRET}@bucket/masks.parquet"]
    assert cli.main(argv) == 2
    told = capsys.readouterr().err
    assert "%2F" in told and SECRET not in told and KEY not in told and "wJ" not in told


@pytest.mark.parametrize("secret", [f"{KEY}:{SECRET}", f"{KEY}:ab/{SECRET}"])
@pytest.mark.parametrize("long", [*range(600, 800, 25), *range(2900, 3100, 25)])
def test_what_is_cut_is_masked_before(long, secret):
    """The cut may fall between a secret and the @ by which it is known as one."""
    text = "a" * long + f" s3://{secret}{'b' * 900}@bucket " + "c" * 9000
    record = logging.LogRecord("zsplg_ray", 20, "f", 1, "at %s", (text,), None)
    for told in (complain("x", "y", text, "z"), SafeFormatter("%(message)s").format(record)):
        assert "bbbb" not in told and KEY not in told and SECRET not in told


@pytest.mark.parametrize("part", ["x://a:b/", "x://a:b", "://", "?secret", "%3A%2F%2F", "x://a:/"])
def test_masking_takes_a_time_that_grows_with_the_text_only(part):
    text = part * 40_000 + " s3://a:b@c"
    began = time.process_time()
    assert masked(text).endswith("***@c")
    assert time.process_time() - began < 5


def test_errors_and_logs_tell_no_secrets():
    address = f"s3://{KEY}:{SECRET}@bucket/x"
    error = WorkError(f"see {address}/errors")
    texts = [complain("out", address, address, address), str(error), f"{error}"]
    record = logging.LogRecord("zsplg_ray", 20, "f", 1, "at %s", (address,), None)
    texts.append(SafeFormatter("%(message)s").format(record))
    try:
        raise OSError(address)
    except OSError as e:
        record.exc_info = (OSError, e, e.__traceback__)
        texts.append(SafeFormatter("%(message)s").format(record))
    for text in texts:
        assert "bucket/x" in text and SECRET not in text and KEY not in text
    assert one_line("a\nb") == "a\\nb" and len(shortened("x" * 10**6)) < 2000


@pytest.mark.parametrize("cls", [LabelConfig, TrainConfig, PredictConfig])
def test_records_hold_no_secrets(cls):
    address = f"s3://{KEY}:{SECRET}@bucket/x"
    names = ("images", "out", "root", "model", "labeled", "unlabeled", "zeroshot", "fuse", "val")
    names += ("sam.checkpoint", "student.init", "classes", "mlflow.uri")
    known = set(recorded(from_mapping(cls, dict.fromkeys(required_of(cls), "x"))))
    given = {name: address for name in names if name in known}
    given |= dict.fromkeys(required_of(cls), address)
    flat = recorded(from_mapping(cls, given))
    assert SECRET not in str(flat) and KEY not in str(flat)
    assert all(flat[name] in ("s3://bucket/x", "s3://***@bucket/x") for name in given)


def required_of(cls) -> list[str]:
    from zsplg_ray.settings import required

    return required(cls)


# A whole run --------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_tells_nobody(bucket, tmp_path, monkeypatch, capfd):  # noqa: F811
    """Images, the run's folder and MLflow by addresses with credentials; one image is broken."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    write_voc(tmp_path / "scenes", 2, seed=0)
    bucket.put(tmp_path / "scenes" / "JPEGImages", "images")
    with bucket.fs.open_output_stream(f"{bucket.name}/images/broken.jpg") as stream:
        stream.write(b"no image")
    secret = lambda path: bucket.uri(path).replace("s3://", f"s3://{KEY}:{SECRET}@")  # noqa: E731
    argv = ["label", "--images", secret("images"), "--out", secret("run"), "--classes", "shapes"]
    argv += ["--sam", "shapes", "--clip", "shapes", "--sam.points-per-side", "4"]
    argv += ["--ray.num-cpus", "2", "--mlflow.uri", f"sqlite:///{tmp_path}/mlflow.db"]
    with monkeypatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)  # the address must do
        assert cli.main(argv) == 0
    assert cli.main([*argv[:2], f"{secret('gone')}&x=1", *argv[3:]]) == 2
    told = capfd.readouterr()
    found = bucket.files("run") | {str(p): p.read_bytes() for p in files(tmp_path)}
    assert any(name.startswith("run/segments/") for name in found)
    assert "2 images labelled" in told.out and "labels    s3://***@bucket" in told.out
    assert "zsplg report 's3://***@bucket" in told.out
    texts = {"stdout": told.out.encode(), "stderr": told.err.encode(), **found}
    for name, data in texts.items():
        for word in (KEY, SECRET):
            assert word.encode() not in data, f"{word} in {name}"
    check_rows(secret("run"), bucket.uri("images"))


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def check_rows(out: str, images: str) -> None:
    """What stands in Parquet, where compression hides words from a look at the bytes."""
    folder = RunFolder(out)
    wanted = Place.parse(images)
    for kind in ("segments", "labels", "errors"):
        table = folder.read(kind)
        assert table is not None and len(table) == (1 if kind == "errors" else 2)
        text = str(table.drop_columns([c for c in ("segments",) if c in table.column_names]))
        assert KEY not in text and SECRET not in text
        rows = zip(table["image_id"].to_pylist(), table["uri"].to_pylist(), strict=True)
        assert all(uri == wanted.child(image_id).uri for image_id, uri in rows)
        assert SECRET not in str(table.to_pylist())
    labels = folder.read("labels", ["label_png"])
    assert labels is not None
    for png in labels["label_png"].to_pylist():
        assert Image.open(io.BytesIO(png)).format == "PNG"
