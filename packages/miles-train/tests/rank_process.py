"""Processes that play trainer ranks: they call functions of the modules beside this file, sent over a socket.

The imports cost seconds, so one process makes them, and every rank is forked from it.
"""

import gc
import importlib
import os
import pickle
import signal
import socket
import sys
import traceback


def main():
    """Fork a rank for every socket that comes over the one whose descriptor is the argument; answer with its pid."""
    os.dup2(2, 1)  # what upstreams print must not end in pytest's own output
    importlib.import_module("in_rank_trainer")
    gc.freeze()  # what is imported is shared by all ranks, and stays so
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for ranks
    with socket.socket(fileno=int(sys.argv[1])) as control:
        while True:
            _, sockets, _, _ = socket.recv_fds(control, 1, 1)
            if not sockets:
                return
            with socket.socket(fileno=sockets[0]) as connection:
                pid = os.fork()
                if not pid:
                    control.close()
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    serve(connection)
                    os._exit(0)
            control.send(pid.to_bytes(8, "little"))


def serve(connection):
    requests = connection.makefile("rb")
    while True:
        try:
            name, args = pickle.load(requests)
        except EOFError:
            return
        try:
            module, _, function = name.partition(".")
            answer = ("returned", getattr(importlib.import_module(module), function)(*args))
        except Exception:  # noqa: BLE001  # told to the test, which fails with it
            answer = ("raised", traceback.format_exc())
        connection.sendall(pickle.dumps(answer))


if __name__ == "__main__":
    main()
