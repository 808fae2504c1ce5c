"""What a person sees: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ray_ckpt.recipes import screen as screen_module
from ray_ckpt.recipes.screen import Screen
from ray_ckpt.text_units import format_bytes


def show(terminal: bool) -> tuple[str, Screen]:
    file = io.StringIO()
    screen = Screen(Console(file=file, force_terminal=terminal, width=80))
    with screen.phase("group", "starting 4 workers") as line:
        line.update("waiting for 4 x {CPU: 1}; up: 1 node with {CPU: 0, GPU: 0}; 1 of 300 s")
        line.update("waiting for 4 x {CPU: 1}; up: 3 nodes with {CPU: 2, GPU: 0}; 2 of 300 s")
        line.note("[4 workers] share a GPU")
        line.result = "4 workers on 3 nodes, gloo"
    return file.getvalue(), screen


def test_a_log_gets_plain_lines_and_a_wait_is_not_repeated_every_second() -> None:
    text, screen = show(terminal=False)
    lines = text.splitlines()
    assert lines[:3] == [
        "group: starting 4 workers",
        "group: waiting for 4 x {CPU: 1}; up: 1 node with {CPU: 0, GPU: 0}; 1 of 300 s",
        "group: [4 workers] share a GPU",
    ]
    assert lines[3].startswith("group: 4 workers on 3 nodes, gloo (0.")
    assert len(lines) == 4
    assert "\x1b" not in text
    assert list(screen.seconds) == ["group"]


def test_a_wait_in_a_log_is_repeated_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen_module, "LOG_INTERVAL_S", 0.0)
    text, _ = show(terminal=False)
    assert text.count("waiting for") == 2


def test_a_terminal_gets_a_live_line_that_goes_away() -> None:
    text, _ = show(terminal=True)
    assert "\x1b" in text
    last = text.splitlines()[-1]
    assert "group: 4 workers on 3 nodes, gloo (0." in last


def test_a_phase_that_fails_is_not_said_to_be_done() -> None:
    file = io.StringIO()
    screen = Screen(Console(file=file))

    def fail() -> None:
        with screen.phase("save", "each stage"):
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()
    assert file.getvalue() == "save: each stage\n"
    assert screen.seconds == {}


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (12105636, "11.5 MiB"), (3 << 30, "3 GiB")]
)
def test_bytes_have_binary_units(count: int, text: str) -> None:
    assert format_bytes(count) == text
