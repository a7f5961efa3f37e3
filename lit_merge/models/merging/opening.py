"""A merge whose every check comes before the work: of inputs on the Hub also before a tensor is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from lit_merge.checkpoints.opening import open_checkpoint
from lit_merge.errors import ConfigurationError
from lit_merge.files.hub import parse_address, pinned
from lit_merge.files.remote import RemoteSources
from lit_merge.models.merging.merge import Merge, Planned
from lit_merge.transforms import Transform

__all__ = ["Remote", "open_merge", "remote_sources"]

Remote = Literal["download", "stream"]


def remote_sources(remote: Remote) -> RemoteSources:
    """What opens inputs on the Hub; active in a ``with``, around everything that reads them.

    Args:
        remote: ``download`` into the cache, or ``stream`` in ranges without a copy.

    Raises:
        ConfigurationError: it is something else.
    """
    if remote not in get_args(Remote):
        raise ConfigurationError(f"remote: expected {' or '.join(get_args(Remote))}, got {remote!r}. Use one of them.")
    return RemoteSources(stream=remote == "stream")


def open_merge(
    settings: Mapping[str, Any],
    transform: Transform,
    sources: RemoteSources,
    overwrite: bool = False,
    dry: bool = False,
) -> tuple[Merge, Planned]:
    """Open a merge, plan it, and refuse what cannot be done.

    Inputs on the Hub that are not in the cache are opened by their headers first, and everything that can be known
    from these is checked: names, shapes and dtypes, the chain, the output, the room on both disks. Only then are they
    fetched and opened as files are. Values are read before only where the structure depends on them: whether two
    tables of a vocabulary are one, and whether integer buffers differ; by ranges, up to the first difference.

    Args:
        settings: the arguments of :class:`~lit_merge.models.merging.merge.Merge`.
        transform: the chain.
        sources: active.
        overwrite: whether an existing output is replaced.
        dry: whether the plan is all that is asked for; then nothing is fetched or verified.

    Returns:
        The merge, and the plan.

    Raises:
        LitMergeError: inputs are missing, damaged or do not fit each other, a setting is refused, or there is no room.
    """
    verify = bool(settings.get("verify")) and not dry
    first: Mapping[str, Any] = {**settings, "verify": verify}
    paths = [*settings["vectors"], settings.get("base"), settings.get("pretrained")]
    if any(path and parse_address(path) for path in paths):
        first = {**settings, "verify": False}
    if settings.get("pretrained") and parse_address(settings["pretrained"]):  # which a network reads as a whole
        for path in settings["vectors"]:
            open_checkpoint(pinned(path))
    job = Merge(**first)
    if sources.pending or first["verify"] != verify:
        planned = job.plan(transform, dry=True, values=not sources.pending)
        _check(job, planned, overwrite, sources)
        if dry:
            return job, _with_fetching(planned, sources)
        sources.fetch()
        # The addresses name the commits now, so that these are the same files.
        job = Merge(**{**settings, **job.addresses, "verify": verify})
    planned = job.plan(transform, dry=dry)
    _check(job, planned, overwrite, sources)
    return job, _with_fetching(planned, sources)


def _check(job: Merge, planned: Planned, overwrite: bool, sources: RemoteSources) -> None:
    job.check(planned, overwrite)
    sources.check_room(written=planned.plan.written, output=job.target.folder)


def _with_fetching(planned: Planned, sources: RemoteSources) -> Planned:
    """The plan with what is to be fetched for it."""
    if not sources.pending:
        return planned
    plan = planned.plan
    notes = (*plan.notes, sources.describe(plan.passes))
    return replace(planned, plan=replace(plan, notes=notes, memory=plan.memory + sources.memory))
