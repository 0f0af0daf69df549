"""A `python` that has done its imports, which take seconds: a server forks a process for each command line.

`warm_python.py SOCKET --serve MODULE ...` is the server, until its standard input ends; it imports the modules before
it first forks. With other words, `SCRIPT ...`, `-m MODULE ...` or `-c CODE`, it runs that program in a fork of the
server, with the open files, folder, environment and ignored signals of the caller, passes signals on and ends as the
program does. The fork servers of `multiprocessing` are started the same way. What packages do when they are imported is
not the caller's: that needs `sys.executable`.

The garbage collector and the teardown of modules write into every object, which copies the memory of the server and
took longer than most programs: what the server has imported is kept from the former, and the latter is left out where
the exit code is known.
"""

import atexit
import fcntl
import gc
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
import warnings
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from threading import Thread

_PASSED_ON = {signal.SIGTERM, signal.SIGINT}


def run_in_server(path: str, words: list[str]) -> None:
    """Runs a program in a fork of the server, and ends this process as it ends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # a handler would wait for the end of a `readline`
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        files = [number for number in map(int, os.listdir("/proc/self/fd")) if _is_inherited(number)]
        socket.send_fds(server, [b"."], files)
        answers = server.makefile("rw")
        ignored = [number for number in _PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
        print(json.dumps([words, files, os.getcwd(), dict(os.environ), ignored]), file=answers, flush=True)
        pid = int(answers.readline())
        Thread(target=_pass_signals_on, args=[pid], daemon=True).start()
        code = os.waitstatus_to_exitcode(int(answers.readline()))
    if code < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        signal.raise_signal(-code)
    sys.exit(code)


def _pass_signals_on(pid: int) -> None:
    with suppress(ProcessLookupError):
        while True:
            os.kill(pid, signal.sigwait(_PASSED_ON))


def _is_inherited(number: int) -> bool:
    with suppress(OSError):  # that of the listing is closed by now
        return number < 3 or os.get_inheritable(number)
    return False


def serve(path: str, modules: list[str]) -> list[str]:
    """Forks; returns in the new processes only, with the words of their command lines."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        print("listening", flush=True)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            for name in modules:
                import_module(name)
            gc.freeze()
            client, _ = listener.accept()
            if os.fork() == 0:
                listener.close()  # before another file gets its number
                return _start(client)
            client.close()
            with suppress(ChildProcessError):  # none is left
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    sys.exit()


def _start(client: socket.socket) -> list[str]:
    """Forks once more; the first process tells the client how the second ends, and kills it if the client is gone."""
    _, received, *_ = socket.recv_fds(client, 1, 250)
    lines = client.makefile("rw")
    words, files, folder, environment, ignored = json.loads(lines.readline())
    if pid := os.fork():
        print(pid, file=lines, flush=True)
        with suppress(OSError):
            if client in select.select([client, os.pidfd_open(pid)], [], [])[0]:
                os.kill(pid, signal.SIGKILL)
            print(os.waitpid(pid, 0)[1], file=lines, flush=True)
        os._exit(0)
    lines.close()
    client.close()
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    # To numbers that none has, first: one may have the number that another is to have.
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, max(files) + 1) for number in received]
    for number in received:
        os.close(number)
    for number, file in zip(moved, files, strict=True):
        os.dup2(number, file)
        os.close(number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for option in filter(None, environment.get("PYTHONWARNINGS", "").split(",")):
        action, _, message = option.partition(":")
        warnings.filterwarnings(action, message)
    first = (
        [] if "PYTHONSAFEPATH" in environment else [folder if words[0].startswith("-") else str(Path(words[0]).parent)]
    )
    sys.path[:1] = [*first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if "PYTHON_EXEC" in environment:
        multiprocessing.set_executable(environment["PYTHON_EXEC"])
    return words


def _run(words: list[str]) -> None:
    while words[0].startswith("-") and words[0] not in ("-c", "-m"):  # flags, which the server cannot change
        del words[0]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _leave_out_teardown() -> None:
    if isinstance(code, int):
        for stream in (sys.stdout, sys.stderr):
            with suppress(ValueError):  # closed
                stream.flush()
        os._exit(code)
    gc.unfreeze()  # or libraries report what is left as leaks


if __name__ == "__main__":
    path, *words = sys.argv[1:]
    if words[0] != "--serve":
        run_in_server(path, words)
    code = None
    atexit.register(_leave_out_teardown)  # the first, which is called after all that modules and the program register
    try:
        _run(serve(path, words[1:]))
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
        raise
