"""A `python` that has done its imports, which take seconds: a server forks a process for each command line.

`warm_python.py SOCKET` is the server, until its standard input ends. With more words, `SCRIPT ...` or `-m MODULE ...`,
it runs that program in a fork of the server, with the streams, folder and environment of the caller, passes signals on
and ends as the program does. What packages do when they are imported is not the caller's: that needs `sys.executable`.
"""

import json
import os
import runpy
import select
import signal
import socket
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

IMPORTS = ("hf_rskip.studies.cell", "hf_rskip.cli.launch", "transformers.integrations", "torch.distributed.checkpoint")


def run_in_server(path: str, words: list[str]) -> None:
    """Runs a program in a fork of the server, and ends this process as it ends."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [b"."], [0, 1, 2])
        answers = server.makefile("rw")
        print(json.dumps([words, os.getcwd(), dict(os.environ)]), file=answers, flush=True)
        pid = int(answers.readline())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        code = os.waitstatus_to_exitcode(int(answers.readline()))
    if code < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def serve(path: str) -> list[str]:
    """Forks; returns in the new processes only, with the words of their command lines."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        print("listening", flush=True)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            for name in IMPORTS:
                import_module(name)
            client, _ = listener.accept()
            if os.fork() == 0:
                return _start(client)
            client.close()
            with suppress(ChildProcessError):  # none is left
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    sys.exit()


def _start(client: socket.socket) -> list[str]:
    """Forks once more; the first process tells the client how the second ends, and kills it if the client is gone."""
    _, streams, *_ = socket.recv_fds(client, 1, 3)
    lines = client.makefile("rw")
    words, folder, environment = json.loads(lines.readline())
    if pid := os.fork():
        print(pid, file=lines, flush=True)
        with suppress(OSError):
            if client in select.select([client, os.pidfd_open(pid)], [], [])[0]:
                os.kill(pid, signal.SIGKILL)
            print(os.waitpid(pid, 0)[1], file=lines, flush=True)
        os._exit(0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    lines.close()
    client.close()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:1] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    return words


if __name__ == "__main__":
    path, *words = sys.argv[1:]
    if words:
        run_in_server(path, words)
    words = serve(path)
    if words[0] == "-u":
        del words[0]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")
