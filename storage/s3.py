"""s3:// over s3fs: the backend of a store in a bucket, of Amazon's or of any compatible service.

A file is created by a conditional PUT; services that ignore the condition fail the store's probe.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Any

import fsspec
from botocore.exceptions import ConnectionError as BotocoreConnectionError
from botocore.exceptions import HTTPClientError

from storage.backends import Entry, FsspecBackend, seconds


class S3Backend(FsspecBackend):
    """s3://bucket/prefix through s3fs.

    Endpoint, keys and the like are s3fs's and botocore's settings (docs/configuration.md).
    """

    page_size = 1000  # names per request, S3's limit

    def __init__(self, url: str, timeout_s: float) -> None:
        if not url.removeprefix("s3://").split("/", 1)[0]:
            raise ValueError(f"store {url!r}: names no bucket")
        # Shorter than botocore's own, so that a call that nobody waits for any more ends.
        limits = {
            "connect_timeout": min(5.0, timeout_s),
            "read_timeout": timeout_s,
            "retries": {"mode": "standard", "max_attempts": 3},
        }
        configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        super().__init__(url, config_kwargs=limits | configured)
        self.fs.retries = 1  # s3fs's own on top of botocore's and those of Files would be 75
        self.transient = (BotocoreConnectionError, HTTPClientError)

    def read(self, path: str, start: int, stop: int | None) -> bytes:
        if stop is not None and stop <= start:
            return b""
        with self._call():
            try:
                # max_concurrency=1: one request, without one before that asks for the size
                raw: bytes = self.fs.cat_file(
                    path, start=start or None, end=stop, max_concurrency=1
                )
            except OSError as error:
                if _s3_code(error) != "InvalidRange":  # starts behind the end
                    raise
                return b""
        return raw

    def names(self, folder: str) -> list[str]:
        found = self._list(folder)
        keys = [item.get("Key") or item["Prefix"] for item in found]
        return [name for key in keys if (name := key.rstrip("/").rsplit("/", 1)[-1])]

    def entries(self, folder: str) -> list[Entry]:
        return [
            Entry(item["Key"].rsplit("/", 1)[-1], item["Size"], seconds(item))
            for item in self._list(folder)
            if "Key" in item
        ]

    def _list(self, folder: str) -> list[dict[str, Any]]:
        """Keys and prefixes in a folder. s3fs would list the parent folder, too, when there are
        none: with many agents that is many pages for each one that is new."""
        bucket, prefix, _ = self.fs.split_path(folder)
        query = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", "Delimiter": "/"}
        found: list[dict[str, Any]] = []
        with self._call():
            while True:
                page = self.fs.call_s3("list_objects_v2", MaxKeys=self.page_size, **query)
                items = page.get("Contents", []) + page.get("CommonPrefixes", [])
                # a key that is the folder itself: other tools make folders look real so
                found += [item for item in items if item.get("Key") != query["Prefix"]]
                if not page.get("IsTruncated"):
                    return found
                query["ContinuationToken"] = page["NextContinuationToken"]

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            code = _s3_code(error)
            if code == "NoSuchBucket":  # not a file that is missing: nothing is there
                raise OSError(errno.ENODEV, f"there is no such bucket: {error}") from error
            if code == "PreconditionFailed":  # some servers do not name the condition
                raise FileExistsError(errno.EEXIST, str(error)) from error
            raise


def _s3_code(error: BaseException) -> str | None:
    """What the S3 server called an error that s3fs has translated."""
    response = getattr(error.__cause__, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return code if isinstance(code, str) else None
