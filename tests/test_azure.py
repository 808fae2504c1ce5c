"""Save and load on an Azure server: what is replaced stays whole until the new one is; no message tells a signature."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator

import pytest
import torch

from ray_ckpt import (
    CheckpointExistsError,
    CheckpointStore,
    FormatError,
    RetryPolicy,
    Storage,
    StorageError,
    keep_last,
    load,
    save,
    verify,
)
from tests.support.azure import run_azure


@pytest.fixture(scope="module")
def azure() -> Iterator[str]:
    with run_azure() as place:
        yield place


@pytest.fixture
def storage(azure: str) -> Storage:
    return Storage(
        azure.format(path=uuid.uuid4().hex), retry=RetryPolicy(attempts=2, first_wait_s=0.01, max_wait_s=0.1)
    )


def state(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(3_000_000.0) + step}


def loaded(target: Storage | CheckpointStore) -> float:
    box = {"weight": torch.zeros(3_000_000)}
    load(box, target)
    assert torch.equal(box["weight"], state(int(box["weight"][0]))["weight"])
    return box["weight"][0].item()


def test_a_store_is_kept(storage: Storage) -> None:
    store = CheckpointStore(storage)
    for step in (1, 2, 3):
        save(state(step), store, step)
    with pytest.raises(CheckpointExistsError):
        save(state(4), store, 3)
    save(state(5), store, 3, overwrite=True)
    assert loaded(store) == 5
    assert verify(store, 3).damages == ()
    assert store.prune(keep_last(2)).removed == (1,)
    store.pin(2)
    assert (store.pins(), store.steps()) == ((2,), (2, 3))
    assert store.clean(older_than_s=0).files == ()
    assert loaded(store) == 5


def test_what_is_replaced_is_there_until_the_new_is(storage: Storage) -> None:
    """Azure's own streams empty the object as they open it, so the record is written beside it and copied over."""
    save(state(1), storage)
    before = storage.read_bytes("manifest.json")
    prepared = storage.prepare("manifest.json", b"the next one")
    assert storage.read_bytes("manifest.json") == before
    prepared.publish()
    assert storage.read_bytes("manifest.json") == b"the next one"
    assert [name for name in storage.list_files() if name.endswith(".tmp")] == []
    with storage.filesystem.open_output_stream(storage.path("manifest.json")):
        assert storage.size("manifest.json") == 0  # why


@pytest.mark.slow
def test_a_reader_beside_overwrites_always_finds_a_checkpoint(storage: Storage) -> None:
    save(state(0), storage)
    over, seen, wrong = threading.Event(), [], []

    def read() -> None:
        reader = Storage(storage.uri)
        while not over.is_set():
            try:
                seen.append(len(reader.read_bytes("manifest.json")))
            except (FormatError, StorageError) as error:
                wrong.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for step in range(1, 6):
            save(state(step), storage, overwrite=True)
    finally:
        over.set()
        thread.join(30)
    assert wrong == []
    assert seen
    assert min(seen) > 0
    assert loaded(storage) == 5


@pytest.mark.slow
def test_the_container_is_told_and_the_signature_is_not(azure: str, storage: Storage) -> None:
    assert storage.address.startswith("abfs://bucket@devstoreaccount1.dfs.core.windows.net/")
    nowhere = azure.format(path="run").replace("bucket@", "missing@")
    with pytest.raises(StorageError) as raised:
        save(state(1), nowhere)
    assert "missing" in str(raised.value)
    signature = azure.partition("sig=")[2]
    assert signature[:10] not in f"{raised.value}"
    refused = azure.format(path="run").replace("sig=", "sig=AAAA")
    with pytest.raises(StorageError, match="whether these processes have credentials"):
        loaded(Storage(refused, retry=RetryPolicy(attempts=1)))
