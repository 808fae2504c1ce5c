"""The elastic job on the driver.

    run(options)
      until all steps are trained
        form          the first layout that fits what is free, or the first of all while that is waited for
        start         from the latest committed step, or from the beginning
        train         step by step; every few steps a save that goes on beside training
        a notice      that a node of the group is drained: save, and begin again without it
        a failure     of a worker or its node: the group is given up, and the loop begins again
      make durable  with a front: wait until the last step is in the durable storage

Every step is one call on the workers: the driver knows which step failed, and a signal finds the end of a step.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ray_ckpt import cluster
from ray_ckpt.cluster.capacity import all_slots, free_slots
from ray_ckpt.cluster.group import PlacementWait, WorkerGroup
from ray_ckpt.errors import CheckpointError, GroupError, UsageError
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.pictures.page import write_report
from ray_ckpt.recipes import probe
from ray_ckpt.recipes.screen import Line, Screen
from ray_ckpt.recipes.setting import check_layouts, check_storage, connected, describe_group, show_wait, storage_of
from ray_ckpt.recipes.train_elastic.notices import Notices
from ray_ckpt.recipes.train_elastic.progress import Progress
from ray_ckpt.recipes.train_elastic.report import ElasticReport, Resume
from ray_ckpt.recipes.train_elastic.saves import Saves
from ray_ckpt.recipes.train_elastic.stopping import Stopper
from ray_ckpt.recipes.workload import Workload
from ray_ckpt.report import LoadReport
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.retention import keep_last
from ray_ckpt.storage.room import shortage
from ray_ckpt.storage.store import CheckpointStore

RANKS = "ray_ckpt.recipes.train_elastic.ranks"
"""Module of the rank functions. By name, so that the driver loads neither torch nor what is built on it."""

OWN_MEMORY = "ram"
"""A front that is memory of this job's own, and ends with it."""

SETTLE_S = 5.0
"""How long after the end of a group all resources count as free, because Ray reports them with a delay."""


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    layouts: tuple[Layout, ...]
    """Preferred first."""
    steps: int = 40
    save_every: int = 5
    keep_last: int = 3
    wait_for_capacity_s: float = 0.0
    grow: bool = False
    max_failures: int = 3
    grace_s: float = 30.0
    dim: int = 500
    layers: int = 4
    model: str | None = None
    storage: str | None = None
    front: str | None = None
    durable_every: int = 1
    report: str | None = None
    """Where to draw the run as an HTML page."""
    address: str | None = None
    backend: str | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    start_timeout_s: float = 300.0
    timeout_s: float = 1800.0
    """Seconds for each step, and for each load."""
    verbose: bool = False

    @property
    def workload(self) -> Workload:
        return Workload.of(self.model, self.dim, self.layers, self.layouts)

    @property
    def bundle(self) -> dict[str, float]:
        """The resources that each worker asks for."""
        asked = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}
        return {name: amount for name, amount in asked.items() if amount}


@dataclass(frozen=True)
class Run:
    """What is the same for all worker groups of a run."""

    options: Options
    screen: Screen
    uri: str
    """URI of the storage. It may hold credentials and is never shown."""
    store: CheckpointStore
    """The store there, behind its front, for the whole run, as it keeps its connections."""
    stopper: Stopper
    progress: Progress


def check(options: Options, screen: Screen) -> None:
    """Find out what cannot work before Ray is started.

    Raises:
        UsageError: the workers ask for nothing, or as `check_layouts` and `CheckpointStore`.
    """
    CheckpointStore(options.storage or ".", _front(options), options.durable_every)  # it knows what it cannot have
    if not options.bundle:
        raise UsageError("a worker must ask for some CPU or GPU, or the cluster cannot place it")
    check_layouts(options.workload, options.layouts, screen)


def run(options: Options, screen: Screen) -> ElasticReport:
    """Train all steps, or until SIGTERM.

    Raises:
        UsageError: the options cannot work.
        GroupError: a failure repeated itself, or there were too many.
        SystemExit: SIGTERM came while there was nothing to save.
    """
    num_cpus = math.ceil(options.layouts[0].world_size * options.cpus_per_worker)
    stopper = Stopper(options.grace_s)
    with (
        connected(screen, options.address, num_cpus=num_cpus, verbose=options.verbose),
        storage_of(options.storage) as uri,
        stopper.listening(),
    ):
        front = _front(options)
        progress = Progress(screen.events)
        job = Run(options, screen, uri, CheckpointStore(uri, front, options.durable_every), stopper, progress)
        try:
            train_all(job)
        except GroupError:
            make_durable(job)
            raise
        make_durable(job)
        report = ElasticReport(
            final_step=job.store.latest(fallback=True) or 0,
            steps=options.steps,
            stopped=stopper.asked,
            restarts=job.progress.restarts,
            layouts_used=job.progress.layouts_used,
            losses=job.progress.losses,
            damaged=job.progress.damaged,
            storage=Storage(uri).address,
            front=None if front is None else Storage(front).address,
            resumes=job.progress.resumes,
            drains=job.progress.drains,
            failed_saves=job.progress.failed_saves,
            saved_without=job.progress.saved_without,
            not_durable=[*job.progress.not_durable],
            phases=dict(screen.seconds),
        )
        if options.report is not None and report.final_step:
            draw(options.report, job, report)
        return report


def _front(options: Options) -> str | None:
    return f"ram://train-{secrets.token_hex(6)}?replicas=1" if options.front == OWN_MEMORY else options.front


def make_durable(job: Run) -> None:
    """Wait until the last step is in the durable storage, as memory ends with the job.

    Raises:
        CheckpointError: it is not, in the time that a step may take, or that is left of the grace.
    """
    if job.options.front is None:
        return
    with job.screen.phase("durable", f"copying to {job.store.address}") as line, job.stopper.deferred():
        patience_s = 0.8 * job.stopper.left_s if job.stopper.asked else job.options.timeout_s
        try:
            step = job.store.make_durable(timeout_s=patience_s)
        except KeyboardInterrupt:
            if not job.stopper.out_of_time:
                raise
            raise CheckpointError(f"the grace is over, and the last step is not in {job.store.address}") from None
        if step is not None:
            job.progress.durable(step, job.store.address)
        job.store.prune(keep_last(job.options.keep_last))
        line.result = f"step {step} in {job.store.address}"


def draw(path: str, job: Run, report: ElasticReport) -> None:
    """Draw the last checkpoint and the run as one page."""
    progress = job.progress
    used = [layout for layout in job.options.layouts if str(layout) in report.layouts_used[-1:]]
    others = [layout for layout in job.options.layouts if layout not in used]
    was_loaded = bool(progress.loads) and progress.loads[-1][0].step == report.final_step
    readers = used if was_loaded else [*others, *used]
    with job.screen.phase("report", path) as line:
        page = write_report(
            job.store,
            path,
            report.final_step,
            layout=next(iter(readers), None),
            verify=not job.stopper.asked,  # else there is no time for it
            saves=list(progress.saves),
            loads=list(progress.loads),
            losses={"loss": dict(enumerate(progress.losses))},
            events=report.lines,
        )
        line.result = f"step {report.final_step} in {path}"
        if page.damaged:
            line.note(page.damaged)


def train_all(job: Run) -> None:
    """One group after the other, until all steps are trained or a signal has come."""
    progress, console = job.progress, job.screen.console
    while progress.step < job.options.steps and not job.stopper.asked:
        try:
            layout, group = form(job.options, job.screen)
            with group:
                progress.layouts_used.append(str(layout))
                start(job, group, layout)
                train(job, group, layout)
        except KeyboardInterrupt:
            if not job.stopper.out_of_time:
                raise
            console.print("the grace is over: what was trained since the last save is lost", markup=False)
            return
        except GroupError as error:
            progress.failed(error, job.options.max_failures)
            console.print(f"failed at step {progress.step}: {error}", markup=False, soft_wrap=True)


class _Reconsider(Exception):
    """Another layout is to be formed than the one that is being waited for."""


def form(options: Options, screen: Screen) -> tuple[Layout, WorkerGroup]:
    """A group in the best layout that there is room for. While that is not the first, and for as long as the options
    say, the first one's demand is left pending, so that an autoscaler acts on it.

    Raises:
        PlacementError: not even the smallest could be placed in time.
    """
    began = time.monotonic()

    def choose() -> Layout:
        if time.monotonic() - began < options.wait_for_capacity_s:
            return options.layouts[0]
        settled = time.monotonic() - began > SETTLE_S
        slots = free_slots(options.bundle) if settled else all_slots(options.bundle)
        fitting = [layout for layout in options.layouts if layout.world_size <= slots]
        return fitting[0] if fitting else min(options.layouts, key=lambda layout: layout.world_size)

    with screen.phase("group", "looking for room") as line:
        while True:
            wanted = choose()
            try:
                group = _form(options, wanted, line, choose)
            except _Reconsider:
                continue
            line.result = f"{describe_group(group, line)}, as {wanted}"
            return wanted, group


def _form(options: Options, layout: Layout, line: Line, choose: Callable[[], Layout]) -> WorkerGroup:
    def on_wait(wait: PlacementWait) -> None:
        if choose() != layout:
            raise _Reconsider
        show_wait(line, wait, options.start_timeout_s)

    group = WorkerGroup(
        layout.world_size,
        cpus_per_worker=options.cpus_per_worker,
        gpus_per_worker=options.gpus_per_worker,
        backend=options.backend,
        start_timeout_s=options.start_timeout_s,
        call_timeout_s=options.timeout_s,
        on_wait=on_wait,
    )
    group.run(probe.load_code, RANKS)
    return group


def start(job: Run, group: WorkerGroup, layout: Layout) -> None:
    """Begin, or go on from the latest committed step that is not damaged.

    Raises:
        FormatError: all committed steps are damaged.
    """
    progress = job.progress
    if not progress.layouts_used[1:]:
        check_storage(group, job.uri, overwrite=True)
    latest = job.store.latest(fallback=True)
    passed_over = {step: job.store.damage(step) for step in job.store.steps() if latest is not None and step > latest}
    progress.damaged |= passed_over
    for step, reason in passed_over.items():
        job.screen.console.print(f"step {step} is damaged: {reason}", highlight=False, markup=False, soft_wrap=True)
    with job.screen.phase("start", "from the beginning" if latest is None else f"from step {latest}") as line:
        group.run(f"{RANKS}:start", job.options.workload, layout, latest is None)
        reports: Sequence[LoadReport] = ()
        if latest is not None:
            reports = cluster.load(
                group,
                f"{RANKS}:state_of",
                job.store,
                step=latest,
                progress=line.progress,
                events=job.screen.events,
            )
            progress.loads.append(reports)
            progress.resumes.append(Resume.of(str(layout), reports, durable_alone=job.options.front is None))
        elif text := shortage(Storage(job.uri), group.run(f"{RANKS}:state_bytes", job.options.workload)[0]):
            line.note(text)
        progress.losses = group.run(f"{RANKS}:losses")[0]
        tier = f" in the {reports[0].tier} tier" if reports and reports[0].tier else ""
        line.result = f"{layout} from step {progress.step}{tier}"


def train(job: Run, group: WorkerGroup, layout: Layout) -> None:
    """Train until the last step, a signal, or room for a better layout. What was trained is committed on return."""
    options, progress, stopper = job.options, job.progress, job.stopper
    with job.screen.phase("train", f"from step {progress.step} as {layout}") as line, stopper.deferred():
        notices = Notices(group)
        with Saves(job.store, group, progress, line, f"{RANKS}:state_of", options.keep_last) as saves:
            while progress.step < options.steps and not stopper.asked:
                if notice := notices.new():
                    progress.drained(notice)
                    line.note(f"{notice.text}: saving step {progress.step} to go on without it")
                    break
                began = time.monotonic()
                loss = group.run(f"{RANKS}:train_step", options.workload, progress.step)[0]
                progress.trained(loss, time.monotonic() - began)
                line.update(f"step {progress.step} of {options.steps}, loss {progress.losses[-1]:.4f}")
                if progress.step % options.save_every == 0 or saves.has_failed:
                    saves.begin(options.timeout_s)
                    line.note(f"step {progress.step} of {options.steps}, loss {progress.losses[-1]:.4f}, saving")
                    if options.grow and _room_for_better(options, layout):
                        break
            saves.finish(lambda: stopper.left_s if stopper.asked else options.timeout_s)
        line.result = f"step {progress.step} of {options.steps} committed"


def _room_for_better(options: Options, layout: Layout) -> bool:
    """Whether a layout that is preferred would fit, once this group's own workers are gone."""
    free = free_slots(options.bundle) + layout.world_size
    better = options.layouts[: options.layouts.index(layout)]
    return any(other.world_size <= free for other in better)
