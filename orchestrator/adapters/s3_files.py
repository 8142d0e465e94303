"""Files on an S3 endpoint, with put-if-absent commits."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit


class S3Files:
    """Objects below ``s3://BUCKET/PREFIX``; the same promises as local files.

    Credentials and endpoint come from the environment, as every S3 tool reads them (AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION, profiles). A put of an object is whole or not at all, and
    ``If-None-Match: *`` makes it put-if-absent.

    Raises:
        ValueError: the URL has no bucket, or boto3 is not installed.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.netloc:
            raise ValueError(f"root must be a folder or s3://BUCKET/PREFIX, got {url!r}.")
        if parts.username or parts.password:
            raise ValueError("credentials do not belong into a URL; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.")
        self.url, self._bucket, self._prefix = url.rstrip("/"), parts.netloc, parts.path.strip("/")

    def __str__(self) -> str:
        return self.url

    @cached_property
    def _client(self) -> Any:
        try:
            import boto3
            from botocore.config import Config
        except ImportError:
            raise ValueError("root=s3://… needs boto3. Install it: pip install 'solvus[s3]'") from None
        return boto3.client(
            "s3", config=Config(retries={"mode": "standard", "max_attempts": 3}, connect_timeout=10, read_timeout=60)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_client"}

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _call(self, operation: str, **arguments: Any) -> Any:
        """Call S3; an endpoint that is away or busy becomes an OSError, a missing object FileNotFoundError."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return getattr(self._client, operation)(Bucket=self._bucket, **arguments)
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in ("NoSuchKey", "404", "NotFound"):
                raise FileNotFoundError(f"{self.url}: {arguments.get('Key')}") from None
            if code in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
                raise FileExistsError(f"{self.url}: {arguments.get('Key')}") from None
            raise OSError(f"S3 {operation} on {self.url} failed: {error}") from None
        except BotoCoreError as error:
            raise OSError(f"S3 {operation} on {self.url} failed: {error}") from None

    def read(self, name: str) -> bytes:
        """The bytes of an object; FileNotFoundError when there is none."""
        from botocore.exceptions import BotoCoreError

        try:
            return self._call("get_object", Key=self._key(name))["Body"].read()
        except BotoCoreError as error:
            raise OSError(f"S3 read of {name} on {self.url} broke off: {error}") from None

    def size(self, name: str) -> int | None:
        """Its size in bytes, or None if it is not there."""
        try:
            return self._call("head_object", Key=self._key(name))["ContentLength"]
        except FileNotFoundError:
            return None

    def _pages(self, folder: str) -> Iterator[Any]:
        prefix = self._key(folder).rstrip("/") + "/"
        token: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", Prefix=prefix, Delimiter="/", **token)
            yield prefix, page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def entries(self, folder: str) -> Iterator[tuple[str, int]]:
        """(name below the folder, size in bytes) of every object in it (not of subfolders)."""
        for prefix, page in self._pages(folder):
            for item in page.get("Contents", []):
                yield item["Key"][len(prefix) :], item["Size"]

    def folders(self, folder: str) -> list[str]:
        """Names of the subfolders of a folder."""
        return sorted(
            item["Prefix"][len(prefix) :].rstrip("/")
            for prefix, page in self._pages(folder)
            for item in page.get("CommonPrefixes", [])
        )

    def age_s(self, name: str) -> float:
        """Seconds since it was written."""
        from datetime import datetime

        written = self._call("head_object", Key=self._key(name))["LastModified"]
        return (datetime.now(UTC) - written).total_seconds()

    def write(self, name: str, data: bytes) -> None:
        """Write or replace an object."""
        self._call("put_object", Key=self._key(name), Body=data)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write an object unless it exists. True if this call made it: exactly one of several callers sees that."""
        try:
            self._call("put_object", Key=self._key(name), Body=data, IfNoneMatch="*")
        except FileExistsError:
            return False
        return True

    def delete(self, name: str) -> None:
        """Remove an object if it is there."""
        self._call("delete_object", Key=self._key(name))
