"""Save and load on a real HTTP S3 server: what it costs in requests and bytes, and that throttling only delays it."""

from __future__ import annotations

import copy
import math
import uuid

import pytest
import torch
import torch.distributed.checkpoint as dcp
from s3torchconnector import S3ClientConfig
from s3torchconnector._s3client import S3Client
from s3torchconnector.dcp import S3StorageReader, S3StorageWriter
from s3torchconnector.dcp.s3_prefix_strategy import BinaryPrefixStrategy
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ray_ckpt.dcp.reader import ArrowStorageReader
from ray_ckpt.dcp.writer import ArrowStorageWriter
from ray_ckpt.errors import CheckpointExistsError, CheckpointNotFoundError, StorageError
from ray_ckpt.storage.files import RetryPolicy, Storage
from tests.support import driver
from tests.support.s3 import run_s3

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

AT_ONCE = RetryPolicy(attempts=6, first_wait_s=0.001, max_wait_s=0.002)
SIZE = 1500
NUM_STAGES = 4


@pytest.fixture(scope="module")
def s3():
    with run_s3() as server:
        yield server


@pytest.fixture
def storage(s3):
    return Storage(s3.uri(uuid.uuid4().hex), retry=AT_ONCE)


def _stage(number):
    weight = torch.arange(float(SIZE * SIZE)).reshape(SIZE, SIZE) + number
    return {
        f"layer{number}.weight": weight,
        f"layer{number}.bias": weight[0].clone(),
        f"layer{number}.lr": 0.1 * number,
    }


def _save(storage):
    states = [_stage(number) for number in range(NUM_STAGES)]
    driver.save(states, [ArrowStorageWriter(storage) for _ in states])


def _load_rows(storage, rank, world_size):
    """What an FSDP rank does: its rows of every tensor. Returns the tensors and how many bytes they have."""
    targets = {}

    class Planner(DefaultLoadPlanner):
        def lookup_tensor(self, index):
            return targets[index.fqn]

    reader = ArrowStorageReader(storage)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    items = []
    for number in range(NUM_STAGES):
        for name, shape in ((f"layer{number}.weight", (SIZE, SIZE)), (f"layer{number}.bias", (SIZE,))):
            rows = math.ceil(SIZE / world_size)
            first = rank * rows
            shard = (min(rows, SIZE - first), *shape[1:])
            targets[name] = torch.zeros(shard)
            wanted = ChunkStorageMetadata(torch.Size([first, *[0] * (len(shape) - 1)]), torch.Size(shard))
            items += create_read_items_for_chunk_list(name, metadata.state_dict_metadata[name], [wanted])
    reader.read_data(LoadPlan(items), Planner()).wait()
    for number in range(NUM_STAGES):
        full = _stage(number)
        for name in (f"layer{number}.weight", f"layer{number}.bias"):
            rows = math.ceil(SIZE / world_size)
            assert torch.equal(targets[name], full[name][rank * rows : (rank + 1) * rows])
    return sum(tensor.nbytes for tensor in targets.values())


def test_shards_cost_little_more_than_their_bytes(s3, storage):
    _save(storage)
    s3.reset()
    wanted = sum(_load_rows(storage, rank, 4) for rank in range(4))
    assert s3.sent_bytes <= 1.1 * wanted
    # Per rank: the manifest, and per stage the edges and the middle of its rows of the weight, and the bias.
    assert s3.requests["GET"] <= 4 * (2 + NUM_STAGES * 4)


def test_commit_is_the_last_request(s3, storage):
    writes = []

    def watch(environment):
        if environment["REQUEST_METHOD"] in ("PUT", "POST"):
            writes.append(environment["PATH_INFO"].rpartition("/")[2])
        return False

    with s3.throttled(watch):
        _save(storage)
    assert writes[-1] == "manifest.json"
    first_of_manifest = writes.index("manifest.json")
    assert not any(name.endswith(".distcp") for name in writes[first_of_manifest:])


def test_existing_checkpoint_is_refused(storage):
    with pytest.raises(CheckpointNotFoundError):
        ArrowStorageReader(storage).read_manifest()
    _save(storage)
    with pytest.raises(CheckpointExistsError) as raised:
        _save(storage)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "method", ["GET", "PUT", *(pytest.param(method, marks=pytest.mark.slow) for method in ("HEAD", "POST"))]
)
def test_throttling_only_delays(s3, storage, method):
    left = 9  # more than the SDK's own attempts

    def throttle(environment):
        nonlocal left
        hit = environment["REQUEST_METHOD"] == method and left > 0
        left -= hit
        return hit

    with s3.throttled(throttle):
        _save(storage)
        _load_rows(storage, 1, 4)
    assert left == 0


def test_throttling_without_end_is_an_error(s3, storage):
    _save(storage)
    always = s3.throttled(lambda environment: environment["REQUEST_METHOD"] == "GET")
    with always, pytest.raises(StorageError) as raised:
        _load_rows(Storage(storage.uri, retry=RetryPolicy(1, 0.001, 0.001)), 0, 4)
    assert raised.value.transient


def test_anonymous_access_sends_no_credentials(s3, storage):
    """As `aws --no-sign-request`: a public checkpoint is read without an account."""
    _save(storage)
    signed = []

    def watch(environment):
        signed.append("HTTP_AUTHORIZATION" in environment)
        return False

    with s3.throttled(watch):
        _load_rows(storage, 0, 4)
        assert all(signed)
        signed.clear()
        path, options = storage.uri.partition("@")[2].split("?")
        _load_rows(Storage(f"s3://{path}?{options}&anonymous=true", retry=AT_ONCE), 1, 4)
        assert signed
        assert not any(signed)


@pytest.fixture
def connector(s3, monkeypatch):
    """Amazon's own DCP storage on the same server, which its constructors take no address of."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    config = S3ClientConfig(force_path_style=True)
    client = S3Client("us-east-1", endpoint=f"http://127.0.0.1:{s3.port}", s3client_config=config)

    def connect(kind, path, **options):
        storage = kind("us-east-1", f"s3://bucket/{path}/", s3client_config=config, **options)
        storage.fs._client = client
        return storage

    return connect


STATE = {"weight": torch.arange(600_000.0).view(600, 1000), "lr": 0.1, "inner": {"x": torch.ones(3).bfloat16()}}
BLANK = {"weight": torch.zeros(600, 1000), "lr": 0.0, "inner": {"x": torch.zeros(3).bfloat16()}}


def _equal(found):
    same = torch.equal(found["weight"], STATE["weight"]) and torch.equal(found["inner"]["x"], STATE["inner"]["x"])
    return same and found["lr"] == STATE["lr"]


@pytest.mark.parametrize("prefix_strategy", [None, BinaryPrefixStrategy(epoch_num=3)])
def test_what_s3torchconnector_wrote_is_read(s3, connector, prefix_strategy):
    path = uuid.uuid4().hex
    dcp.save(STATE, storage_writer=connector(S3StorageWriter, path, prefix_strategy=prefix_strategy), no_dist=True)
    found = copy.deepcopy(BLANK)
    assert not _equal(found)
    s3.reset()
    dcp.load(found, storage_reader=ArrowStorageReader(Storage(s3.uri(path))), no_dist=True)
    assert _equal(found)
    assert s3.sent_bytes < 1.1 * STATE["weight"].nbytes


def test_s3torchconnector_reads_what_we_wrote(s3, connector):
    path = uuid.uuid4().hex
    dcp.save(STATE, storage_writer=ArrowStorageWriter(s3.uri(path)), no_dist=True)
    found = copy.deepcopy(BLANK)
    dcp.load(found, storage_reader=connector(S3StorageReader, path), no_dist=True)
    assert _equal(found)
