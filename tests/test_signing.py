"""A signed checkpoint: every changed byte is refused, as is another key, and the signature goes with what it signs."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import ray_ckpt
from ray_ckpt import CheckpointNotFoundError, CheckpointStore, SignatureError, UsageError
from ray_ckpt.cli.main import cli


def make_keys(directory: Path, name: str) -> tuple[Path, Path]:
    private, public = directory / f"{name}.pem", directory / f"{name}.pub"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private], check=True)
    subprocess.run(["openssl", "ec", "-in", private, "-pubout", "-out", public], check=True, stderr=subprocess.DEVNULL)
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_keys(tmp_path_factory.mktemp("keys"), "key")


def saved(store: CheckpointStore, step: int) -> Path:
    state = {"model": {"weight": torch.arange(1000.0), "bias": torch.ones(3)}, "lr": 0.1}
    ray_ckpt.save(state, store, step)
    return Path(store.address) / f"step-{step}"


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.name != "model.sig")


def test_any_changed_byte_is_refused(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    directory = saved(CheckpointStore(tmp_path / "run"), 1)
    signed = ray_ckpt.sign(tmp_path / "run", private, 1)
    assert not signed.record_only
    assert set(signed.files) == {path.name for path in files_of(directory)}
    assert str(ray_ckpt.verify_signature(tmp_path / "run", public)).startswith("signature fits: 3 files with ")
    for path in [*files_of(directory), directory / "model.sig"]:
        data = path.read_bytes()
        for place in (0, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(ray_ckpt.CheckpointError):
                ray_ckpt.verify_signature(tmp_path / "run", public)
        path.write_bytes(data)
    ray_ckpt.verify_signature(tmp_path / "run", public)


def test_a_forger_who_mends_the_checksums_too_is_refused(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    directory = saved(CheckpointStore(tmp_path / "run"), 1)
    ray_ckpt.sign(directory, private)
    signature = (directory / "model.sig").read_bytes()
    ray_ckpt.save({"model": {"weight": torch.zeros(1000), "bias": torch.ones(3)}, "lr": 0.1}, directory, overwrite=True)
    assert ray_ckpt.verify(directory).verified
    with pytest.raises(SignatureError, match=r"is not signed: it has no model\.sig"):
        ray_ckpt.verify_signature(directory, public)
    (directory / "model.sig").write_bytes(signature)
    with pytest.raises(
        SignatureError, match=r"is not as it was signed: \.metadata, .*manifest\.json changed, came or went since"
    ):
        ray_ckpt.verify_signature(directory, public)


def test_another_key_is_refused(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    directory = saved(CheckpointStore(tmp_path / "run"), 1)
    private, public = make_keys(tmp_path, "other")
    ray_ckpt.sign(directory, keys[0])
    with pytest.raises(SignatureError, match=r"model\.sig is no signature by .*other\.pub"):
        ray_ckpt.verify_signature(directory, public)
    for wrong in (public, tmp_path / "none.pem", directory / "manifest.json"):
        with pytest.raises(UsageError, match="is no elliptic-curve key as PEM that can be used"):
            ray_ckpt.sign(directory, wrong)
    with pytest.raises(CheckpointNotFoundError):
        ray_ckpt.sign(tmp_path / "nothing", private)


def test_a_key_that_nobody_writes_is_refused_and_one_that_the_shell_passes_is_taken(
    tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    private, public = keys
    ray_ckpt.save({"w": torch.ones(3)}, tmp_path / "run")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    for odd, kind in (("fifo", "a FIFO"), ("link", "a FIFO"), ("run", "a directory")):
        for function in (ray_ckpt.sign, ray_ckpt.verify_signature):
            ray_ckpt.sign(tmp_path / "run", private)
            with pytest.raises(UsageError, match=f"{odd} is {kind}; a key is a file"):
                function(tmp_path / "run", tmp_path / odd)
    reading, writing = os.pipe()  # what <(cat key.pem) is
    with os.fdopen(reading, "rb"), os.fdopen(writing, "wb") as pipe:
        pipe.write(private.read_bytes())
        pipe.close()
        ray_ckpt.sign(tmp_path / "run", f"/dev/fd/{reading}")
    ray_ckpt.verify_signature(tmp_path / "run", public)


def test_a_key_may_have_a_password(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    directory, locked = saved(CheckpointStore(tmp_path / "run"), 1), tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "ec", "-in", keys[0], "-aes256", "-passout", "pass:secret", "-out", locked],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    with pytest.raises(UsageError, match="Password was not given"):
        ray_ckpt.sign(directory, locked)
    ray_ckpt.sign(directory, locked, password="secret")
    ray_ckpt.verify_signature(directory, keys[1])


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        (b"[" * 100_000, "no signature of a model"),
        (b'{"predicate":{"resources":[' + b"{}," * 2_000_000 + b"{}]}}", "the limit is 3000000"),
        (b"1" * (13 << 20), "the limit is 16777216"),
        (b'{"predicate":{"resources":[{"name":"../../x","digest":"00"}]}}', "no signature by"),
        (b'{"predicate":{"resources":[{"name":["x"],"digest":{}}]}}', "no signature by"),
    ],
    ids=["deep", "many values", "long", "another directory's file", "odd types"],
)
def test_what_a_signature_claims_is_limited(tmp_path: Path, keys: tuple[Path, Path], payload: bytes, told: str) -> None:
    private, public = keys
    directory = saved(CheckpointStore(tmp_path / "run"), 1)
    ray_ckpt.sign(directory, private)
    bundle = json.loads((directory / "model.sig").read_text())
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    (directory / "model.sig").write_text(json.dumps(bundle))
    began = time.monotonic()
    with pytest.raises(ray_ckpt.CheckpointError, match=told):
        ray_ckpt.verify_signature(directory, public)
    assert time.monotonic() - began < 60  # without limits it would take hours, or all memory


def test_the_record_alone(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    """Data files are then covered by `verify`, whose checksums stand in the signed record."""
    directory = saved(CheckpointStore(tmp_path / "run"), 1)
    assert ray_ckpt.sign(directory, keys[0], record_only=True).record_only
    [data] = directory.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-1] + b"\1")
    assert ray_ckpt.verify_signature(directory, keys[1]).record_only
    assert ray_ckpt.verify(directory).damages
    manifest = directory / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"0.1", b"0.2"))
    with pytest.raises(ray_ckpt.CheckpointError):
        ray_ckpt.verify_signature(directory, keys[1])


def test_it_goes_with_the_step(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    store = CheckpointStore(tmp_path / "run")
    directory = saved(store, 1)
    saved(store, 2)
    ray_ckpt.sign(store, keys[0], 1)
    store.delete(1)
    assert not directory.exists()


def test_what_other_programs_wrote_has_no_record_to_sign(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "weights.pt")
    with pytest.raises(UsageError, match="`ray-ckpt import` makes a checkpoint of it"):
        ray_ckpt.sign(tmp_path / "weights.pt", keys[0])


def test_the_librarys_own_command_reads_it_and_ours_reads_that_ones(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    directory = saved(CheckpointStore(tmp_path / "run"), 1)
    command = [sys.executable, "-m", "model_signing"]
    signature = ["--signature", str(directory / "model.sig")]
    ray_ckpt.sign(directory, private)
    for changed, code in ((False, 0), (True, 1)):
        if changed:
            with (directory / "manifest.json").open("ab") as file:
                file.write(b" ")
        verify = [*command, "verify", "key", str(directory), *signature, "--public_key", str(public)]
        done = subprocess.run(
            [*verify, "--ignore_unsigned_files"], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
    directory = saved(CheckpointStore(tmp_path / "run"), 2)
    signature = ["--signature", str(directory / "model.sig")]
    subprocess.run(
        [*command, "sign", "key", str(directory), *signature, "--private_key", str(private)],
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert not ray_ckpt.verify_signature(directory, public).record_only


def test_by_command(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    private, public = map(str, keys)
    directory = saved(CheckpointStore(tmp_path / "run"), 1)
    run = CliRunner().invoke
    done = run(cli, ["sign", str(tmp_path / "run"), "--step", "1", "--key", private], standalone_mode=False)
    assert done.return_value == 0, done.output
    assert done.output.startswith("signed: 3 files with ")
    arguments = ["verify", str(tmp_path / "run"), "--signature", public]
    done = run(cli, [*arguments, "--json"], standalone_mode=False)
    assert json.loads(done.output)["signature"]["verdict"] == "signature fits"
    done = run(cli, arguments, standalone_mode=False)
    assert done.output.startswith("signature fits: 3 files with ")
    (directory / "model.sig").unlink()
    done = run(cli, arguments, standalone_mode=False)
    assert isinstance(done.exception, SignatureError)
