"""Starts processes that have imported what takes seconds: a server imports it once, computes nothing, and is forked.

The server reads lines, each of which asks for processes that run at the same time, in JSON: their programs and
environments, the current folder, and the folder that gets what they print. It answers with a line of exit codes.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class ForkServer:
    """Runs programs in processes of their own; the server is started when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.server: subprocess.Popen[str] | None = None

    def run(
        self, processes: Sequence[tuple[str, Mapping[str, str]]], seconds: float = 240
    ) -> tuple[list[int], list[str]]:
        """Programs with what is to be added to the environment, at once: their exit codes and what they print."""
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, __file__],
                env={**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        self.count += 1
        output = self.folder / str(self.count)
        output.mkdir()
        cache = {"LIT_MERGE_CACHE": os.environ.get("LIT_MERGE_CACHE", "")}
        programs = [[program, {**cache, **environment}] for program, environment in processes]
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        request = {"programs": programs, "output": str(output), "current": str(Path.cwd())}
        self.server.stdin.write(f"{json.dumps(request)}\n")
        self.server.stdin.flush()
        ready, _, _ = select.select([self.server.stdout], [], [], seconds)
        said = [path.read_text() for path in sorted(output.iterdir())]
        if not ready or not (answer := self.server.stdout.readline()):
            self.close()
            raise TimeoutError("\n".join(["expected an end, got none", *said]))
        return json.loads(answer), [path.read_text() for path in sorted(output.iterdir())]

    def run_on_two(self, program: str) -> None:
        """A program on two processes of one group, with the environment that torchrun gives them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        shared |= {"TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "0"}
        codes, said = self.run([(program, {**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")])
        assert codes == [0, 0], "\n".join(said)

    def close(self) -> None:
        """End the server and whatever it started."""
        if self.server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.server.pid, signal.SIGKILL)
            self.server.communicate()
            self.server = None


def run(program: str, environment: dict[str, str], current: str, output: Path) -> None:
    """What a forked process does, to its end."""
    code = 1
    try:
        for number, path in ((0, os.devnull), (1, output), (2, output)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
        os.environ.update(environment)
        os.chdir(current)
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Until there is nothing more to read."""
    import gc

    import lightning  # noqa: F401
    import open_clip  # noqa: F401
    import pytest  # noqa: F401

    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for number, (program, environment) in enumerate(request["programs"]):
            child = os.fork()
            if child == 0:
                run(program, environment, request["current"], Path(request["output"]) / f"{number}.txt")
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        sys.stdout.write(f"{json.dumps(codes)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
