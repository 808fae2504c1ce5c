"""sign and verify_signature: who made a checkpoint, and that no byte of it has changed since.

    sign ─┬─ SHA-256 of manifest.json and .metadata, and of every data file
          └─ their list, signed with a private key ──> model.sig beside them

A checksum finds accidents; a signature also finds who changes a checkpoint and its checksums together. This one is an
OpenSSF model signature (https://github.com/sigstore/model-transparency): an in-toto statement in a DSSE envelope in a
Sigstore bundle, made and checked by the library `model-signing` with an elliptic-curve key, without network.
"""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_ckpt.errors import CheckpointError, FormatError, SignatureError, UsageError
from ray_ckpt.format.foreign_json import parse_object
from ray_ckpt.format.limits import SIGNATURE_BYTES
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest, check_file_name
from ray_ckpt.inspection.opening import Opened, open_record, opened_at
from ray_ckpt.progress import Meter, Progress
from ray_ckpt.report import SignatureReport
from ray_ckpt.storage.address import refuse_uri
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.publish import SIGNATURE_NAME, STOCK_RECORD_NAME
from ray_ckpt.storage.record_files import read_if_there
from ray_ckpt.storage.regular_files import no_file
from ray_ckpt.storage.resolve import Target, committed_at
from ray_ckpt.text import listed

__all__ = ["sign", "verify_signature"]

_RECORDS = (MANIFEST_NAME, STOCK_RECORD_NAME)
_THREADS = 8


def sign(
    target: Target,
    private_key: str | os.PathLike[str],
    step: int | None = None,
    *,
    password: str | None = None,
    record_only: bool = False,
    progress: Progress | None = None,
) -> SignatureReport:
    """Sign a committed checkpoint of ours, so that `verify_signature` refuses it when any byte of it has changed.

    The signature is the file `model.sig` in the checkpoint's directory; one that is there is replaced. `overwrite`,
    `delete` and `prune` remove it with what it signs.

    Needs `pip install 'ray-ckpt[sign]'`. A key pair is made by, for instance,
    `openssl ecparam -name prime256v1 -genkey -noout -out key.pem` and `openssl ec -in key.pem -pubout -out key.pub`.

    Example:
        >>> import subprocess, torch
        >>> from ray_ckpt import save, sign, verify_signature
        >>> make_key = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
        >>> make_public = "openssl ec -in key.pem -pubout -out key.pub"
        >>> done = [subprocess.run(make.split(), check=True, capture_output=True) for make in (make_key, make_public)]
        >>> report = save({"weight": torch.ones(3)}, "run/step-1")
        >>> print(sign("run/step-1", "key.pem"))
        signed: 3 files with ...
        >>> verify_signature("run/step-1", "key.pub").record_only
        False

    Args:
        target: the checkpoint's directory or a store: a local path, a URI, a `Storage` or a `CheckpointStore`.
        private_key: local file with an elliptic-curve key (P-256, P-384 or P-521) as PEM.
        step: number of the step in the store; None signs the checkpoint at `target` itself, or else the latest
            committed step of the store there.
        password: of the key, where it has one.
        record_only: sign the record alone, without reading the data files. They are then tied to it by checksums that
            find accidents (XXH3-64), and not by ones that nobody can forge.
        progress: called about ten times a second with the bytes that were read and all that will be.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint.
        UsageError: it is another program's; the key cannot be used; or the library is not installed.
        CheckpointError, StorageError: it cannot be read, or the signature not be written.
    """
    refuse_uri(private_key, "a key")
    with _library():
        from model_signing import signing

    # Not held: what is deleted meanwhile is not signed, and what replaces it must not get its signature.
    storage, manifest = _signable(open_record(committed_at(target, step).storage))
    names = [*_RECORDS, *(() if record_only else manifest.files)]
    meter = Meter(progress)
    config: Any = signing.Config()  # type: ignore[no-untyped-call]
    config.set_hashing_config(_hashing(storage, names, meter))
    with _key(private_key):
        config.use_elliptic_key_signer(
            private_key=os.fspath(private_key),
            password=None if password is None else password.encode(),
        )
    with tempfile.TemporaryDirectory(prefix="ray_ckpt-") as directory:
        path = Path(directory) / SIGNATURE_NAME
        config.sign(_name_of(storage), path)
        storage.write_atomic(SIGNATURE_NAME, path.read_bytes())
    meter.end()
    return _report("signed", storage, names, manifest)


def verify_signature(
    target: Target, public_key: str | os.PathLike[str], step: int | None = None, *, progress: Progress | None = None
) -> SignatureReport:
    """Check that the owner of a key signed a committed checkpoint of ours, and that no signed byte has changed since.

    Files in its directory that neither its record nor the signature names are not looked at: no load reads them. What
    is loaded later may have changed after this; and an older checkpoint with its own signature passes, as it should.

    Example:
        >>> import subprocess, torch
        >>> from ray_ckpt import SignatureError, save, sign, verify_signature
        >>> make_key = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
        >>> make_public = "openssl ec -in key.pem -pubout -out key.pub"
        >>> done = [subprocess.run(make.split(), check=True, capture_output=True) for make in (make_key, make_public)]
        >>> report = save({"weight": torch.ones(3)}, "run/step-1"), sign("run/step-1", "key.pem")
        >>> print(verify_signature("run/step-1", "key.pub"))
        signature fits: 3 files with ...

    Args:
        target, step: as for `sign`.
        public_key: local file with the public key of the pair as PEM.
        progress: as for `sign`.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint.
        SignatureError: it is not signed, or not with this key, or something has changed; says what.
        UsageError: it is another program's; the key cannot be used; or the library is not installed.
        CheckpointError, StorageError: it cannot be read.
    """
    refuse_uri(public_key, "a key")
    with _library():
        from cryptography.exceptions import InvalidSignature
        from model_signing import verifying

    with opened_at(target, step) as (opened, _):
        storage, manifest = _signable(opened)
        signature = read_if_there(storage, SIGNATURE_NAME)
        if signature is None:
            raise SignatureError(
                f"{storage.address} is not signed: it has no {SIGNATURE_NAME}; `ray-ckpt sign` makes one"
            )
        claimed = _claimed(signature)
        data = manifest.files if manifest.files.keys() & claimed.keys() else ()
        names = sorted({*_RECORDS, *data, *claimed})
        meter = Meter(progress)
        hashes = _hashing(storage, names, meter)
        config: Any = verifying.Config()  # type: ignore[no-untyped-call]
        config.set_hashing_config(hashes)
        with _key(public_key):
            config.use_elliptic_key_verifier(public_key=os.fspath(public_key))
        with tempfile.TemporaryDirectory(prefix="ray_ckpt-") as directory:
            path = Path(directory) / SIGNATURE_NAME
            path.write_bytes(signature)
            try:
                config.verify(_name_of(storage), path)
            except CheckpointError:
                raise
            except InvalidSignature as error:
                raise SignatureError(f"{storage.address}/{SIGNATURE_NAME} is no signature by {public_key}") from error
            except Exception as error:  # whatever the library makes of damaged bytes
                if hashes.found is None:  # the files are looked at when the signature itself is good
                    told = f"{storage.address}/{SIGNATURE_NAME} is no signature by {public_key}: {error}"
                    raise SignatureError(told) from error
                others = [name for name in names if hashes.found.get(name) != claimed.get(name)]
                raise SignatureError(
                    f"{storage.address} is not as it was signed: {listed(others)} changed, came or went since"
                ) from error
        meter.end()
        return _report("signature fits", storage, names, manifest)


def _signable(opened: Opened) -> tuple[Storage, Manifest]:
    if not opened.manifest.attempt:
        raise UsageError(
            f"{opened.address} was written by {opened.kind}, and has no record of its files that could be signed; "
            "`ray-ckpt import` makes a checkpoint of it that has"
        )
    if opened.is_delta:
        raise UsageError(
            f"{opened.address} is a delta: most of what it stands for lies in other steps, which a signature would "
            "not cover; `ray-ckpt import` makes a checkpoint of it that is whole"
        )
    return opened.files, opened.manifest


def _name_of(storage: Storage) -> str:
    return storage.address.rstrip("/").rsplit("/", 1)[-1]


def _report(verdict: str, storage: Storage, names: Collection[str], manifest: Manifest) -> SignatureReport:
    sizes = storage.sizes(names)
    return SignatureReport(
        uri=storage.address,
        verdict=verdict,
        files=tuple(names),
        total_bytes=sum(sizes.values()),
        record_only=not manifest.files.keys() <= set(names),
    )


def _claimed(signature: bytes) -> dict[str, str]:
    """File -> SHA-256, as the signature says. None of it is believed before the signature is checked.

    Raises:
        SignatureError: it is no such thing.
        FormatError: it has more bytes or values than its limits.
    """
    SIGNATURE_BYTES.check(len(signature), SIGNATURE_NAME)
    try:
        envelope = parse_object(signature, SIGNATURE_NAME)["dsseEnvelope"]
        statement = parse_object(base64.b64decode(envelope["payload"]), SIGNATURE_NAME)
        return {str(each["name"]): str(each["digest"]) for each in statement["predicate"]["resources"]}
    except (FormatError, ValueError, TypeError, KeyError) as error:
        raise SignatureError(f"{SIGNATURE_NAME} is no signature of a model: {type(error).__name__}: {error}") from error


def _hashing(storage: Storage, names: Iterable[str], meter: Meter) -> Any:
    """How the library gets the digests of files that may lie on any storage, rather than in a local directory."""
    from model_signing import hashing, manifest
    from model_signing._hashing.memory import SHA256

    class OfStorage(hashing.Config):
        found: dict[str, str] | None = None
        """File -> SHA-256, as it is now; None before the library has asked for it."""

        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
            sizes = storage.sizes(check_file_name(name) for name in names)
            meter.expect(sum(sizes.values()))

            def digest_of(item: tuple[str, int]) -> Any:
                found = SHA256()
                with storage.open_input(item[0]) as file:
                    for piece in file.pieces(item[1]):
                        found.update(bytes(piece))
                        meter.add(len(piece))
                return found.compute()

            with ThreadPoolExecutor(_THREADS, thread_name_prefix="ray_ckpt-sign") as pool:
                digests = dict(zip(sizes, pool.map(digest_of, sizes.items()), strict=True))
            self.found = {name: digest.digest_hex for name, digest in digests.items()}
            method = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
            kind = manifest.SerializationType.from_args(method)
            return manifest.Manifest(
                str(model_path), [kind.new_item(name, digest) for name, digest in digests.items()], kind
            )

        def add_ignored_paths(self, **_: Any) -> None:
            """Only what is named is read."""

    return OfStorage()  # type: ignore[no-untyped-call]


@contextmanager
def _library() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UsageError(f"signatures need more libraries ({error}): pip install 'ray-ckpt[sign]'") from error


@contextmanager
def _key(path: str | os.PathLike[str]) -> Iterator[None]:
    if kind := no_file(os.fspath(path)):  # opening a FIFO waits until somebody writes to it
        raise UsageError(f"{os.fspath(path)} is {kind}; a key is a file, or what the shell passes by <(command)")
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UsageError(f"{os.fspath(path)} is no elliptic-curve key as PEM that can be used: {why}") from error
