"""The process in which other tests run commands ends as a `python` would, and takes what it runs with it."""

import os
import signal
import subprocess
import sys

import pytest


@pytest.fixture
def start(warm_python, tmp_path):
    if warm_python == sys.executable:
        pytest.skip("needs pidfd_open")

    def start(program: str) -> subprocess.Popen:
        (tmp_path / "program.py").write_text(f"import os, sys, time\n{program}\n")
        command = [warm_python, str(tmp_path / "program.py"), "a word"]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"WORD": "set"}, **streams)

    return start


def test_streams_words_folder_and_environment(start, tmp_path):
    seen = "[sys.argv[1:], os.getcwd(), os.environ['WORD'], sys.stdin.read(), 'torch' in sys.modules]"
    process = start(f"print({seen})\nsys.exit(7)")
    assert process.communicate(b"a line", timeout=60) == (
        f"[['a word'], {str(tmp_path)!r}, 'set', 'a line', True]\n".encode(), b""
    )  # fmt: skip
    assert process.returncode == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals(start, number):
    process = start("print(os.getpid(), flush=True)\ntime.sleep(60)")
    pid = int(process.stdout.readline())
    process.send_signal(number)
    error = process.communicate(timeout=30)[1]  # when the program has closed its streams
    assert process.returncode == -number
    assert (b"KeyboardInterrupt" in error) == (number == signal.SIGINT)
    with pytest.raises(ProcessLookupError):
        while True:  # until it is reaped
            os.kill(pid, 0)


def test_what_the_caller_ignores_is_ignored(start):
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        process = start("import signal\nprint(signal.getsignal(15).name, signal.getsignal(2).__name__)")
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert process.communicate(timeout=60)[0] == b"SIG_IGN default_int_handler\n"


def test_a_signal_that_the_program_sends_itself(start):
    process = start("os.kill(os.getpid(), 9)")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
