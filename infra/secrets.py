"""Credentials come from the environment alone, and nothing that is printed or recorded shows them.

Three places hold that: settings refuse a URL that carries credentials (`credentials_in`), the user name and password of a
tracking URI go into the environment before the URI is used (`split_userinfo`), and whatever still gets into a text is taken out
where texts leave the program (`redact`): in the streams of the command line and in the journal of what MLflow is told.
"""

import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast
from urllib.parse import quote, unquote, urlsplit, urlunsplit

_MASK = "***"
_SECRET_NAMES = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|ACCESS_KEY|API_KEY", re.IGNORECASE)
_NAMES_OF_PLACES = ("_FILE", "_PATH", "_DIR")  # AWS_WEB_IDENTITY_TOKEN_FILE says where a secret is
_SHORTEST = 8  # of a value that is looked for; a shorter one may be a word that stands anywhere, such as "true"
# `user:password@` after `://`; where a password holds a slash, what follows the colon is no port. A bucket has no port at all.
_USERINFO = re.compile(
    r"""(?<=://)[^\s/?#'"<>]*@"""
    r"""|(?<=://)[^\s/:@?#'"<>]*:(?!\d+[/?#])[^\s@'"<>]*@"""
    r"""|(?:(?<=s3://)|(?<=gs://))[^\s/:@'"<>]*:[^\s@'"<>]*@"""
)
_QUERY_SECRET = re.compile(
    r"""([?&](?:x-amz-[\w-]+|sig|[\w.-]*(?:signature|token|secret|passw(?:or)?d|access_?key(?:_?id)?|api_?key|credential)[\w.-]*)=)"""
    r"""[^\s&'"<>#]+""",
    re.IGNORECASE,
)
_URL_WITH_USERINFO = re.compile(r"[a-z][a-z0-9+.-]*://([^\s/?#]+)@", re.IGNORECASE)
_URL_WITH_MORE = re.compile(r"\s*(?:(?:s3|gs)://[^/?#]*:|[a-z][a-z0-9+.-]*://(?:[^/?#]*@|[^?#]*\?))", re.IGNORECASE)


def redact(text: str) -> str:
    """The text with `***` in place of user names and passwords in URLs, signatures in queries, and secrets of the environment.

    Of the environment those variables are secrets that are named so (`..._PASSWORD`, `..._TOKEN`, `AWS_SECRET_ACCESS_KEY`, ...)
    and the passwords in URLs, such as those of proxies; values of fewer than 8 characters are not looked for.

    Example:
        >>> redact("no answer from https://me:hush@host/a?X-Amz-Signature=abc&n=1")
        'no answer from https://***@host/a?X-Amz-Signature=***&n=1'
    """
    if "://" in text:
        text = _QUERY_SECRET.sub(rf"\1{_MASK}", _USERINFO.sub(f"{_MASK}@", text))
    for secret in _environment_secrets():
        text = text.replace(secret, _MASK)
    return text


def redact_values(value: Any) -> Any:
    """A copy of plain data, as JSON has it, with every text in it as `redact` gives it."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {name: redact_values(item) for name, item in value.items()}
    return [redact_values(item) for item in value] if isinstance(value, list | tuple) else value


def redact_file(data: bytes) -> bytes:
    """The content of a file without secrets of the environment; it may be a picture, so no patterns are looked for."""
    for secret in _environment_secrets():
        data = data.replace(secret.encode(), _MASK.encode())
    return data


def credentials_in(value: Any) -> bool:
    """Whether plain data holds a URL with a user name, a password or a query, where credentials and signatures stand.

    Example:
        >>> credentials_in({"root": "s3://KEY:SECRET@bucket/videos"}), credentials_in("s3://bucket/videos")
        (True, False)
    """
    if isinstance(value, dict):
        return any(map(credentials_in, value.values()))
    if isinstance(value, list | tuple):
        return any(map(credentials_in, value))
    return isinstance(value, str) and _URL_WITH_MORE.match(value) is not None


def split_userinfo(url: str) -> tuple[str, str, str]:
    """The URL without user name and password, and these, decoded; "" where there is none.

    Example:
        >>> split_userinfo("http://me:hu%40sh@host:5000/mlflow")
        ('http://host:5000/mlflow', 'me', 'hu@sh')
    """
    parts = urlsplit(url)
    userinfo, _, place = parts.netloc.rpartition("@")
    user, _, password = userinfo.partition(":")
    return urlunsplit(parts._replace(netloc=place)), unquote(user), unquote(password)


def guard_output() -> None:
    """From now on nothing that Python writes to standard output or error, tracebacks and logs included, shows a secret."""
    sys.stdout = cast(TextIO, _GuardedStream(sys.stdout))
    sys.stderr = cast(TextIO, _GuardedStream(sys.stderr))


class _GuardedStream:
    """A text stream that redacts what is written to it; in all else it is the stream that it is given."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _environment_secrets() -> list[str]:
    """What the environment holds now, the longest first, since one may be a part of another; also as it stands in a URL."""
    found = set()
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name) and not name.upper().endswith(_NAMES_OF_PLACES):
            found.add(value)
        if url := _URL_WITH_USERINFO.match(value):
            password = url[1].partition(":")[2] or url[1]  # a token may stand alone
            found |= {password, unquote(password)}
    found |= {quote(secret, safe="") for secret in found}
    return sorted((secret for secret in found if len(secret) >= _SHORTEST), key=len, reverse=True)
