"""Object stores by address, asked again when they fail.

What enters: the first part of an address (`s3://bucket`, `gs://bucket`) and its options. What
leaves: a `Store`, one a process, with those methods of pyarrow's file systems that are used here;
and errors of one line that name the place and what to do.

A store drops connections, answers 503, or is away for a minute, and none of it is a reason to lose
a run. pyarrow's own client of S3 tries each request for 6 s, whatever the failure, which covers
single ones. What outlasts that is tried here, whole operations at a time, with growing pauses, for
`PATIENCE_S`. So an operation must do no harm when it is done twice: `put` writes a file in one go,
deleting and copying end in the same state, and a file that is read goes on where it stood. What
another try would not mend (no such bucket, access denied) is told at once; so is a host that is not
there, until it has answered this process once.
"""

from __future__ import annotations

import io
import logging
import random
import re
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import parse_qs

import pyarrow as pa
import pyarrow.fs as pafs

from zsplg_ray.safe_text import masked
from zsplg_ray.settings import complain

log = logging.getLogger(__name__)

PATIENCE_S = 120.0
"""How long an operation is tried again, from its first failure on."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
"""Between two tries; each pause is about twice the one before. Chance keeps workers apart."""

DEFAULTS = {
    # A file below 10 MB is one request (PUT) instead of the three of a multipart upload.
    "s3": {"allow_delayed_open": "true"},
    # Else its client tries for 15 minutes by itself, even a host that is not there.
    "gs": {"retry_limit_seconds": "15"},
    "gcs": {"retry_limit_seconds": "15"},
}
"""Options of a store where the address does not give them."""

_CREDENTIALS = (
    "ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT|INVALID_CLIENT_TOKEN|EXPIRED|Expired|"
    "MISSING_AUTHENTICATION|UNRECOGNIZED_CLIENT|PERMISSION_DENIED|UNAUTHENTICATED|OAuth2 access|"
    "HTTP status 40[0135]|Unauthorized|Forbidden"
)
_USELESS = (
    "INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT|INVALID_CLIENT_TOKEN|EXPIRED|Expired|"
    "MISSING_AUTHENTICATION|UNRECOGNIZED_CLIENT|UNAUTHENTICATED|OAuth2 access|Unauthorized"
)
"""Those of them that open nothing."""
_FOR_GOOD = (
    (
        r"NO_SUCH_BUCKET|[Bb]ucket '[^']*' (not found|does not exist)",
        "one in a bucket that exists",
        "make the bucket, or check its name",
    ),
    (
        "HTTP status 301|PermanentRedirect",
        "one in the region that it says",
        "add ?region=NAME, that of the bucket",
    ),
    (
        _CREDENTIALS,
        "one that these credentials allow",
        "check the credentials in the environment: they may have expired, or allow less",
    ),
    ("Unable to load lib", "of a store whose client is here", "install Java and Hadoop's libhdfs"),
)
"""What a store would say again -> the rule that the address breaks, and the fix."""
_ABSENT = re.compile(r"curlCode: (6|7|60)\b|CURL error \[(6|7|60)\]")
"""No such host, nobody there, or another than its certificate says."""

T = TypeVar("T")
_ANSWERS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)


class StoreError(OSError):
    """A store failed for good, or for longer than we wait."""

    everything = False
    """Whether no other file of the store could be read either."""


class BadAddress(StoreError, ValueError):
    """The address is at fault rather than the store: bad input."""


class Store:
    """A store whose operations are tried again; see `open_store`.

    Paths begin with the bucket. Methods have the names and meanings of `pyarrow.fs.FileSystem`.

    Raises: BadAddress, StoreError; FileNotFoundError and its like at once, as they are answers.
    """

    def __init__(self, prefix: str, query: str) -> None:
        self.prefix, self.query = prefix, query
        self.scheme = prefix.partition("://")[0]
        self.worked = False
        self.tired = False
        """Whether waiting was in vain the last time: then nothing is waited for until it works."""
        given = parse_qs(query)
        more = DEFAULTS.get(self.scheme, {}).items()
        options = "&".join(filter(None, (query, *(f"{k}={v}" for k, v in more if k not in given))))
        uri = f"{prefix}/" + (f"?{options}" if options else "")
        shown = prefix.partition("://")[2].rpartition("@")[2]
        try:
            # It takes a request to find the region of a bucket.
            self.plain, root = self._again(lambda: pafs.FileSystem.from_uri(uri), shown)
        except (pa.ArrowException, ValueError) as e:
            if isinstance(e, BadAddress):
                raise
            rule = "a path, or an s3://, gs:// or file:// address that can be opened"
            fix = f"check it ({_short(e)})"
            raise BadAddress(complain("address", rule, f"{self.scheme}://{shown}", fix)) from e
        self.root = root.rstrip("/")
        self.worked = False

    def put(self, path: str, data: bytes | pa.Buffer) -> None:
        """Write a file in one go; it appears whole or not at all (but for HDFS, which shows what
        is being written).
        """

        def act() -> None:
            # No `with`: leaving it would close, and so finish, a file whose writing has failed.
            stream = self.plain.open_output_stream(path)
            stream.write(data)
            stream.close()

        self._again(act, path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        """A file for reading at any position."""
        file = self._again(lambda: self.plain.open_input_file(path), path)
        return pa.PythonFile(_Reader(self, file, path), mode="r")

    def get_file_info(self, what: str | list[str] | pafs.FileSelector) -> Any:
        """What there is: one FileInfo for a path, several for a list or a selector."""
        path = what[0] if isinstance(what, list) else getattr(what, "base_dir", what)
        return self._again(lambda: self.plain.get_file_info(what), path)

    def create_dir(self, path: str, *, recursive: bool = True) -> None:
        """Make a folder, where the store has any."""
        self._again(lambda: self.plain.create_dir(path, recursive=recursive), path)

    def delete_dir(self, path: str) -> None:
        """Remove a folder with all that is in it."""
        self._again(lambda: self.plain.delete_dir(path), path)

    def delete_file(self, path: str) -> None:
        """Remove a file."""
        self._again(lambda: self.plain.delete_file(path), path)

    def copy_file(self, source: str, target: str) -> None:
        """Copy a file within the store; the copy appears whole or not at all."""
        self._again(lambda: self.plain.copy_file(source, target), target)

    def _again(self, act: Callable[[], T], path: str) -> T:
        """Do something until it works or there is no hope."""
        until, pause = None, FIRST_PAUSE_S
        while True:
            try:
                result = act()
            except _ANSWERS:
                self.worked, self.tired = True, False
                raise
            except OSError as e:
                now = time.monotonic()
                until = until or now + (0 if self.tired else PATIENCE_S)
                late = now + pause > until
                error = self._verdict(e, path, late)
                if error is not None:
                    self.tired = self.tired or late
                    raise error from e
                if pause == FIRST_PAUSE_S:
                    told = "%s://%s: trying again for up to %.0f s (%s)"
                    log.warning(told, self.scheme, path, PATIENCE_S, _short(e))
            else:
                self.worked, self.tired = True, False
                return result
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _verdict(self, error: OSError, path: str, late: bool) -> StoreError | None:
        """What to raise; None if another try may help. `late`: whether there is no time for it."""
        told = _reason(error)  # not the path, whose words mean nothing here
        found = next((why for why in _FOR_GOOD if re.search(why[0], told)), None)
        if found is not None:
            _, rule, fix = found
        elif isinstance(error, PermissionError):
            _, rule, fix = _FOR_GOOD[2]
        elif not self.worked and _ABSENT.search(told):
            rule, fix = "one of a store that answers", "check the network"
            if self.scheme == "s3":
                endpoint = parse_qs(self.query).get("endpoint_override", [""])[0]
                fix += f" and endpoint_override, which is {endpoint}" * bool(endpoint)
                fix += " and AWS_ENDPOINT_URL" * (not endpoint)
        elif late:
            rule, fix = "one of a store that works", "mend it; the same command then goes on"
        else:
            return None
        bad = not self.worked or found is _FOR_GOOD[0]
        text = complain("address", rule, f"{self.scheme}://{path} ({_short(error)})", fix)
        made = BadAddress(text) if bad else StoreError(text)
        made.everything = found not in _FOR_GOOD[:2] and self._fails_wholly(told, path)
        return made

    def _fails_wholly(self, told: str, path: str) -> bool:
        """Whether the store itself fails or lets nobody in, rather than refuse one file."""
        if re.search(_USELESS, told) or _ABSENT.search(told):
            return True
        try:  # a failure of one file often comes without a reason, so the bucket is asked
            self.plain.get_file_info(path.partition("/")[0] or "/")
        except OSError as e:
            # That a bucket may not be listed says nothing where files could be read.
            return not self.worked or not re.search("DENIED|HTTP status 403|Forbidden", _reason(e))
        return False


class _Reader(io.RawIOBase):
    """A file of a store; each piece is asked for again, from where it begins."""

    def __init__(self, store: Store, file: pa.NativeFile, path: str) -> None:
        self.store, self.file, self.path = store, file, path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def read(self, size: int | None = -1, /) -> bytes:
        start = self.file.tell()

        def act() -> bytes:
            self.file.seek(start)
            return self.file.read(None if size is None or size < 0 else size)

        return self.store._again(act, self.path)

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


@lru_cache(maxsize=64)
def open_store(prefix: str, query: str) -> Store:
    """The store behind an address; the same one each time.

    Args:
        prefix: Scheme and bucket: `s3://bucket`.
        query: Options, as after the '?' of an address.

    Raises: BadAddress if there is no such store.
    """
    return Store(prefix, query)


def _reason(error: BaseException) -> str:
    """An error's text on one line, without the name of the place."""
    text = " ".join(str(error).split()).partition(" (Request ID")[0]
    found = re.search(r"AWS Error .*|google::cloud::Status\(.*", text)
    return found.group() if found else text


def _short(error: BaseException) -> str:
    """The beginning of that, for people."""
    return masked(_reason(error))[:200]
