"""Text that may be shown and kept: without credentials, and nothing in it that commands a terminal.

What enters: addresses as users write them, messages of any origin, names and ids out of files of
strangers. What leaves: the same for eyes (`masked`, `one_line`), for records
(`without_credentials`) and for the log (`SafeFormatter`).

Why two ways for addresses: what people read says that there were credentials (`***`); what is
stored in a run's folder is read again one day, so there they are left out, and whoever follows the
address then uses the credentials of the environment.
"""

from __future__ import annotations

import logging
import re
from typing import Any

_SECRET = (
    r"[\w.%-]{0,64}(?:secret|token|passw|pwd|credential|signature)[\w.%-]{0,64}"
    r"|[\w.%-]{0,64}key(?:_?id)?|sig"
)
"""Names of options that hold credentials, whatever the store."""

_USER = re.compile(r"(?<=://)[^/\s'\"]*@")
_ENCODED_USER = re.compile(r"(?i)(?<=%3A%2F%2F)(?:(?!%2F)[^/&;#\s'\"])*%40")
"""The same in an address that is another's option."""
_PORT = r"(?:(?<=http://)|(?<=https://)|(?<=hdfs://))[^/\s'\"@:]+:\d+/"
_SLASHED = re.compile(rf"(?i)(?<=://)(?!{_PORT})([^/\s'\"@:]+:[^/\s'\"@]*/)")
"""Where a user begins whose secret may have a slash in it; what looks like a port is none."""
_WORD = re.compile(r"[^\s'\"@]++@?")
_OPTION = re.compile(rf"(?i)([?&;](?:{_SECRET})=)[^&;#\s'\"]+")

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_NETLOC = re.compile(r"\A([A-Za-z][A-Za-z0-9+.-]*://)([^/?#]*)@")
_SLASHED_NETLOC = re.compile(r"\A([A-Za-z][A-Za-z0-9+.-]*://)([^@]*)@")
_WHOLE_OPTION = re.compile(rf"(?i)(?<=[?&;])(?:{_SECRET})=[^&;#]*[&;]?")

MAX_CHARS = 1000
"""Of what one value may put into a message: an id can have any length."""


def masked(text: str) -> str:
    """A text without the credentials in its addresses: http://***@host for http://me:word@host."""
    if "://" not in text:
        return text
    text = _ENCODED_USER.sub("***@", _USER.sub("***@", text))
    if "@" in text:  # word by word, for one pattern would look for each user's end in all the rest
        text = _WORD.sub(_without_slashed, text)
    return _OPTION.sub(r"\1***", text)


def is_slashed(address: str) -> bool:
    """Whether its user has a secret with a slash, with which no reader of addresses would find the
    host: `s3://key:a/b@bucket`.
    """
    word = _WORD.match(address)
    return word is not None and _without_slashed(word) != word.group()


def without_credentials(uri: str) -> str:
    """The address itself, to be followed with the environment's credentials; a path as it is.

    A user without a password stays: `gs://anonymous@bucket`, `abfss://container@account` are names.
    """
    if _ADDRESS.match(uri) is None:
        return uri
    if _SLASHED.match(uri, uri.index("://") + 3):  # only then: a path may have an @ in it
        uri = _SLASHED_NETLOC.sub(_public_netloc, uri, count=1)
    uri = _NETLOC.sub(_public_netloc, uri, count=1)
    head, question, options = uri.partition("?")
    if not question:
        return uri
    options = _ENCODED_USER.sub("", _USER.sub("", options))
    options = _WHOLE_OPTION.sub("", f"?{options}")[1:]
    options = re.sub(r"[&;](?=#|$)", "", options)
    return f"{head}?{options}" if options and not options.startswith("#") else f"{head}{options}"


def public_values(value: Any) -> Any:
    """Settings as a record holds them: the addresses among texts without credentials."""
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, list | tuple):
        return [public_values(item) for item in value]
    if isinstance(value, dict):
        return {k: public_values(item) for k, item in value.items()}
    return value


def one_line(text: str) -> str:
    """A text with every character that is not printable written out, so it is one harmless line."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def shortened(text: str, most: int = MAX_CHARS) -> str:
    """The text, or its beginning and end where it has more than `most` characters.

    What is cut is masked first: of half an address nobody would know that it holds a secret.
    """
    if len(text) > most:
        text = masked(text)
    if len(text) <= most:
        return text
    return f"{text[: most * 3 // 4]} ... ({len(text)} characters) ... {text[-most // 8 :]}"


class SafeFormatter(logging.Formatter):
    """A log's lines: without credentials, and without what a file's name may tell a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The message on one line."""
        record.message = one_line(masked(shortened(record.message, 4 * MAX_CHARS)))
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        """The traceback, on as many lines as it has."""
        return "\n".join(one_line(masked(line)) for line in super().formatException(ei).split("\n"))


def _without_slashed(match: re.Match[str]) -> str:
    """A word, without the user whose secret has a slash if it ends in one."""
    word = match.group()
    found = _SLASHED.search(word) if word.endswith("@") else None
    return f"{word[: found.start()]}***@" if found else word


def _public_netloc(match: re.Match[str]) -> str:
    scheme, user = match.groups()
    name, colon, _ = user.partition(":")
    if not colon:
        return match.group()
    # Of Azure's the user is the container; of others a key is of no use without its secret.
    return f"{scheme}{name}@" if scheme.startswith(("abfs:", "abfss:")) else scheme
