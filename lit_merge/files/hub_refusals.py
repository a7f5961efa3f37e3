"""What the Hugging Face Hub, the network and the cache refuse, in one line each: expected, got, what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lit_merge.errors import HubError, LitMergeError, first_few

if TYPE_CHECKING:
    from lit_merge.files.hub import Address

__all__ = ["is_unreachable", "not_cached", "refusals"]

# Tokens, and what follows a link's question mark, which may be a signature.
_SECRETS = re.compile(r"hf_\w{6,}|(?<=\?)\S+|[Bb]earer\s+\S+")


@contextmanager
def refusals(address: Address, doing: str) -> Iterator[None]:
    """Turn whatever the library and the network raise into one line.

    Args:
        address: that is read or written.
        doing: ``read`` or ``write``.

    Raises:
        HubError: instead of the library's errors.
    """
    try:
        yield
    except LitMergeError:
        raise
    except Exception as error:  # the network libraries below raise whatever they like
        raise HubError(f"{address}: {_explained(error, address, doing)}") from error


def not_cached(address: Address, missing: Sequence[str], reason: Exception) -> HubError:
    """The refusal of an address that neither the Hub nor the cache gives.

    Args:
        address: what was asked for.
        missing: paths in the repository that the cache does not have; empty if it has nothing of the revision.
        reason: why the Hub did not answer.
    """
    from huggingface_hub import constants

    command = " ".join(["hf download", address.repository, *missing])
    command += f" --revision {address.revision}" if address.revision else ""
    what = first_few(missing) or f"snapshot of {address.repository}"
    if constants.HF_HUB_OFFLINE:
        return HubError(
            f"{address}: expected it in the cache {constants.HF_HUB_CACHE}, as HF_HUB_OFFLINE is set, got no {what}. "
            f"Run {command} where there is network, and bring the folder "
            f"models--{address.repository.replace('/', '--')} of that cache here; or unset HF_HUB_OFFLINE."
        )
    return HubError(
        f"{address}: expected an answer from {constants.ENDPOINT}, got {_line(reason)}, and no {what} in the cache "
        f"{constants.HF_HUB_CACHE}. Connect to the network, or check HF_ENDPOINT."
    )


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def is_unreachable(error: Exception) -> bool:
    """Whether an error means that the Hub did not answer, rather than that it refused."""
    status = _status(error)
    if status is not None:
        return status >= 500
    network = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
    return network or isinstance(error, (ConnectionError, TimeoutError))


def _explained(error: Exception, address: Address, doing: str) -> str:
    """What was expected, what the library's error says was got, and what to do."""
    from huggingface_hub import constants, errors

    status, said = _status(error), _line(error)
    login = "run hf auth login"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"expected access to a gated repository, got a refusal ({status}). Ask for it at "
            f"{constants.ENDPOINT}/{address.repository}, then {login}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"expected a model repository that you may {doing}, got none ({status}). Check owner and name; "
            f"if it is private, {login} with an account that may {doing} it."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"expected a branch, tag or commit of {address.repository}, got {address.revision!r}. Check it."
    if isinstance(error, errors.EntryNotFoundError):
        return f"expected a file of {address.repository}, got none of this name ({status}). Check the path."
    if status == 401:
        return f"expected a valid login, got a refusal (401: {said}). Log in again: {login}."
    if status == 403:
        return f"expected a login that may {doing} this, got a refusal (403: {said}). Use another token: {login}."
    if status in (409, 412):
        return f"expected the repository as it was read, got another commit in between ({status}). Push again."
    if status == 429:
        return f"expected an answer, got too many requests (429). Wait a few minutes; {login} allows more of them."
    if is_unreachable(error):
        return (
            f"expected an answer from {constants.ENDPOINT}, got {said if status is None else f'{status}: {said}'}. "
            "Connect to the network, check HF_ENDPOINT, or try again later."
        )
    if status is not None:
        return f"expected the Hub to {doing} this, got a refusal ({status}: {said}). Change what it complains about."
    if isinstance(error, OSError) and error.errno is not None:
        advice = "Free space there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Make it writable"
        return (
            f"expected room in the cache {constants.HF_HUB_CACHE}, got {os.strerror(error.errno)}. "
            f"{advice}, or set HF_HOME to another folder."
        )
    return f"expected to {doing} it, got {said}. Check the address, or install a newer huggingface_hub."


def _line(error: BaseException) -> str:
    """What the server says, or the first line of the error; without tokens and the signatures of links."""
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return _SECRETS.sub("…", " ".join(str(text).split()).replace(_token() or "\0", "…"))[:200].rstrip(". ")


def _token() -> str | None:
    """The user's token, of any form, so that it can be taken out of a text."""
    from huggingface_hub import get_token

    try:
        return get_token()
    except Exception:  # it is about to be said what is wrong
        return None
