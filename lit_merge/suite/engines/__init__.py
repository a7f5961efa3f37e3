"""What runs the stages of a job: this process, others on this machine, or a Ray cluster."""

from collections.abc import Sequence

from lit_merge.suite.engines.job import Engine, Job, Outcome
from lit_merge.suite.engines.local import LocalEngine
from lit_merge.suite.engines.sequential import RunCommand, SequentialEngine

__all__ = ["Engine", "Job", "LocalEngine", "Outcome", "RunCommand", "SequentialEngine", "open_engine"]


def open_engine(
    engine: str,
    run: RunCommand,
    parallel: int | None = None,
    directory: str = ".",
    devices: int = 1,
    ray_address: str = "auto",
    ray_cpus: float = 1,
    ray_gpus: float | None = None,
    modules: Sequence[str] = (),
) -> Engine:
    """The engine that a user asked for.

    Args:
        engine: ``local`` or ``ray``.
        run: runs a command in this process, for the engine that starts none.
        parallel: how many stages at a time; None for one, and on Ray for as many as the cluster takes.
        directory: the job's, which every machine of a cluster has to see.
        devices: the most devices that a stage uses.
        ray_address: of the cluster, see :class:`~lit_merge.suite.engines.cluster.RayEngine`.
        ray_cpus: cores per stage.
        ray_gpus: GPUs per device of a stage.
        modules: what stages are going to import, for processes that are forked.

    Raises:
        ConfigurationError: a setting is out of its range, or there is no such cluster.
    """
    from lit_merge.errors import ConfigurationError

    if engine not in ("local", "ray"):
        raise ConfigurationError(f"engine: expected local or ray, got {engine!r}. Use one of them.")
    if parallel is not None and parallel < 1:
        raise ConfigurationError(f"parallel: expected a positive number, got {parallel}. Use e.g. 2.")
    if engine == "ray":
        from lit_merge.suite.engines.cluster import RayEngine

        return RayEngine(directory, ray_address, parallel, ray_cpus, ray_gpus)
    return SequentialEngine(run) if parallel in (None, 1) else LocalEngine(parallel or 1, devices, modules)
