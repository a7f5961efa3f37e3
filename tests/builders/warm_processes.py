"""``python -m lit_merge …`` without its imports: a process that has made them is forked for every such command.

A folder with a ``sitecustomize.py`` in front of ``PYTHONPATH`` makes every python look at its own command line as it
starts. If it is lit-merge's, or that of the process that a suite forks its stages from, it hands its arguments,
environment and open files to a server, which forks a process that does the work, and ends as that one does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from builders.fork_server import ROOT, ForkServer

CLIENT = """
import os, sys
MODULES = (["-m", "lit_merge"], ["-m", "lit_merge.suite.engines.forking"])
if sys.orig_argv[1:3] in MODULES and "--version" not in sys.orig_argv:
    import json, signal, socket
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(SOCKET)
        is_template = sys.orig_argv[2] != "lit_merge"
        more = sys.orig_argv[3] if is_template else os.environ.get("LIT_MERGE_LIFELINE")
        files = [0, 1, 2, *([int(more)] if more else [])]
        request = {"arguments": sys.orig_argv[3:], "environment": dict(os.environ), "current": os.getcwd()}
        request["template"] = is_template
        socket.send_fds(server, [json.dumps(request).encode()], files)
        if is_template:  # its other end is to notice when the server's copy is closed
            os.close(int(more))
        answer = server.recv(16)
    if not answer:  # the process was killed
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(int(answer))
"""

SERVER = """
import json, os, runpy, signal, socket, sys, traceback

def work(client):
    message, files, _, _ = socket.recv_fds(client, 1 << 20, 4)
    request = json.loads(message)
    os.setsid()
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(request["environment"])
    if len(files) == 4 and not request["template"]:
        os.environ["LIT_MERGE_LIFELINE"] = str(files[3])
    os.chdir(request["current"])
    code, own = 1, os.getpid()
    try:
        if request["template"]:
            sys.argv = ["template", str(files[3])]
            runpy.run_module("lit_merge.suite.engines.forking", run_name="__main__", alter_sys=True)
        from lit_merge.commands.main import main
        code = main(request["arguments"])
    except SystemExit as end:
        code = end.code or 0
        if os.getpid() != own:  # a stage
            sys.stdout.flush()
            os._exit(code)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    client.send(str(code).encode())
    os._exit(0)

server = socket.socket(socket.AF_UNIX)
server.bind(SOCKET)
server.listen(64)
if os.fork():
    os._exit(0)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    client, _ = server.accept()
    if os.fork() == 0:
        server.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        work(client)
    client.close()
"""


@contextmanager
def warm_processes(folder: Path, fork_server: ForkServer) -> Iterator[None]:
    """Within it, this process and those that it starts have such a ``PYTHONPATH``. The server ends with the tests."""
    address = folder / "socket"
    (folder / "first").mkdir()
    (folder / "first" / "sitecustomize.py").write_text(f"SOCKET = {str(address)!r}\n{CLIENT}", encoding="utf-8")
    codes, said = fork_server.run([(f"SOCKET = {str(address)!r}\n{SERVER}", {})])
    assert codes == [0], said
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder / "first"), str(ROOT)]))
        yield
