"""What the tests of the shim, the fixes and the argument record do inside a rank's process."""

import contextlib
import functools
import multiprocessing
import time

import torch
from in_rank_trainer import make_trainer
from train_tiny import VOCAB, batch_of

from miles_train import conformance
from miles_train.conformance import Subject
from miles_train.megatron import cpu_shim, resume_fixes, runtime
from miles_train.megatron.arguments import describe_parser


def parser_record(_):
    return describe_parser()


def refuse_another_version(_):
    tested = cpu_shim.TESTED_VERSION
    cpu_shim.TESTED_VERSION = "0.18.0"
    try:
        cpu_shim.install()
    except RuntimeError as error:
        return str(error)
    finally:
        cpu_shim.TESTED_VERSION = tested


def look_through_the_shim(_):
    cpu_shim.install()
    outside = torch.zeros(1).type()
    with cpu_shim.active():
        inside = [
            torch.zeros(1, device="cuda").device.type,
            torch.zeros(1).cuda().device.type,
            torch.zeros(1).to("cuda").device.type,
            torch.zeros(1, device=torch.device("cuda", 0)).device.type,
            torch.zeros(1).type(),
        ]
        with cpu_shim.paused():
            paused = torch.zeros(1).type()
    return outside, inside, paused


def every_rebinding_is_needed(_):
    """The attributes that the list names, and whether the process has the shim's values there."""
    cpu_shim.install()
    return {
        f"{entry.owner.__name__}.{entry.name}": (getattr(entry.owner, entry.name) is entry.value, bool(entry.why))
        for entry in cpu_shim.rebindings()
    }


def resume_without(address, path, folder, fix):
    """Check resuming with one fix replaced by nothing; the error's text, or None if it resumes."""
    original = getattr(resume_fixes, fix)
    replaced = {
        "tolerate_missing_step": lambda optimizer: contextlib.nullcontext(),
        "allocate_state": lambda optimizer: None,
        "separate_steps": lambda optimizer: None,
        "restore_zero_step": lambda state: None,
    }[fix]
    setattr(resume_fixes, fix, replaced)
    subject = Subject(functools.partial(make_trainer, address, path, deterministic=True), path, VOCAB)
    try:
        conformance.resumes(subject, folder / "resume")
        conformance.resumes_from_the_start(subject, folder / "start")
    except Exception as error:  # noqa: BLE001  # whatever it is, the test wants to see it
        leave_together(address, folder)
        return f"{type(error).__name__}: {error}"
    finally:
        setattr(resume_fixes, fix, original)
        runtime.stop()


def leave_together(address, folder):
    """Wait until every rank is here: one that left would keep the others waiting in their collective."""
    rank, world_size = address[:2]
    (folder / f"here-{rank}").touch()
    while len(list(folder.glob("here-*"))) < world_size:
        time.sleep(0.01)


def children_of_a_save(address, path, folder):
    """How many child processes a save leaves behind."""
    trainer = make_trainer(address, path)
    trainer.step([batch_of()])
    trainer.save(folder / "a", {})
    trainer.close()
    return len(multiprocessing.active_children())
