"""doctor: what it says of this machine, of real clusters, and of what was planted in them."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from ray_ckpt import Finding, NodeFacts, doctor, save
from ray_ckpt.cli.main import cli
from ray_ckpt.inspection.diagnosis import diagnose
from ray_ckpt.inspection.machines import Machine, Read, Written
from tests.support.clusters import Head, Sandbox, add_node, joined, start_head

GIB = 1 << 30
VERSIONS = {"python": "3.12.1", "torch": "2.13.0", "ray": "2.60.0", "ray_ckpt": "0.1.0"}
GOOD = Machine("a", 0.0, None, "", 8 * GIB, 65536, 100 * GIB, 200 * GIB)
WROTE = Written("", "x", 1e9, 0.0, 100 * GIB)
NODES = tuple(NodeFacts(name, "", VERSIONS, GOOD, 0.0, 0.0, WROTE, Read(bytes_per_s=1e9), "a") for name in "abc")


def wrong(findings: Sequence[Finding], subject: str) -> str:
    """All that is wrong with the subject."""
    return "\n".join(str(f) for f in findings if f.level == "wrong" and f.subject == subject)


def with_last(**changes: object) -> list[NodeFacts]:
    return [*NODES[:2], dataclasses.replace(NODES[2], **changes)]  # type: ignore[arg-type]


def machine(**changes: object) -> Machine:
    return dataclasses.replace(GOOD, **changes)  # type: ignore[arg-type]


def test_nothing_is_wrong_with_good_nodes() -> None:
    assert {finding.level for finding in diagnose(NODES, "s3://b/run", 10 * GIB)} == {"fine"}


@pytest.mark.parametrize(
    ("changes", "subject", "text"),
    [
        ({"problem": "ValueError: boom"}, "nodes", "ValueError: boom on c"),
        ({"versions": VERSIONS | {"torch": "2.12.0"}}, "torch", "2.13.0 on a, b; 2.12.0 on c"),
        ({"versions": VERSIONS | {"ray_ckpt": None}}, "ray_ckpt", "not installed on c"),
        ({"ray_gpus": 4.0}, "GPUs", "Ray counts 4 on c, torch sees 0"),
        ({"machine": machine(num_gpus=4), "ray_gpus": 4.0}, "GPUs", "has no NCCL"),
        ({"machine": machine(shared_memory_bytes=64 << 20)}, "shared memory", "only 64 MiB of shared memory on c"),
        ({"machine": machine(open_files=256)}, "file handles", "only 256 open files on c"),
        ({"machine": machine(temporary_free_bytes=GIB)}, "temporary disk", "1 GiB free of 200 GiB on c"),
        ({"clock_ahead_s": -90.0}, "clock", "c's is 90 s behind"),
        ({"written": dataclasses.replace(WROTE, clock_ahead_s=30.0)}, "clock", "the storage's, as c sees it, is 30 s"),
        ({"written": Written(problem="no space"), "read": None}, "storage", "no space, from c"),
        ({"read": Read(is_there=False)}, "storage", "is not shared: c does not see the file that a wrote"),
        ({"read": Read(problem="reads back other bytes")}, "storage", "reads back other bytes, on c"),
        ({"written": dataclasses.replace(WROTE, free_bytes=15 * GIB)}, "room", "15 GiB free"),
    ],
)
def test_what_is_wrong_with_one_node_is_said_with_what_to_do(
    changes: dict[str, object], subject: str, text: str
) -> None:
    findings = list(diagnose(with_last(**changes), "s3://b/run", 10 * GIB))
    told = wrong(findings, subject)
    assert text in told
    assert all(finding.mend for finding in findings if finding.level == "wrong")
    assert {finding.subject for finding in findings if finding.level == "wrong"} == {subject}


def test_a_slow_node_and_few_files_are_notes() -> None:
    slow = with_last(written=dataclasses.replace(WROTE, bytes_per_s=1e6), machine=machine(open_files=1024))
    notes = [str(finding) for finding in diagnose(slow, "s3://b/run") if finding.level == "note"]
    assert len(notes) == 2
    assert any("c writes only 977 KiB/s" in note for note in notes)


def run(*words: str, before: str = "", **environment: str) -> tuple[int, str, str]:
    """The command as a process of its own, which finds no cluster but one that it is told."""
    command = shlex.join([sys.executable, "-m", "ray_ckpt", "doctor", *words])
    environment = {"RAY_TMPDIR": "/nonexistent", **environment}
    done = subprocess.run(
        ["bash", "-c", f"{before}{command}"], env=os.environ | environment, capture_output=True, text=True, timeout=110
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster is found."""
    monkeypatch.setattr("ray_ckpt.cluster.doctor.find_cluster", lambda address: None)


@pytest.mark.usefixtures("alone")
def test_without_ray_this_machine_is_looked_at_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save({"weight": torch.ones(3)}, tmp_path / "run", step=1)
    before = sorted(tmp_path.rglob("*"))
    code = cli.main(["doctor", "--storage", str(tmp_path / "run"), "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] == (code == 0)
    [cluster] = [finding for finding in found["findings"] if finding["subject"] == "cluster"]
    assert (cluster["level"], "only this machine was looked at" in cluster["text"]) == ("note", True)
    told = [finding["text"] for finding in found["findings"] if finding["subject"] in ("storage", "room")]
    assert any("can be written" in text for text in told)
    assert any("the latest checkpoint there takes" in text for text in told)
    assert sorted(tmp_path.rglob("*")) == before
    [node] = found["nodes"]
    assert node["written"]["bytes_per_s"] > 0


@pytest.mark.usefixtures("alone")
def test_a_storage_that_cannot_be_written_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    report = doctor(str(tmp_path / "file" / "run"))
    assert not report.healthy
    assert "cannot create" in wrong(report.findings, "storage")


def test_few_file_handles_and_an_address_where_nobody_answers() -> None:
    code, out, err = run("--address", "127.0.0.1:1", before="ulimit -n 256; ")
    assert (code, err) == (1, "")
    assert "wrong  cluster: no Ray cluster answers at 127.0.0.1:1" in out
    assert "wrong  file handles: a process may have only 256 open files" in out


def test_wrong_use_is_two() -> None:
    code, out, err = run("--storage", "s3://")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


@pytest.fixture(scope="module")
def clusters() -> Iterator[Head]:
    before = Path.cwd()
    with Sandbox() as sandbox:
        head = start_head(sandbox, num_cpus=1)
        os.chdir(sandbox.root)  # Ray's workers look first where the driver was when it joined
        try:
            with joined(head):
                yield head
        finally:
            os.chdir(before)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_faults_that_were_planted_in_a_cluster_are_found(clusters: Head, tmp_path: Path) -> None:
    good = doctor(str(tmp_path / "run"))
    assert good.healthy, good.findings
    assert len(good.nodes) == 2  # with the driver's machine
    # Shared by no two processes.
    told = wrong(doctor("memory://run").findings, "storage")
    assert "does not see the file that" in told
    # A node on which another version of this package is found first.
    add_node(clusters, "127.0.0.2", PYTHONPATH=os.pathsep.join([plant_version(tmp_path), os.environ["PYTHONPATH"]]))
    told = wrong(doctor().findings, "ray_ckpt")
    assert "9.0.1.0 on" in told
    assert "install the same version" in told


def plant_version(directory: Path) -> str:
    """A directory whose `ray_ckpt` is this one, but for its version."""
    planted = directory / "other" / "ray_ckpt"
    planted.mkdir(parents=True)
    package = Path(sys.modules["ray_ckpt"].__file__ or "").parent
    future = "from __future__ import annotations\n"
    text = (package / "__init__.py").read_text().replace('__version__ = "', '__version__ = "9.')
    (planted / "__init__.py").write_text(text.replace(future, f"{future}\n__path__.append({str(package)!r})\n", 1))
    return str(planted.parent)


def test_the_planted_version_is_what_a_process_finds(tmp_path: Path) -> None:
    paths = os.pathsep.join([plant_version(tmp_path), os.environ["PYTHONPATH"]])
    code = "import ray_ckpt.storage.files; print(ray_ckpt.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, cwd=tmp_path,
        capture_output=True, text=True, check=True, timeout=100,
    )  # fmt: skip
    assert done.stdout.strip().startswith("9.")
