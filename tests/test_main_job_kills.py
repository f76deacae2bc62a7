"""kill -9 of each kind of process: the run ends in time with a named reason, leaves nobody behind, and resumes."""

import signal
import time
from pathlib import Path

import pytest
from main_job import EXIT_DEADLINE_S, job

pytestmark = [pytest.mark.xdist_group("main_job"), pytest.mark.timeout(900)]

SETTINGS = ("train.steps=1000", "train.save_every=2")
# The log that names a role's process, or the name of the program; and what the error must say.
KINDS = {
    "trainer": "trainer[0] died",
    "sglang::scheduler": "sglang::scheduler",
    "worker": "worker[0] died",
    "queue": "queue[0] died",
}
OTHERS = {
    "engine": "engine[0] died",
    "sglang::detokenizer": "sglang::detokenizer",
    "miles_rollout.sglang._entry": "engine[0] died",
    "raylet": "Ray",
    "gcs_server": "Ray",
}


def kill_each_in_turn(folder: Path, kinds: dict[str, str]) -> None:
    """One run that is killed, resumed, killed elsewhere, and so on; every resume goes on from a checkpoint."""
    done = 0
    for kind, reason in kinds.items():
        with job(folder, *(["--resume"] if done else []), settings=SETTINGS) as run:
            run.wait_until(lambda run=run, done=done: len(run.metrics()) >= done + 4)
            run.find(kind).send_signal(signal.SIGKILL)
            killed = time.monotonic()
            code = run.wait(EXIT_DEADLINE_S)
            assert code == 3, f"{kind}: exit code {code}\n{run.text()}"
            assert reason in run.text(), f"{kind}: not named in\n{run.text()}"
            assert "--resume" in run.text()
            assert time.monotonic() - killed < EXIT_DEADLINE_S
        steps = [record["step"] for record in run.metrics()]
        assert steps == list(range(len(steps))), "steps are missing or repeated"
        assert len(steps) >= done + 4
        done = len(steps) // 2 * 2 - 2  # the checkpoint that the next one certainly has


def test_every_role_is_named_when_it_dies_and_the_run_resumes(tmp_path: Path):
    kill_each_in_turn(tmp_path, KINDS)


@pytest.mark.long
def test_every_other_process_too(tmp_path: Path):
    kill_each_in_turn(tmp_path, OTHERS)
