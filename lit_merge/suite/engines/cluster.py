"""Stages on the machines of a Ray cluster."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_merge._version import __version__
from lit_merge.errors import ConfigurationError, LitMergeError
from lit_merge.suite.engines.job import Job, Outcome
from lit_merge.suite.engines.process import StageProcess, with_threads

__all__ = ["RayEngine"]

_PASSED_ON = ("LIT_MERGE_DATA", "LIT_MERGE_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "PYTHONPATH")
_UNSEEN = 60.0  # seconds for which a file that another machine wrote may not be seen here yet, as on NFS


class RayEngine:
    """Runs every job as one remote task of Ray.

    Configurations and outputs go through files: the job's directory and the current one have to be on a file system
    that all machines share, under the same path, which is checked on every machine with a marker file.

    Args:
        directory: the job's.
        address: of the cluster: ``auto`` for the one that this machine belongs to, ``HOST:PORT``, or ``local`` to start
            one on this machine alone for as long as this engine is open.
        parallel: how many jobs at a time at most; None for as many as the cluster takes.
        cpus: cores that Ray reserves for a job, and the threads that it uses.
        gpus: GPUs that Ray reserves for each device of a job; 0.5 lets two jobs share one. None for 1 if the cluster
            has GPUs, otherwise 0.

    Raises:
        ConfigurationError: Ray is not installed, there is no cluster, a number is out of its range, or the cluster can
            never run a stage.
        LitMergeError: a machine does not see the directory, or has another version of lit-merge.
    """

    def __init__(
        self,
        directory: str,
        address: str = "auto",
        parallel: int | None = None,
        cpus: float = 1,
        gpus: float | None = None,
    ) -> None:
        if cpus <= 0 or (gpus is not None and gpus < 0):
            raise ConfigurationError(
                f"ray_cpus and ray_gpus: expected a positive number and none below 0, got {cpus} and {gpus}."
            )
        try:
            import ray
        except ImportError as error:
            raise ConfigurationError(
                "engine: expected the package ray, got none installed. Run pip install lit-merge[ray]."
            ) from error
        self._ray: Any = ray
        self._running: dict[Any, Job] = {}
        self._own = not ray.is_initialized()
        if self._own:
            self._connect(address, parallel)
        try:
            total = ray.cluster_resources()
            self._cpus, self._parallel = cpus, parallel
            self._gpus = (1.0 if total.get("GPU", 0) else 0.0) if gpus is None else gpus
            if cpus > total.get("CPU", 0) or self._gpus > total.get("GPU", 0):
                raise ConfigurationError(
                    f"ray_cpus and ray_gpus: expected at most what the cluster has ({total.get('CPU', 0):g} cores, "
                    f"{total.get('GPU', 0):g} GPUs), got {cpus:g} and {self._gpus:g} for a stage. Lower them."
                )
            self._directory = str(Path.cwd())
            self._environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
            self._environment |= with_threads(int(cpus))
            self._check_machines(Path(directory).resolve())
        except BaseException:
            self.close()
            raise

    def _connect(self, address: str, parallel: int | None) -> None:
        settings: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
        if address == "local":
            settings |= {"num_cpus": parallel, "include_dashboard": False, "object_store_memory": 100 * 2**20}
        try:
            self._ray.init(**settings)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split()).partition(". ")[0][:200].rstrip(".")
            raise ConfigurationError(
                f"ray_address: expected a Ray cluster at {address!r}, got none ({reason}). Start one with ray start "
                "--head, or use local."
            ) from error

    def _check_machines(self, directory: Path) -> None:
        """Ask every machine whether it sees what this one wrote into the job's directory."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        directory.mkdir(parents=True, exist_ok=True)
        marker, token = directory / f".marker-{secrets.token_hex(8)}", secrets.token_hex(16)
        marker.write_text(token, encoding="utf-8")
        try:
            look = self._ray.remote(num_cpus=0, max_retries=0)(_look)
            machines = [node for node in self._ray.nodes() if node["Alive"]]
            answers = [
                look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                    str(marker), self._directory
                )
                for node in machines
            ]
            for node, (found, entered, version) in zip(machines, self._ray.get(answers), strict=True):
                self._check_machine(node["NodeManagerHostname"], directory, found == token, entered, version)
        except self._ray.exceptions.RayError as error:
            raise LitMergeError(
                f"ray: expected lit-merge {__version__} on every machine of the cluster, got an error "
                f"({' '.join(str(error).split())[-200:]}). Install it on all of them."
            ) from error
        finally:
            marker.unlink(missing_ok=True)

    def _check_machine(self, host: str, directory: Path, seen: bool, entered: bool, version: str) -> None:
        if not seen or not entered:
            raise LitMergeError(
                f"ray: expected a file system that all machines share, got a machine, {host}, that does not see "
                f"{directory if not seen else self._directory}. Work in, and write to, a shared folder."
            )
        if version != __version__:
            raise LitMergeError(
                f"ray: expected lit-merge {__version__} on every machine of the cluster, got {version} on {host}. "
                "Install the same on all."
            )

    def free(self) -> bool:
        """Whether one more job may be submitted; without a limit always, as Ray has a queue."""
        return self._parallel is None or len(self._running) < self._parallel

    def start(self, job: Job) -> None:
        """Submit a job."""
        gpus = self._gpus * job.devices
        remote = self._ray.remote(num_cpus=self._cpus, num_gpus=gpus, max_retries=0)(_run)
        self._running[remote.options(name=job.name).remote(job, self._environment, self._directory)] = job

    def wait(self) -> Outcome:
        """Wait until one of the tasks ends, and its outputs are seen here."""
        (ended, *_), _ = self._ray.wait(list(self._running), num_returns=1)
        job = self._running.pop(ended)
        try:
            outcome: Outcome = self._ray.get(ended)
        except self._ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[:300].rstrip(".")
            return Outcome(job.name, 0.0, LitMergeError(f"the worker of the cluster ended: {reason}."))
        return outcome if _all_seen(job, outcome) else _unseen(job, outcome)

    def close(self) -> None:
        """Cancel all tasks, whose processes end with their workers, and leave the cluster."""
        for task in self._running:
            self._ray.cancel(task, force=True)
        self._running.clear()
        if self._own:
            self._ray.shutdown()


def _run(job: Job, environment: Mapping[str, str], directory: str) -> Outcome:
    """Run a job in a process of its own; this is what a worker of the cluster does."""
    process = StageProcess(job, environment, directory)
    try:
        outcome = process.wait()
    finally:
        process.end()
    return Outcome(outcome.name, outcome.seconds, outcome.error, outcome.refused, socket.gethostname(), outcome.sizes)


def _look(marker: str, directory: str) -> tuple[str, bool, str]:
    """What a machine sees: the marker's content, whether there is the current directory, lit-merge's version."""
    path = Path(marker)
    return path.read_text(encoding="utf-8") if path.is_file() else "", Path(directory).is_dir(), __version__


def _all_seen(job: Job, outcome: Outcome) -> bool:
    paths = [Path(job.folder) / name for name in job.outputs] if outcome.error is None else []
    until = time.monotonic() + _UNSEEN
    while any(
        not path.is_file() or path.stat().st_size != size for path, size in zip(paths, outcome.sizes, strict=False)
    ):
        if time.monotonic() > until:
            return False
        os.listdir(job.folder)  # noqa: PTH208 - makes network file systems look again
        time.sleep(0.5)
    return True


def _unseen(job: Job, outcome: Outcome) -> Outcome:
    error = LitMergeError(
        f"expected the outputs in {job.folder} as they are on {outcome.machine}, got others after {_UNSEEN:g} s. "
        "Check that all machines share this folder."
    )
    return Outcome(job.name, outcome.seconds, error, machine=outcome.machine)
