"""Real Ray actors: calls, errors, deadlines and deaths, on one small cluster."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psutil
import pytest

from miles_core import DeadlineExceeded, InputError, MilesError, RoleDied
from miles_core.cluster import Cluster, Role, place
from miles_core.cluster.actors import Crew, Member
from miles_core.cluster.runtime import ray_cluster
from miles_core.cluster.warden import MARK, marked, warden
from miles_core.ports import port_is_free

pytestmark = pytest.mark.xdist_group("cluster")

# What the actors host; a module of its own, since they import it by name.
HOSTED = '''
import os, time
from miles_core import InputError

class Counter:
    def __init__(self, start=0):
        if start < 0:
            raise InputError("start", start, "must be at least 0", "Raise it.")
        self.value = start
    def add(self, amount): self.value += amount; return self.value
    async def slowly(self, seconds):
        import asyncio
        await asyncio.sleep(seconds)
        return "done"
    def environment(self, name): return os.environ.get(name)
    def say(self, text): print(text, flush=True)
    def refuse(self): raise InputError("x", 1, "is wrong", "Mend it.")
    def fail(self): raise KeyError("no such thing")
    def pid(self): return os.getpid()

class Watched(Counter):
    """Dies inside: its process lives on, what it stands for does not."""
    def watch(self):
        time.sleep(0.3)
        return "the engine in it is gone"
'''


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("hosted")
    (folder / "hosted.py").write_text(HOSTED)
    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(folder)
    with warden(), ray_cluster(num_cpus=4, dashboard_port=0) as nodes:
        yield nodes
    os.environ.pop("PYTHONPATH") if old is None else os.environ.update(PYTHONPATH=old)


Story = Callable[[Crew, Member], Awaitable[None]]


@pytest.fixture
def with_counter(cluster: Cluster, tmp_path: Path) -> Callable[[Story], None]:
    """Run a story with one actor that counts."""

    async def run(story: Story) -> None:
        crew = Crew(place(cluster, [Role("counter", 1), Role("other", 1)]), tmp_path / "logs")
        try:
            await story(crew, await crew.hire("counter", 0, "hosted:Counter", {"COLOUR": "blue"}, 60, start=3))
        finally:
            await crew.dismiss()

    return lambda story: asyncio.run(run(story))


def test_calls_environment_and_log(with_counter: Callable[[Story], None], tmp_path: Path):
    async def story(crew: Crew, counter: Member) -> None:
        assert await crew.call(counter, "add", 4, deadline_s=30) == 7
        assert await crew.call(counter, "slowly", 0.01, deadline_s=30) == "done"
        assert await crew.call(counter, "environment", "COLOUR", deadline_s=30) == "blue"
        await crew.call(counter, "say", "hello from inside", deadline_s=30)
        assert "hello from inside" in (tmp_path / "logs" / "counter-0.log").read_text()
        assert await crew.call_all([counter, counter], "add", [(1,), (2,)], 30) in ([8, 10], [10, 9])

    with_counter(story)


def test_our_errors_come_out_as_they_were_and_others_with_their_traceback(with_counter: Callable[[Story], None]):
    async def story(crew: Crew, counter: Member) -> None:
        with pytest.raises(InputError, match=r"x = '1': is wrong\. Mend it\."):
            await crew.call(counter, "refuse", deadline_s=30)
        with pytest.raises(MilesError, match=r"counter\[0\].fail failed: (?s:.*)KeyError.*no such thing"):
            await crew.call(counter, "fail", deadline_s=30)
        with pytest.raises(InputError, match="must be at least 0"):
            await crew.hire("other", 0, "hosted:Counter", {}, 60, start=-1)

    with_counter(story)


def test_a_wait_ends_at_its_deadline_and_names_what_it_waited_for(with_counter: Callable[[Story], None]):
    async def story(crew: Crew, counter: Member) -> None:
        with pytest.raises(DeadlineExceeded, match=r"waited for counter\[0\].slowly since \d\d:\d\d:\d\d.* 0.2 s"):
            await crew.call(counter, "slowly", 60, deadline_s=0.2)

    with_counter(story)


def test_a_killed_actor_is_named_to_whoever_waits_for_another(with_counter: Callable[[Story], None]):
    async def story(crew: Crew, counter: Member) -> None:
        other = await crew.hire("other", 0, "hosted:Counter", {}, 60)
        pid = await crew.call(other, "pid", deadline_s=30)
        waiting = asyncio.create_task(crew.call(counter, "slowly", 60, deadline_s=60))
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RoleDied, match=r"other\[0\] died: .*killed.*other-0.log"):
            await asyncio.wait_for(waiting, 5)

    with_counter(story)


def test_an_actor_that_says_it_is_dead_is_believed(with_counter: Callable[[Story], None]):
    async def story(crew: Crew, counter: Member) -> None:
        await crew.hire("other", 0, "hosted:Watched", {}, 60)
        with pytest.raises(RoleDied, match=r"other\[0\] died: the engine in it is gone"):
            await crew.call(counter, "slowly", 60, deadline_s=10)

    with_counter(story)


def test_only_loopback_is_listened_on(cluster: Cluster):
    """Also by Ray's own processes, whose exporters ask for no token."""
    ours = {os.getpid(), *marked(os.environ[MARK])}
    addresses = {
        connection.laddr.ip.removeprefix("::ffff:")
        for connection in psutil.net_connections("tcp")
        if connection.pid in ours and connection.status == psutil.CONN_LISTEN
    }
    assert addresses
    assert addresses <= {"127.0.0.1", "::1"}


def test_a_port_that_is_taken_is_an_error_before_ray_starts():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not port_is_free(port)
        with pytest.raises(InputError, match=f"cluster.dashboard_port = {port}"), ray_cluster(dashboard_port=port):
            pass


def test_the_warden_ends_what_a_killed_driver_leaves(tmp_path: Path):
    """The driver starts a process that ignores polite signals in a session of its own, and is killed."""
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    driver = (
        "import subprocess, sys, time\n"
        "from miles_core.cluster.warden import warden\n"
        "with warden() as mark:\n"
        f"    subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        "    print(mark, flush=True)\n"
        "    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    mark = process.stdout.readline().strip()
    deadline = time.monotonic() + 10
    while not marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marked(mark)
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 15
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not marked(mark)
