import io
import re
import signal

import pytest
from rich.console import Console

from train.interrupt import StopRequest
from train.terminal import Terminal


def test_a_terminal_shows_a_bar_with_loss_rate_and_time_left():
    output = io.StringIO()
    terminal = Terminal(100, Console(file=output, force_terminal=True, width=120, color_system=None))
    with terminal.progress(first_step=20):
        terminal.update(60, loss=1.2345, tokens_per_second=9876.5)
        terminal.say("step 60: validation text at 2.000 bits per byte")
    shown = output.getvalue()
    assert re.search(r"60/100.*loss 1\.234  9,876 tokens/s.*\d:\d\d:\d\d left", shown)
    assert "step 60: validation text at 2.000 bits per byte" in shown


def test_markup_in_text_is_shown_as_it_is():
    output = io.StringIO()
    Terminal(1, Console(file=output)).say("data: [bold]/x[/bold]")
    assert output.getvalue() == "data: [bold]/x[/bold]\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_has_its_usual_effect(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.after(1) is None
        signal.raise_signal(number)
        assert stop.after(2) == number
        assert signal.getsignal(number) is before
    assert signal.getsignal(number) is before
