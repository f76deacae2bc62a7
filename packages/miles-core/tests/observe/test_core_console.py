import io
import re

import pytest
import rich.console

from miles_core.observe import Console

METRICS = {
    "rollout/reward": 0.41234,
    "rollout/response_len": 5.25,
    "train/logprob_gap": 2.14e-6,
    "perf/tokens_per_s": 1234.5,
    "perf/time/generate": 0.5,
    "perf/time/train/logprobs": 0.25,
    "perf/time/train": 1.25,
    "perf/time/rest": 0.25,
    "perf/time/step": 2.0,
}


def drawn(is_terminal: bool, width: int = 120) -> tuple[rich.console.Console, io.StringIO]:
    text = io.StringIO()
    return rich.console.Console(
        file=text, force_terminal=is_terminal, width=width, color_system=None, _environ={"TERM": "xterm"}
    ), text


def last_picture(text: str) -> str:
    """What is on the screen in the end: all after the last time the lines above were erased."""
    last = re.split(r"(?:\x1b\[1A\x1b\[2K)+", text)[-1]
    return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", last)


def test_without_a_terminal_each_step_is_one_plain_line():
    console, text = drawn(is_terminal=False, width=20)
    with Console(total_steps=10, console=console) as shown:
        shown.status("starting engines")
        shown.write(0, METRICS)
        shown.write(1, METRICS | {"perf/time/step": 4.0})
    assert text.getvalue().splitlines() == [
        "step 0 of 10  reward 0.412  length 5.2  logprob gap 2.1e-06  tokens/s 1,234  seconds 2.00"
        "  (generate 0.50, train 1.25, rest 0.25)  0:00:18 left",
        "step 1 of 10  reward 0.412  length 5.2  logprob gap 2.1e-06  tokens/s 1,234  seconds 4.00"
        "  (generate 0.50, train 1.25, rest 0.25)  0:00:24 left",
    ]


def test_what_was_not_measured_is_not_shown():
    console, text = drawn(is_terminal=False)
    Console(total_steps=3, console=console).write(2, {"rollout/reward": float("nan")})
    assert text.getvalue() == "step 2 of 3  reward nan\n"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_banners_and_notes_are_shown_as_written(is_terminal: bool):
    console, text = drawn(is_terminal, width=40)
    with Console(total_steps=3, console=console) as shown:
        shown.banner("rewards are shuffled [bold]: this run must not learn, nor may this line break")
        shown.note("runs/[a]")
    assert "!!! rewards are shuffled [bold]: this run must not learn, nor may this line break\n" in text.getvalue()
    assert "runs/[a]\n" in text.getvalue()


def test_a_terminal_shows_the_last_steps_progress_and_status():
    console, text = drawn(is_terminal=True)
    with Console(total_steps=40, start_step=3, console=console) as shown:
        for step in range(3, 20):
            shown.write(step, METRICS | {"rollout/reward": step / 100})
        shown.status("train [1/2]")
    picture = last_picture(text.getvalue())
    rewards = [f"{step / 100:.3f}" for step in range(3, 20)]
    assert [reward for reward in rewards if reward in picture] == rewards[-12:]
    assert "20/40" in picture and "0:00:40 left" in picture and "train [1/2]" in picture
    assert "generate 0.50, train 1.25, rest 0.25" in picture and "logprobs" not in picture


def test_leaving_gives_the_cursor_back_when_the_body_raises():
    console, text = drawn(is_terminal=True)
    with pytest.raises(KeyError), Console(total_steps=3, console=console):
        raise KeyError
    assert text.getvalue().endswith("\x1b[?25h")


def test_a_narrow_terminal_keeps_the_numbers():
    console, text = drawn(is_terminal=True, width=80)
    with Console(total_steps=3, console=console) as shown:
        shown.write(0, METRICS)
    picture = last_picture(text.getvalue())
    assert all(number in picture for number in ("0.412", "5.2", "2.1e-06", "1,234", "2.00"))
    assert max(map(len, picture.splitlines())) <= 80
