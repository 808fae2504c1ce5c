"""Uploads to S3 that a killed save has left unfinished: no listing of files shows them, and their parts are paid for.

pyarrow has no call for them, so boto3 is asked, with the address' options and otherwise the same sources of
credentials. Google Cloud and Azure drop theirs after 7 days (https://cloud.google.com/storage/docs/resumable-uploads,
https://learn.microsoft.com/rest/api/storageservices/put-block).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import urllib.parse
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from ray_ckpt.errors import StorageError
from ray_ckpt.storage.address import parse
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.publish import DATA_FILE
from ray_ckpt.storage.step_names import parse_steps

__all__ = ["UnfinishedUploads", "Upload"]

_logger = logging.getLogger("ray_ckpt")


class Upload(NamedTuple):
    """One that is not finished."""

    name: str
    """Name of the file it would become, relative to the store."""
    id: str
    begun_s: float
    """When it began, in seconds since the epoch by the storage's clock."""


class UnfinishedUploads:
    """Those of data files of ours in a store's own directory and in those of its steps."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._address = parse(storage.uri)
        self._options = dict(urllib.parse.parse_qsl(self._address.options))
        path = urllib.parse.unquote(self._address.path).strip("/")
        self._prefix = f"{path}/" if path else ""

    def find(self) -> Sequence[Upload]:
        """Empty also where boto3 is missing, and where the account may not list them; both are logged."""
        if self._address.scheme != "s3" or self._options.get("anonymous", "").lower() == "true":
            return []
        if importlib.util.find_spec("boto3") is None:
            _logger.info("unfinished uploads to %s are not looked for: pip install boto3", self._address.display)
            return []
        try:
            found = self._storage.perform("list unfinished uploads of", "", self._list)
        except StorageError as error:
            _logger.warning("unfinished uploads are not looked for: %s", error)
            return []
        return [upload for upload in found if _is_data_file(upload.name)]

    def abort(self, uploads: Iterable[Upload]) -> None:
        """Remove what was uploaded.

        Raises:
            StorageError: the storage refuses.
        """
        for upload in uploads:
            wanted = {"Bucket": self._address.place, "Key": self._prefix + upload.name, "UploadId": upload.id}
            abort = partial(_ask, self._client.abort_multipart_upload, wanted)
            self._storage.perform("abort the upload of", upload.name, abort)

    def _list(self) -> list[Upload]:
        found: list[Upload] = []
        wanted = {"Bucket": self._address.place, "Prefix": self._prefix}
        while True:
            answer = _ask(self._client.list_multipart_uploads, wanted)
            for upload in answer.get("Uploads", ()):
                name = upload["Key"].removeprefix(self._prefix)
                found.append(Upload(name, upload["UploadId"], upload["Initiated"].timestamp()))
            if not answer.get("IsTruncated"):
                return found
            wanted |= {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}

    @functools.cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        endpoint = self._options.get("endpoint_override")
        user, _, password = (urllib.parse.unquote(half) for half in self._address.userinfo.partition(":"))
        return boto3.session.Session().client(
            "s3",
            endpoint_url=f"{self._options.get('scheme', 'https')}://{endpoint}" if endpoint else None,
            region_name=self._options.get("region") or ("us-east-1" if endpoint else None),
            config=Config(s3={"addressing_style": "path"}) if endpoint else None,
            aws_access_key_id=user or None,
            aws_secret_access_key=password or None,
        )


def _is_data_file(name: str) -> bool:
    directory, _, file = name.rpartition("/")
    return DATA_FILE.fullmatch(file) is not None and (not directory or bool(list(parse_steps([directory]))))


def _ask(call: Any, arguments: dict[str, str]) -> Any:
    """
    Raises:
        OSError: whatever botocore raises, in its words.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return call(**arguments)
    except (BotoCoreError, ClientError) as error:
        raise OSError(str(error)) from None
