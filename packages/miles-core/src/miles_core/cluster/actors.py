"""Plain classes as placed, supervised Ray actors.

A class is named by `"package.module:Class"` and built inside its actor, so that the driver never imports an engine.
Every actor has a call that returns only when what it hosts has died: awaiting them all is how a death is noticed at
once, and every wait in the driver ends with the first of its answer, a death, or its deadline.
"""

import asyncio
import contextlib
import inspect
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from miles_core.cluster._ray import PlacementGroupSchedulingStrategy, placement_group, ray, remove_placement_group
from miles_core.cluster.plan import Plan, Slot
from miles_core.errors import ClusterDied, DeadlineExceeded, MilesError, RoleDied
from miles_core.hooks import load_object

RAY_WATCH_S = 1.0  # between looks at Ray's own processes
DEATH_NEWS_S = 2.0  # hosted objects look at what they watch twice a second
CLOSE_DEADLINE_S = 20.0  # an engine ends its process tree within 10 s; after this the actor is killed


class Host:
    """What runs in every actor: builds the hosted object and passes calls on to it."""

    def __init__(self, role: str, index: int, env: Mapping[str, str], log_path: str):
        """Set up the process before anything heavy is imported.

        Args:
            role: name of the role.
            index: which of its processes.
            env: environment variables for this process alone.
            log_path: file that takes everything this process and its children print.
        """
        os.environ.update(env)
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        self.name = f"{role}[{index}]"
        self._hosted: Any = None

    async def build(self, factory: str, kwargs: Mapping[str, Any]) -> int:
        """Build the hosted object; returns this process's id."""
        self._hosted = load_object(factory, self.name)(**kwargs)
        if inspect.iscoroutinefunction(getattr(self._hosted, "start", None)):
            await self._hosted.start()
        return os.getpid()

    async def call(self, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call a method of the hosted object, plain or async."""
        result = getattr(self._hosted, method)(*args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    async def close(self) -> None:
        """Close the hosted object, if it can be closed."""
        close = getattr(self._hosted, "close", None)
        result = close() if close is not None else None
        if inspect.isawaitable(result):
            await result

    @ray.method(concurrency_group="watch")
    async def died(self) -> str:
        """Return why the hosted object is dead, once it is (`watch()` of the object, if it has one); else never."""
        while self._hosted is None:  # set by the other event loop
            await asyncio.sleep(0.05)
        watch: Callable[[], str] | None = getattr(self._hosted, "watch", None)
        while watch is None:
            await asyncio.sleep(3600)
        return await asyncio.to_thread(watch)


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One actor, as the driver and other actors hold it."""

    role: str
    index: int
    handle: Any

    @property
    def name(self) -> str:
        """E.g. trainer[0]."""
        return f"{self.role}[{self.index}]"

    async def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call without supervision: for one actor that uses another."""
        return await self.handle.call.remote(method, args, kwargs)


class Crew:
    """All actors of a run: started by plan, watched together, stopped together."""

    def __init__(self, plan: Plan, log_dir: Path):
        """Reserve the plan's slots as one placement group.

        Raises:
            InputError: the cluster cannot give what the plan needs.
        """
        self._plan = plan
        self._log_dir = log_dir
        self._members: list[Member] = []
        self._ready: list[Member] = []
        self._watches: list[asyncio.Task[None]] = []
        self._death: asyncio.Future[RoleDied] = asyncio.get_running_loop().create_future()
        self._watches.append(asyncio.create_task(self._watch_ray()))
        self._group = placement_group(plan.bundles, strategy="PACK")

    async def hire(
        self, role: str, index: int, factory: str, env: Mapping[str, str], deadline_s: float, **kwargs: Any
    ) -> Member:
        """Start the actor of one slot and build what it hosts.

        Args:
            role: name of the role in the plan.
            index: which of its processes.
            factory: `"package.module:Class"`; called with `kwargs` inside the actor. An async `start()` is awaited.
            env: environment variables of that process.
            deadline_s: seconds until it must be ready.
            **kwargs: arguments of the factory; must survive a process boundary.

        Raises:
            MilesError: what the factory raised, or RoleDied, or DeadlineExceeded.
        """
        slot = self._plan.of(role)[index]
        handle = self._spawn(slot, env)
        member = Member(role, index, handle)
        self._members.append(member)
        self._watches.append(asyncio.create_task(self._watch(member)))
        await self._wait(member, "start", handle.build.remote(factory, kwargs), deadline_s)
        self._ready.append(member)
        return member

    async def call(self, member: Member, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """Call a method of a member's object and wait for the answer, a death in the crew, or the deadline.

        Raises:
            MilesError: as raised by the method.
            RoleDied: any member of the crew died meanwhile.
            DeadlineExceeded: names the member, the method and the time.
        """
        return await self._wait(member, method, member.handle.call.remote(method, args, kwargs), deadline_s)

    async def call_all(
        self, members: Sequence[Member], method: str, argument_lists: Sequence[tuple[Any, ...]], deadline_s: float
    ) -> list[Any]:
        """Call the method of all members at once, each with its own arguments."""
        calls = [
            self.call(member, method, *arguments, deadline_s=deadline_s)
            for member, arguments in zip(members, argument_lists, strict=True)
        ]
        return list(await asyncio.gather(*calls))

    async def dismiss(self) -> None:
        """Let every member close what it hosts, then end all of them. Never raises for a member that is dead."""
        for watch in self._watches:
            watch.cancel()
        if self._death.done() and isinstance(self._death.result(), ClusterDied):
            return  # every call to Ray would wait a minute for its answer
        # One that is still starting could not answer: what it has started so far dies with it.
        closing = [member.handle.close.remote() for member in self._ready]
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(*closing, return_exceptions=True), CLOSE_DEADLINE_S)
        for member in self._members:
            ray.kill(member.handle)
        with contextlib.suppress(Exception):  # the cluster itself may be gone; nothing is left to free then
            remove_placement_group(self._group)

    def _spawn(self, slot: Slot, env: Mapping[str, str]) -> Any:
        where = PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=self._plan.slots.index(slot)
        )
        actor = ray.remote(concurrency_groups={"watch": 1})(Host).options(
            num_cpus=slot.num_cpus,
            num_gpus=slot.num_gpus,
            scheduling_strategy=where,
            max_restarts=0,
            max_task_retries=0,
        )
        self._log_dir.mkdir(parents=True, exist_ok=True)
        log_path = self._log_dir.resolve() / f"{slot.role}-{slot.index}.log"
        return actor.remote(slot.role, slot.index, dict(env), str(log_path))

    async def _watch(self, member: Member) -> None:
        try:
            reason = await member.handle.died.remote()
        except asyncio.CancelledError:
            raise
        except ray.exceptions.RayActorError as error:
            reason = _reason(error)
        if not self._death.done():
            log = self._log_dir / f"{member.role}-{member.index}.log"
            self._death.set_result(RoleDied(f"{member.name} died: {reason} (its log: {log})"))

    async def _watch_ray(self) -> None:
        """Notice the death of Ray's own processes, where they are this process's children; Ray takes a minute to."""
        names = {"gcs_server", "raylet"}
        mine = [child for child in psutil.Process().children() if child.name() in names]
        labels = {child: child.name() for child in mine}
        while True:
            for child in mine:
                if not child.is_running() or child.status() == psutil.STATUS_ZOMBIE:
                    if not self._death.done():
                        self._death.set_result(ClusterDied(f"Ray's {labels[child]} died"))
                    return
            await asyncio.sleep(RAY_WATCH_S)

    async def _wait(self, member: Member, what: str, reference: Any, deadline_s: float) -> Any:
        since = time.time()
        answer = asyncio.ensure_future(_resolve(reference))
        await asyncio.wait({answer, self._death}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done() and not self._death.done():
            answer.cancel()
            clock = time.strftime("%H:%M:%S", time.localtime(since))
            raise DeadlineExceeded(
                f"the driver waited for {member.name}.{what} since {clock}, longer than the {deadline_s:g} s allowed"
            )
        if answer.done() and answer.exception() is not None:
            # An error is often the first sign of somebody else's death: let that be named instead.
            await asyncio.wait({self._death}, timeout=DEATH_NEWS_S)
        if answer.done() and not self._death.done():
            return _result(answer, member, what)
        if not answer.done():
            answer.cancel()
        raise await self._death


async def _resolve(reference: Any) -> Any:
    return await reference


def _result(answer: "asyncio.Future[Any]", member: Member, what: str) -> Any:
    """The answer, or the error that the method raised: ours as it was, others with the actor's name and traceback."""
    error: Any = answer.exception()
    if error is None:
        return answer.result()
    if isinstance(error, ray.exceptions.RayTaskError):
        cause: Any = error.cause
        if isinstance(cause, MilesError):
            raise cause
        raise MilesError(f"{member.name}.{what} failed: {error}") from error
    if isinstance(error, ray.exceptions.RayActorError):
        raise RoleDied(f"{member.name} died: {_reason(error)}") from error
    raise error


def _reason(error: BaseException) -> str:
    """What Ray knows of a death, without its paragraph of guesses."""
    text = " ".join(str(error).split())
    detail = text.partition("Worker exit detail: ")[2].partition(" Some common causes")[0]
    if "connection error code 2" in detail:
        return "its process was killed or crashed"
    return detail or text.partition(" Some common causes")[0]
