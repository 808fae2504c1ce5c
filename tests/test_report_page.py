"""The page of a checkpoint in a real browser: it loads, says what its JSON says, can be read, and asks for no more."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console

from ray_ckpt import Layout, LoadReport, SaveReport, UsageError, load, save, write_report
from ray_ckpt.plain_data import plain
from ray_ckpt.recipes.reshard import job as reshard_job
from ray_ckpt.recipes.reshard.task import write_rank
from ray_ckpt.recipes.screen import Screen
from ray_ckpt.report import Phase
from tests.conftest import REPOSITORY
from tests.test_cli import call, cut, data_of, flip, remove

pytest.importorskip("vl_convert")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HOSTILE = [
    "model.</script><script>window.hurt = 1</script>",
    "model.<img src=x onerror='window.hurt = 1'>",
    "model.\"quoted\" & 'single'",
    "model.{{ 7 * 7 }}{% raw %}",
    "model.<!--<script>",
    "model.line\nbreak\x00\x1b[31m\u202e\u2028",
    "model.\ud800half",
    "model.javascript:window.hurt = 1",
    "model." + "x" * 3000,
    "model." + "7" * 5000,
    "model..",
    "",
]

CONTRAST = """
() => {
  const channels = color => {
    const found = color.match(/[\\d.]+/g);
    return found && {rgb: found.slice(0, 3).map(Number), alpha: found.length > 3 ? Number(found[3]) : 1};
  };
  const luminance = rgb => rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const opaque = element => {
    const style = getComputedStyle(element);
    const isShape = element instanceof SVGGeometryElement;
    const found = channels(isShape ? style.fill : style.backgroundColor);
    return found && found.alpha > 0.5 && style.fill !== "none" ? found.rgb : null;
  };
  const texts = [...document.querySelectorAll("svg text, h1, h2, p, td, th, summary, code, data, span")]
    .filter(element => element.textContent.trim() && element.checkVisibility({opacityProperty: true}));
  return texts.map(element => {
    element.scrollIntoView({block: "center", inline: "center"});
    const box = element.getBoundingClientRect();
    const under = document.elementsFromPoint(box.x + Math.min(box.width / 2, 10), box.y + box.height / 2)
      .filter(other => !(other instanceof SVGTextContentElement)).map(opaque).find(found => found);
    const style = getComputedStyle(element);
    const color = channels(element instanceof SVGElement ? style.fill : style.color).rgb;
    const [high, low] = [luminance(color), luminance(under)].sort((a, b) => b - a);
    return {text: element.textContent.slice(0, 60), ratio: (high + 0.05) / (low + 0.05), box: box.width};
  }).filter(found => found.box > 0);
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield opened
        opened.close()


class Opened:
    """A page that is open in the browser, all charts drawn."""

    def __init__(self, browser: Any, path: Path, scheme: str = "light") -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(color_scheme=scheme, viewport={"width": 1100, "height": 900})
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri(), timeout=60_000)
        drawn = "document.documentElement.dataset.charts !== 'drawing'"
        self.page.wait_for_function(drawn, timeout=60_000)

    def close(self) -> None:
        self.page.close()

    @property
    def data(self) -> Any:
        return json.loads(self.page.evaluate("document.getElementById('report-data').textContent"))

    @property
    def numbers(self) -> dict[str, float]:
        """Id -> value of every number in the text."""
        script = "[...document.querySelectorAll('data')].map(data => [data.id, Number(data.value)])"
        return dict(self.page.evaluate(script))

    def shown(self, chart: str) -> list[str]:
        """What the marks of a chart are called."""
        marks = f"[...document.querySelectorAll('#{chart} [aria-label]')].map(mark => mark.getAttribute('aria-label'))"
        return list(self.page.evaluate(marks))


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Opened]]:
    pages: list[Opened] = []

    def open_page(path: Path, scheme: str = "light") -> Opened:
        pages.append(Opened(browser, path, scheme))
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()


def at(data: Any, path: str) -> Any:
    for key in path.split("."):
        data = data[int(key)] if isinstance(data, list) else data[key]
    return data


def assert_sound(page: Opened, path: Path) -> None:
    """Without an error, a request, or a number that is not the JSON's."""
    assert page.said == []
    assert page.page.evaluate("document.documentElement.dataset.charts") == "drawn"
    assert page.asked == [path.as_uri()]
    data, numbers = page.data, page.numbers
    assert {"total_bytes", "num_tensors"} <= numbers.keys()
    assert {name: value for name, value in numbers.items() if value != at(data, name)} == {}


def state(dim: int = 24) -> dict[str, Any]:
    layers = {f"layers.{i}.{part}": torch.ones(dim, dim) * i for i in range(4) for part in ("up", "down")}
    moments = {name: {"exp_avg": value} for name, value in layers.items()}
    return {"model": {**layers, "scale": torch.ones(())}, "optim": {"state": moments}, "tokens": 12}


def reports(uri: str) -> dict[str, Any]:
    """Times as ranks would tell them."""
    names = ("plan", "copy", "write", "checksum")
    phases = [Phase(name, rank, 100.0 + at, 0.5, 64) for rank in range(4) for at, name in enumerate(names)]
    saved = SaveReport(uri, 4096, 4, 4.0, 1, (), (*phases, Phase("commit", None, 104.0, 0.1)), 2)
    read = [Phase("read", rank, 200.0 + rank, 1.0, 1024) for rank in range(2)]
    loaded = [LoadReport(uri, 1024, 1.0, (), (), (), None, None, phases=(phase,)) for phase in read]
    return {"saves": [saved], "loads": [loaded], "losses": {"first": {0: 1.0, 1: 0.5}, "resumed": {2: float("nan")}}}


@pytest.mark.jobs
def test_a_page_says_what_its_json_says(tmp_path: Path, opened: Callable[..., Opened]) -> None:
    save(state(), tmp_path / "run", 3, layout="single")
    path = tmp_path / "report.html"
    told = reports(str(tmp_path))
    report = write_report(tmp_path / "run", path, layout="fsdp2x2", events=["restart: rank 1 died"], **told)
    page = opened(path)
    assert_sound(page, path)
    assert page.data == plain(report)
    assert page.numbers["operations.0.num_retries"] == 2
    assert page.numbers["operations.1.num_bytes"] == 2048
    assert sum(flow.num_bytes for flow in report.reshard.flows) == sum(s.num_bytes for s in report.sections)
    for flow in report.reshard.flows:
        wanted = f"bytes: {flow.num_bytes:,}; written_by: {flow.written_by}; read_by: {flow.read_by}"
        assert any(wanted in label for label in page.shown("flows")), page.shown("flows")
    bars = [label for label in page.shown("phases") if "phase: " in label]
    assert len([label for label in bars if "phase: write" in label and "end_s" in label]) == 4
    assert "restart: rank 1 died" in page.page.inner_text("body")
    assert page.page.locator("#losses .mark-line path").count() >= 1
    assert "layers" in page.page.inner_text("#modules")


@pytest.mark.jobs
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(scheme: str, tmp_path: Path, opened: Callable[..., Opened]) -> None:
    save(state(), tmp_path / "run", 3, layout="single")
    flip(tmp_path / "run" / "step-3")
    path = tmp_path / "report.html"
    write_report(tmp_path / "run", path, layout="hsdp2x2", events=["an event"], **reports(str(tmp_path)))
    page = opened(path, scheme)
    page.page.evaluate("document.querySelectorAll('details').forEach(found => { found.open = true; })")
    found = page.page.evaluate(CONTRAST)
    assert len(found) > 150
    assert [text for text in found if text["ratio"] < 4.5] == []
    background = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]


@pytest.mark.jobs
def test_names_cannot_leave_their_place(tmp_path: Path, opened: Callable[..., Opened]) -> None:
    save({name: torch.ones(30, 20) * number for number, name in enumerate(HOSTILE)}, tmp_path / "run")
    path = tmp_path / "<b>report &.html"
    report = write_report(tmp_path / "run", path, layout="fsdp2x2", events=HOSTILE)
    assert report.num_tensors == len(HOSTILE)
    page = opened(path)
    assert_sound(page, path)
    assert page.page.evaluate("window.hurt") is None
    assert page.page.evaluate("document.images.length") == 0
    assert page.data == plain(report)
    text = page.page.inner_text("body")
    assert "</script><script>window.hurt = 1</script>" in text
    assert "{{ 7 * 7 }}" in text


@pytest.mark.parametrize("target", ["single", "fsdp1x4", "fsdp2x3", "hsdp2x2", "pp2.fsdp2x2", "tp2", "ddp3", "pp2x2"])
def test_a_layout_reads_everything_once_per_replica(target: str, tmp_path: Path) -> None:
    save(state(), tmp_path / "run")
    report = write_report(tmp_path / "run", tmp_path / "report.html", layout=target, verify=False)
    layout = Layout.parse(target)
    total = sum(section.num_bytes for section in report.sections)
    assert sum(flow.num_bytes for flow in report.reshard.flows) == total * layout.dp_replicate
    assert {flow.read_by for flow in report.reshard.flows} == {f"rank {rank}" for rank in range(layout.world_size)}
    assert report.reshard.basis == "planned"


@pytest.mark.jobs
def test_checkpoints_of_others_have_pages(tmp_path: Path, opened: Callable[..., Opened]) -> None:
    tensors = {"model.weight": torch.arange(12.0).reshape(4, 3), "model.bias": torch.ones(4)}
    dcp.save(dict(tensors), checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    torch.save(tensors, tmp_path / "weights.pt")
    safetensors.torch.save_file(tensors, tmp_path / "weights.safetensors")
    written = {"dcp": "rank 0", "weights.pt": "weights.pt", "weights.safetensors": "weights.safetensors"}
    for name, writer in written.items():
        path = tmp_path / f"{name}.html"
        report = write_report(tmp_path / name, path, layout="fsdp2x2")
        assert [(found.name, found.num_files) for found in report.writers] == [(writer, 1)]
        assert {(flow.written_by, flow.num_bytes) for flow in report.reshard.flows} == {(writer, 32)}
        assert report.damaged == ""
        assert report.verification is not None
        assert not report.verification.verified
    page = opened(path)
    assert_sound(page, path)


@pytest.mark.jobs
@pytest.mark.parametrize("damage", [flip, cut, remove])
def test_a_damaged_checkpoint_has_a_page_that_says_so(
    damage: Callable[[Path], str], tmp_path: Path, opened: Callable[..., Opened]
) -> None:
    save(state(), tmp_path / "run")
    file = damage(tmp_path / "run")
    path = tmp_path / "report.html"
    code, text = call("report", tmp_path / "run", "-o", path)
    assert code == 1
    assert "damaged: " in text
    page = opened(path)
    assert_sound(page, path)
    assert file in page.page.inner_text("body")
    assert page.page.locator("#verification.bad").count() == 1
    if damage is not flip:
        assert write_report(tmp_path / "run", path, verify=False).damage.startswith(file)


@pytest.mark.jobs
def test_many_tensors_are_put_together_and_the_page_says_so(tmp_path: Path, opened: Callable[..., Opened]) -> None:
    one = torch.ones(1)
    names = [f"model.layers.{i}.experts.{j}.{part}" for i in range(10) for j in range(100) for part in ("up", "down")]
    flat = {f"other_{i}": one for i in range(1000)}
    save({**dict.fromkeys(names, one), **flat}, tmp_path / "run")
    path = tmp_path / "report.html"
    report = write_report(tmp_path / "run", path, layout="fsdp2x256", verify=False)
    assert len(report.modules.nodes) <= 802
    assert "3 000 tensors are drawn as" in report.modules.aggregated
    assert "256 ranks are put together, 4 in one" in report.reshard.aggregated
    assert report.modules.nodes[0].num_bytes == 4 * 3000
    assert sum(node.own_bytes for node in report.modules.nodes) == 4 * 3000
    page = opened(path)
    assert_sound(page, path)
    assert "are put together" in page.page.inner_text("body")


def test_the_command_prints_the_json_of_its_page(tmp_path: Path) -> None:
    save(state(), tmp_path / "run", 1)
    path = tmp_path / "report.html"
    data = data_of("report", tmp_path / "run", "-o", path, "--target", "fsdp2x2", "--step", 1)
    start = path.read_text().partition('id="report-data">')[2].partition("</script>")[0]
    embedded = json.loads(start)
    took = {"verification": {**data["verification"], "seconds": 0, "text": ""}}
    assert {**embedded, "verification": {**embedded["verification"], "seconds": 0, "text": ""}} == {**data, **took}


def test_wrong_use_is_told_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(state(), tmp_path / "run")
    with pytest.raises(UsageError, match="a directory that exists"):
        call("report", tmp_path / "run", "-o", tmp_path / "none" / "report.html")
    with pytest.raises(UsageError, match="token 'fsdp4'"):
        call("report", tmp_path / "run", "-o", tmp_path / "report.html", "--target", "fsdp4.tp2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "vl_convert" else object())
    with pytest.raises(UsageError, match=r"needs vl-convert-python, .*pip install 'ray-ckpt\[report\]'$"):
        call("report", tmp_path / "run", "-o", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_reports_say_what_took_how_long(tmp_path: Path) -> None:
    target = {"weight": torch.zeros(500, 500)}
    saved = save({"weight": torch.ones(500, 500)}, tmp_path / "run", 1, blocking=False).result(timeout_s=60)
    loaded = load(target, tmp_path / "run")
    own = [phase.name for phase in saved.phases if phase.rank == 0]
    assert own == ["plan", "copy", "write", "checksum"]
    assert [phase.name for phase in saved.phases if phase.rank is None] == ["plan", "check", "commit"]
    assert [phase.name for phase in loaded.phases] == ["open", "plan", "read", "set"]
    times = {phase.name: phase for phase in saved.phases}
    assert 0 < times["checksum"].seconds < times["write"].seconds < saved.seconds
    assert [times["write"].num_bytes, loaded.phases[2].num_bytes] == [10**6, 10**6]
    assert dict(loaded.bytes_by_file) == {next((tmp_path / "run" / "step-1").glob("*.distcp")).name: 10**6}
    page = write_report(tmp_path / "run", tmp_path / "report.html", saves=[saved], loads=[[loaded]])
    assert [found.name for found in page.operations] == ["save of step 1", "load of step 1"]
    assert {found.operation: found.start_s for found in reversed(page.phases) if found.start_s == 0}.keys() == {
        found.name for found in page.operations
    }
    assert page.reshard.basis == "measured"
    assert [(flow.written_by, flow.read_by, flow.num_bytes) for flow in page.reshard.flows] == [
        ("rank 0", "rank 0", 10**6)
    ]


def test_the_reshard_job_draws_what_it_has_done(tmp_path: Path) -> None:
    save(state(), tmp_path / "source", layout="single")
    page = tmp_path / "report.html"
    options = reshard_job.Options(str(tmp_path / "source"), "fsdp2x2", str(tmp_path / "target"), report=str(page))
    screen = Screen(Console(file=io.StringIO()))
    prepared = reshard_job.prepare(options, screen, contextlib.ExitStack())
    records = [write_rank(prepared.source, prepared.target, file) for file in prepared.files.values()]
    prepared.coordinator.check(records)
    report = reshard_job.commit(prepared, screen)
    reshard_job.draw(str(page), prepared, report, screen)
    data = json.loads(page.read_text().partition('id="report-data">')[2].partition("</script>")[0])
    assert data["reshard"]["target"] == "fsdp2x2"
    assert [(phase["rank"], phase["phase"]) for phase in data["phases"] if phase["phase"] == "write"] == [
        ("rank 0", "write"),
        ("rank 1", "write"),
    ]
    by_reader = {flow["read_by"]: flow["num_bytes"] for flow in data["reshard"]["flows"]}
    written = {phase["rank"]: phase["num_bytes"] for phase in data["phases"] if phase["phase"] == "write"}
    assert by_reader == written  # planned and measured
    assert "rewritten as fsdp2x2" in data["events"][0]


def test_the_reshard_job_names_the_ranks_that_write(tmp_path: Path) -> None:
    save(state(), tmp_path / "source", layout="single")
    screen = Screen(Console(file=io.StringIO()))
    options = reshard_job.Options(str(tmp_path / "source"), "pp2.ddp2", str(tmp_path / "target"))
    prepared = reshard_job.prepare(options, screen, contextlib.ExitStack())
    records = [write_rank(prepared.source, prepared.target, file) for file in prepared.files.values()]
    prepared.coordinator.check(records)
    report = reshard_job.commit(prepared, screen)
    assert [phase.rank for phase in report.phases if phase.name == "write"] == [0, 2]
    assert {phase.rank for phase in report.phases if phase.name == "commit"} == {None}


@pytest.mark.jobs
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("local_ray")
def test_the_jobs_draw_what_they_have_done(tmp_path: Path, opened: Callable[..., Opened]) -> None:
    """All three on Ray, one after the other: a run, one that goes on from it, and its checkpoint rewritten."""
    address = ray.get_runtime_context().gcs_address

    def page_of(job: str, *arguments: object) -> Any:
        path = tmp_path / f"{job}.html"
        options = ["--address", address, "--report", path, *arguments]
        command = [sys.executable, "-m", "ray_ckpt", job, *map(str, options)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        page = opened(path)
        assert_sound(page, path)
        return page.data

    demo = page_of("demo", "--workers", 2, "--steps", 3, "--storage", tmp_path / "demo")
    assert demo["reshard"]["basis"] == "measured"
    assert {found["operation"].split()[0] for found in demo["phases"]} == {"save", "load"}
    assert {"rank 0", "rank 1"} <= {found["rank"] for found in demo["phases"]}
    assert len({point["run"] for point in demo["losses"]}) > 1
    train = page_of("train", "--layouts", "fsdp2x2", "--steps", 4, "--save-every", 2, "--storage", tmp_path / "train")
    assert sorted(point["step"] for point in train["losses"]) == [0, 1, 2, 3]
    assert len([found for found in train["operations"] if found["name"].startswith("save")]) >= 2
    reshard = page_of("reshard", "--source", tmp_path / "train", "--to", "pp2", "--target", tmp_path / "target")
    assert (reshard["layout"], reshard["reshard"]["target"]) == ("fsdp2x2", "pp2")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("local_ray")
def test_a_run_of_ray_train_draws_its_last_checkpoint(tmp_path: Path, opened: Callable[..., Opened]) -> None:
    path = tmp_path / "page.html"
    words = ["--storage", tmp_path / "run", "--workers", 2, "--steps", 4, "--save-every", 2, "--report", path]
    done = subprocess.run(
        [sys.executable, "jobs/ray_train.py", *map(str, words)],
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = opened(path)
    assert_sound(page, path)
    assert (page.data["step"], page.data["damage"]) == (4, "")
    assert [found["name"] for found in page.data["writers"]] == ["rank 0", "rank 1"]


@pytest.mark.parametrize(
    "arguments",
    [["demo"], ["train"], ["reshard", "--source", "a", "--to", "fsdp2x2", "--target", "b"]],
    ids=lambda arguments: arguments[0],
)
def test_a_job_refuses_a_page_that_it_could_not_write_before_it_begins(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a directory that exists"):
        call(*arguments, "--report", tmp_path / "none" / "report.html")


def test_a_page_that_does_not_fit_on_the_disk_replaces_none(tmp_path: Path) -> None:
    """A limit on the size of files ends the write in the middle, as a full disk does."""
    save({"w": torch.ones(3)}, tmp_path / "run")
    page = tmp_path / "pages" / "page.html"
    page.parent.mkdir()
    page.write_text("the page before")
    done = subprocess.run(
        [sys.executable, "-m", "ray_ckpt", "report", tmp_path / "run", "-o", page], capture_output=True, text=True,
        check=False, timeout=120, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == f"error: cannot write the report to {page}: File too large\n"
    assert page.read_text() == "the page before"
    assert list(page.parent.iterdir()) == [page]
