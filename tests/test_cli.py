"""The command `ray-ckpt`: what it prints, its exit codes and its JSON, on checkpoints of ours and of others."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from ray_ckpt import CheckpointStore, UsageError, save
from ray_ckpt.cli.main import cli
from ray_ckpt.recipes import command
from tests.conftest import REPOSITORY
from tests.support.commands import assert_one_line
from tests.support.foreign import weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state(scale: float = 1.0) -> dict[str, Any]:
    groups = {f"{name}.{key}": value for name in ("weight", "bias") for key, value in (("lr", 0.1), ("eps", 1e-8))}
    layers = {f"layers.{i}.{part}": torch.ones(3, 2) * i for i in range(50) for part in ("up", "down")}
    return {
        "model": {"weight": torch.arange(1500.0).reshape(50, 30) * scale, "bias": torch.ones(5), **layers},
        "optim": {"param_groups": groups},
        "counters": {"tokens": 12},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        save(state(step), tmp_path / "run", step=step, layout="single")
    return tmp_path / "run"


def call(*arguments: object) -> tuple[int, str]:
    found = click.testing.CliRunner().invoke(cli, [*map(str, arguments)], standalone_mode=False)
    if found.exception is not None:
        raise found.exception
    return int(found.return_value or 0), found.stdout


def data_of(*arguments: object) -> Any:
    return json.loads(call(*arguments, "--json")[1])


def flip(path: Path) -> str:
    file = next(path.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file.name


def cut(path: Path) -> str:
    file = next(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])
    return file.name


def remove(path: Path) -> str:
    file = next(path.glob("*.distcp"))
    file.unlink()
    return file.name


def test_ls_shows_steps_pins_the_latest_and_orphans(run: Path) -> None:
    CheckpointStore(run).pin(2)
    (run / "step-3" / "__0_9-0123456789ab.distcp").write_bytes(b"x" * 50)
    code, text = call("ls", run)
    assert code == 0
    [line] = [line for line in text.splitlines() if line.split()[0] == "3"]
    assert "committed" in line
    assert "single" in line
    assert torch.__version__ in line
    assert line.endswith("latest")
    assert "1 files with 50 B belong to no step" in text
    found = data_of("ls", run)
    assert [(step["step"], step["pinned"]) for step in found["steps"]] == [(1, False), (2, True), (3, False)]
    assert found["latest"] == 3
    assert found["orphans"] == {"step-3/__0_9-0123456789ab.distcp": 50}


@pytest.mark.parametrize("damage", [cut, remove])
def test_ls_names_what_is_damaged_and_answers_no(run: Path, damage: Callable[[Path], str]) -> None:
    file = damage(run / "step-3")
    code, text = call("ls", run)
    assert code == 1
    assert re.search(rf"damaged: .*{file}", text)
    assert data_of("ls", run)["latest"] == 2


@pytest.mark.parametrize("damage", [flip, cut, remove])
def test_verify_names_file_range_and_tensor_and_answers_no(run: Path, damage: Callable[[Path], str]) -> None:
    assert call("verify", run)[0] == 0
    file = damage(run / "step-3")
    code, text = call("verify", run, "--step", 3)
    assert code == 1
    assert re.search(rf"damaged: {re.escape(file)} \[\d+, \d+\) '[\w.]*'", text)
    assert call("verify", run, "--step", 2)[0] == 0


def test_verify_tells_how_far_it_is(run: Path) -> None:
    from ray_ckpt import verify

    told: list[tuple[int, int]] = []
    report = verify(run, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (report.total_bytes, report.total_bytes)
    assert told == sorted(told)


def test_verify_scans_for_nan(tmp_path: Path) -> None:
    odd = torch.ones(9)
    odd[3:5] = torch.tensor([float("nan"), float("-inf")])
    save({"good": torch.ones(3), "odd": odd, "small": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path)
    assert call("verify", tmp_path)[0] == 0
    code, text = call("verify", tmp_path, "--scan-nan")
    assert code == 1
    assert "odd: 1 NaN, 1 Inf" in text
    assert data_of("verify", tmp_path, "--scan-nan")["nonfinite"] == {"odd": {"num_nan": 1, "num_inf": 1}}


def test_inspect_prints_a_page(run: Path) -> None:
    code, text = call("inspect", run)
    assert code == 0
    assert len(text.splitlines()) < 30
    assert "[0-49]" in text
    assert "lr=0.1, eps=1e-08" in text
    assert "of 2 parameters: weight, bias" in text
    assert "counters.tokens = 12" in text
    found = data_of("inspect", run, "--step", 2)
    assert {tensor["name"] for tensor in found["tensors"]} == {f"model.{name}" for name in state()["model"]}
    assert found["sections"][0] == {
        "name": "model", "num_tensors": 102, "num_elements": 2105, "num_bytes": 8420, "num_values": 0
    }  # fmt: skip
    assert [(file["rank"], file["num_tensors"]) for file in found["files"]] == [(0, 102)]


@pytest.mark.parametrize("view", ["--tree", "--files", "--layout"])
def test_inspect_has_views(run: Path, view: str) -> None:
    code, text = call("inspect", run, view)
    assert code == 0
    assert {"--tree": "float32 [50, 30]", "--files": ".distcp", "--layout": "by ranks 0"}[view] in text


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0], [5.0, 5.0], [3e38, -3e38, 1.0], [float("nan")] * 3])
def test_the_statistics_of_a_tensor(tmp_path: Path, values: list[float]) -> None:
    tensor = torch.tensor(values).repeat(2)
    save({"t": tensor}, tmp_path)
    found = data_of("inspect", tmp_path, "--tensor", "t")
    finite = tensor[tensor.isfinite()].double()
    assert found["num_nan"] == len(tensor) - len(finite)
    assert sum(number for _, _, number in found["histogram"]) == len(finite)
    if len(finite):
        assert (found["minimum"], found["maximum"]) == (finite.min(), finite.max())
        assert found["mean"] == pytest.approx(float(finite.mean()))
        assert found["std"] == pytest.approx(float(finite.std(correction=0)))


def write_foreign(kind: str, path: Path) -> Path:
    if kind == "dcp":
        dcp.save(weights(), checkpoint_id=path, no_dist=True)
        return path
    path = path.with_suffix(f".{kind}")
    torch.save(weights(), path) if kind == "pt" else safetensors.torch.save_file(weights(), path)
    return path


@pytest.mark.parametrize("kind", ["dcp", "pt", "safetensors"])
def test_other_programs_checkpoints_are_looked_at_too(tmp_path: Path, kind: str) -> None:
    path = write_foreign(kind, tmp_path / "foreign")
    assert len(data_of("ls", path)["steps"]) == 1
    assert {tensor["name"] for tensor in data_of("inspect", path)["tensors"]} == weights().keys()
    assert data_of("inspect", path, "--tensor", "layer61.bias")["shape"] == [61]
    code, text = call("verify", path, "--scan-nan")
    assert code == 0
    assert "read, but not verified" in text


def test_what_would_go_is_shown_and_goes_with_yes(run: Path) -> None:
    store = CheckpointStore(run)
    _, text = call("prune", run, "--keep-last", 1, "--keep-every", 2)
    assert "would remove" in text
    assert store.steps() == (1, 2, 3)
    assert data_of("prune", run, "--keep-last", 1, "--keep-every", 2, "--yes")["removed"] == [1]
    assert store.steps() == (2, 3)
    call("pin", run, 2)
    with pytest.raises(UsageError, match=r"step 2 .* is pinned"):
        call("delete", run, 3, 2, "--yes")
    assert store.steps() == (2, 3)
    call("unpin", run, 2)
    assert "would remove" in call("delete", run, 2)[1]
    call("delete", run, 2, "--yes")
    assert store.steps() == (3,)
    orphan = run / "step-3" / "__0_9-0123456789ab.distcp"
    orphan.write_bytes(b"x")
    call("clean", run, "--older-than", 0)
    assert orphan.exists()
    call("clean", run, "--older-than", 0, "--yes")
    assert not orphan.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["ls", "/no/such/place"], 1, "no committed checkpoint at /no/such/place"),
        (["prune", "RUN"], 2, "say what to keep"),
        (["prune", "/no/such/place", "--keep-last", "1"], 1, "no store at /no/such/place: nothing is there"),
        (["clean", "/no/such/place"], 1, "no store at /no/such/place: nothing is there"),
        (["inspect", "RUN", "--tensor", "weigth"], 2, "has no tensor 'weigth'"),
        (["inspect", "RUN", "--step", "9"], 1, "step 9 is not committed"),
        (["inspect"], 2, "Missing argument"),
        (["nothing"], 2, "No such command"),
    ],
)
def test_errors_are_one_line(
    run: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["ray-ckpt", *(str(run) if word == "RUN" else word for word in arguments)])
    assert command._run("ray_ckpt.cli.main:cli") == code
    assert_one_line(capsys.readouterr().err, message)


@pytest.mark.parametrize("form", ["s3://KEY:SEC/RET@bucket/x", "s3:/KEY:SECRET@bucket", "abfs://c@a/x?sig=SEC RET"])
@pytest.mark.parametrize(
    "words",
    [
        ["URI"],
        ["ls", "RUN", "URI"],
        ["ls", "--URI"],
        ["inspect", "RUN", "--step", "URI"],
        ["export", "RUN", "x", "--to", "URI"],
        ["sign", "RUN", "--key", "URI"],
        ["verify", "RUN", "--signature", "URI"],
        ["report", "RUN", "-o", "URI"],
        ["demo", "--json", "URI"],
        ["demo", "--report", "URI"],
        ["demo", "--events", "URI"],
        ["verify", "RUN", "--ray", "--address", "URI"],
    ],
    ids=" ".join,
)
def test_a_uri_in_the_wrong_place_is_told_without_its_credentials(
    run: Path, words: list[str], form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(run) if word == "RUN" else word.replace("URI", form) for word in words]
    monkeypatch.setattr(sys, "argv", ["ray-ckpt", *arguments])
    assert command._run("ray_ckpt.cli.main:cli") == 2
    told = capsys.readouterr().err
    assert_one_line(told, "")
    assert not any(secret in told for secret in ("KEY", "SEC", "RET"))


def test_what_needs_no_torch_loads_none(run: Path) -> None:
    code = (
        "import sys; from ray_ckpt.cli.main import cli\n"
        "for words in (['--help'], ['ls', sys.argv[1]], ['inspect', sys.argv[1]], ['pin', sys.argv[1], '1'],"
        " ['prune', sys.argv[1], '--keep-last', '1'], ['delete', sys.argv[1], '2'], ['demo', '--help']):\n"
        "    cli.main(words, standalone_mode=False)\n"
        "print({'torch', 'ray', 'numpy.random'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code, run], capture_output=True, text=True, check=True, timeout=60)
    assert "torch" not in done.stdout.splitlines()[-1]
    assert "'ray'" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["verify", "--help"], ["prune", "--help"], ["demo", "--help"]]
)
def test_help_loads_none_of_the_large_libraries(words: list[str]) -> None:
    assert not large_libraries_of(words, {})


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("ray-ckpt ver", ["verify"]), ("ray-ckpt ls --js", ["--json"]), ("ray-ckpt re", ["report", "reshard"])],
)
def test_the_shell_completes_commands_and_options(typed: str, expected: list[str]) -> None:
    asked = {"_RAY_CKPT_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    assert not large_libraries_of([], asked)
    done = subprocess.run(
        [sys.executable, "-c", "from ray_ckpt.cli.main import cli; cli(prog_name='ray-ckpt')"],
        env=os.environ | asked, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.split() == [f"plain,{word}" for word in expected]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_is_told_how_to_complete(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from ray_ckpt.cli.main import cli; cli(prog_name='ray-ckpt')"],
        env=os.environ | {"_RAY_CKPT_COMPLETE": f"{shell}_source"},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert f"_RAY_CKPT_COMPLETE={shell}_complete" in done.stdout


@pytest.mark.slow  # a ratio of times; that no large library is loaded is told without, below and above
@pytest.mark.parametrize(
    ("words", "libraries"),
    [
        (["--help"], "click, dataclasses, typing"),
        (["demo", "--help"], "click, dataclasses, typing"),
        (["ls", "RUN"], "click, dataclasses, pyarrow.fs, xxhash"),
        (["inspect", "RUN"], "click, dataclasses, pyarrow.fs, xxhash"),
        (["prune", "RUN", "--keep-last", "1"], "click, dataclasses, pyarrow.fs, xxhash"),
    ],
    ids=lambda item: item[0] if isinstance(item, list) else "",
)
def test_a_start_costs_little_more_than_the_libraries_it_needs(run: Path, words: list[str], libraries: str) -> None:
    """By the processor time of the quickest of a few, in turn, so that what else the machine does counts for little.

    A library of the size of torch, Ray or rich that came in unasked would cost as much again as all that is needed.
    """
    ours = ["-m", "ray_ckpt", *(str(run) if word == "RUN" else word for word in words)]
    quickest = {"ours": math.inf, "libraries": math.inf}
    for _ in range(8):
        for name, arguments in (("ours", ours), ("libraries", ["-c", f"import {libraries}"])):
            before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, timeout=60)
            quickest[name] = min(quickest[name], sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before)
        if quickest["ours"] < 2.5 * quickest["libraries"]:
            break
    assert quickest["ours"] < 2.5 * quickest["libraries"]


def large_libraries_of(words: list[str], environment: dict[str, str]) -> set[str]:
    """Those that a run of the command imports, as the interpreter lists what it imports."""
    code = "from ray_ckpt.cli.main import cli; cli(prog_name='ray-ckpt')"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code, *words],
        env=os.environ | environment, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "ray_ckpt.cli.main" in imported
    return imported & {"torch", "ray", "pyarrow", "numpy", "rich"}


def test_a_page_is_printed_however_many_tensors_and_files_there_are(tmp_path: Path) -> None:
    layers = {f"layers.{i}.{j}.weight{i * j}": torch.ones(1 + i % 3) for i in range(40) for j in range(40)}
    save({"model": layers}, tmp_path)
    safetensors_files = tmp_path / "shards"
    safetensors_files.mkdir()
    for number in range(300):
        safetensors.torch.save_file({f"w{number}": torch.ones(1)}, safetensors_files / f"model-{number:05}.safetensors")
    for target, view in [
        (tmp_path, []), (tmp_path, ["--layout"]), (safetensors_files, []), (safetensors_files, ["--files"]),
        (safetensors_files, ["--layout"]),
    ]:  # fmt: skip
        assert len(call("inspect", target, *view)[1].splitlines()) < 100
    for file in tmp_path.glob("*.distcp"):
        file.unlink()
    code, text = call("verify", tmp_path)
    assert code == 1
    assert len(text.splitlines()) < 100
    assert len(data_of("verify", tmp_path)["report"]["damages"]) > 1000


def test_a_log_has_no_colors_and_no_bar(run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ray_ckpt", "verify", run], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith("verified: ")
    assert len(done.stdout.splitlines()) == 1
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["ls"], ["inspect", "--json"], ["demo", "--help"]])
def test_a_reader_that_has_enough_is_no_error(run: Path, arguments: list[str]) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    place = [] if "--help" in arguments else [str(run)]
    done = subprocess.run(
        [sys.executable, "-m", "ray_ckpt", *arguments, *place], stdout=theirs, stderr=subprocess.PIPE, timeout=60
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_an_output_that_is_full_is_one_line(run: Path, unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ray_ckpt", "ls", run], stdout=full, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, check=False, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert_one_line(done.stderr, "the output cannot be written: [Errno 28] No space left on device")


def test_verify_appends_what_happens(run: Path, tmp_path: Path) -> None:
    told = tmp_path / "events.jsonl"
    call("verify", run, "--events", told)
    cut(run / "step-3")
    assert call("verify", run, "--events", told)[0] == 1
    first, second = [json.loads(line) for line in told.read_text().splitlines()]
    assert [(event["operation"], event["failure"]) for event in (first, second)] == [
        ("verify", ""),
        ("verify", "IntegrityError"),
    ]


@pytest.mark.parametrize("words", [["ls", "/no/such/place"], ["inspect", "RUN", "--tensor", "w"], ["prune", "RUN"]])
def test_errors_are_json_too(run: Path, words: list[str]) -> None:
    words = [str(run) if word == "RUN" else word for word in words]
    done = subprocess.run(
        [sys.executable, "-m", "ray_ckpt", *words, "--json"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode in (1, 2)
    assert done.stderr == f"error: {json.loads(done.stdout)['error']}\n"


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": "xterm"}])
def test_a_terminal_without_colors_gets_none(
    run: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(run / "step-3")
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    found = click.testing.CliRunner().invoke(cli, ["ls", str(run)], color=True, env=environment)
    assert "damaged" in found.stdout
    assert ("\x1b[" in found.stdout) == (environment == {"TERM": "xterm"})


def test_a_name_of_thousands_of_parts_is_shown(tmp_path: Path) -> None:
    save({"model": {"a." * 3000 + "w": torch.ones(2), "b": torch.ones(1)}}, tmp_path)
    for view in ([], ["--tree"], ["--files"], ["--layout"]):
        assert call("inspect", tmp_path, *view)[0] == 0
    assert data_of("inspect", tmp_path)["sections"][0]["num_tensors"] == 2


def test_what_a_file_is_called_cannot_move_the_cursor(tmp_path: Path) -> None:
    save({"evil\x1b[2Jname": torch.ones(2)}, tmp_path)
    for view in ([], ["--tree"], ["--layout"]):
        assert "\x1b" not in call("inspect", tmp_path, *view)[1]


def test_the_commands_in_the_document_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (REPOSITORY / "docs" / "cli.md").read_text()
    [block] = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(run.parent)
    for line in block.splitlines():
        program, *arguments = shlex.split(line)
        if program == "openssl":
            subprocess.run([program, *arguments], check=True, capture_output=True)
            continue
        assert program == "ray-ckpt"
        assert call(*arguments)[0] == 0, line
    assert {name for name in cli.list_commands(click.Context(cli)) if f"`{name}" not in text} == set()
