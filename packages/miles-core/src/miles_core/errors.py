"""The errors of a run, and the exit code each of them ends the `miles` command with.

A user's mistake is an `InputError` (setting, value, rule, way out). What a caller may catch is one of the others.
Errors of the libraries below core (sync, precision, lora) have base classes of their own.
"""


class MilesError(Exception):
    """Root of the errors that core, rollout and train raise on purpose."""

    exit_code = 1


class InputError(MilesError, ValueError):
    """Something the user can fix: a recipe key, a data row, a model directory, a hook."""

    exit_code = 2

    def __init__(self, setting: str, value: object, rule: str, way_out: str):
        """Compose the one sentence that every bad input gets.

        Args:
            setting: the key, file or row that is wrong, as the user wrote it.
            value: what was found there.
            rule: what must hold.
            way_out: what to do about it.
        """
        super().__init__(f"{setting} = {value!r}: {rule}. {way_out}")
        self.setting, self.value, self.rule, self.way_out = setting, value, rule, way_out

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, str, str, str]]:
        """Survive the trip out of an actor; the value travels as its text."""
        return type(self), (self.setting, str(self.value), self.rule, self.way_out)


class RoleDied(MilesError):
    """A process of the run is gone: which one, and what is known of why."""

    exit_code = 3


class ClusterDied(RoleDied):
    """One of Ray's own processes is gone: nobody is left to ask anything of."""


class DeadlineExceeded(MilesError):
    """Somebody waited longer than allowed: who, for whom, since when."""

    exit_code = 3


class ContractViolation(MilesError):
    """A contract that holds by default does not: a logprob gap, a digest, a sum of samples."""

    exit_code = 4


class RolloutError(MilesError):
    """No sample could be made: every group of a step failed."""

    exit_code = 6


class Interrupted(MilesError):
    """The run was asked to stop (SIGINT, SIGTERM), saved its state, and can be resumed."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again
