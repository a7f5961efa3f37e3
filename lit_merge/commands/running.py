"""What runs a command, with the configuration and the overrides that a user gave."""

from __future__ import annotations

import ast
import gc
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

from lit_merge.commands.table import Command, command_screen, commands, group_screen, groups
from lit_merge.errors import ConfigurationError, EndRequested, did_you_mean

__all__ = ["RESOLVED", "run_command", "warn"]

RESOLVED: ContextVar[str] = ContextVar("resolved configuration", default="")
"""The configuration of a merge, as YAML with all defaults; empty where its function is called from Python."""

_HELP = ("-h", "--help")
_BY_SHORT_NAME = {"LightningDataModule": "lit_merge.data.multitask"}
"""A costly type, and where the class is defined that is named without its module."""
_PERMISSIONS = ("overwrite", "dry_run", "progress")  # of one command line, not of the configuration that it saves


def run_command(command: str, arguments: Sequence[str] = ()) -> Any:
    """Run a command in this process.

    Args:
        command: as ``lit-merge --help`` lists them, e.g. ``fit``, ``merge`` or ``data``.
        arguments: what follows it on the command line.

    Returns:
        What the command returns: for Lightning's, the CLI object with its trainer, model and data.

    Raises:
        SystemExit: help was asked for, or the parser has said on the standard error what is wrong.
        EndRequested: the process was asked to end.
        LitMergeError: there is no such command, or it refuses its input.
    """
    known = commands()
    if command in groups():
        if not arguments or arguments[0] in (*_HELP, "help"):
            return sys.stdout.write(group_screen(command))
        command, arguments = f"{command} {arguments[0]}", arguments[1:]
    if command not in known:
        raise _unknown(command, list(known))
    chosen = known[command]
    if any(option in arguments for option in _HELP):
        return sys.stdout.write(command_screen(chosen))
    arguments = ["--help" if one == "--help_all" else one for one in arguments]
    module = chosen.load()
    if not gc.isenabled():  # see lit_merge.commands.main.process
        gc.freeze()
        gc.enable()
    function = getattr(module, chosen.file.stem)
    with _requests_to_end():
        if chosen.takes_command_line:
            return _ended(function(*arguments))
        return _run(chosen, function, getattr(module, "arguments", list)(arguments))


def warn(lines: Iterable[str]) -> None:
    """Say on the standard error what is legal and dangerous, a line each."""
    for line in lines:
        text = " ".join(line.split())
        sys.stderr.write(f"lit-merge: warning: {text}\n")


@contextmanager
def _requests_to_end() -> Iterator[None]:
    """Lightning's exception for SIGTERM as ours, which is a failure."""
    try:
        yield
    except SystemExit as request:
        raised = sys.modules.get("lightning.pytorch.utilities.exceptions")
        if raised is not None and isinstance(request, raised.SIGTERMException):
            raise EndRequested(str(request.args[0]) if request.args else "") from request
        raise


def _ended(result: Any) -> Any:
    """What a command of Lightning's returns, unless it was told to end while it trained or tested.

    Lightning puts the end off to the next batch; after the last one it would come to nothing, and a suite would go on.
    """
    if getattr(getattr(result, "trainer", None), "received_sigterm", False):
        raise EndRequested
    return result


def _unknown(command: str, known: list[str]) -> ConfigurationError:
    group, _, name = command.rpartition(" ")
    if group:
        names = [one.partition(" ")[2] for one in known if one.startswith(f"{group} ")]
    else:
        names = list(dict.fromkeys(one.partition(" ")[0] for one in known))
    hint = did_you_mean(name, names, f"See lit-merge {f'{group} ' if group else ''}--help.", 1)
    return ConfigurationError(f"{group or 'command'}: expected one of {', '.join(names)}, got {name!r}. {hint}")


def _run(command: Command, function: Callable[..., Any], arguments: Sequence[str]) -> Any:
    from jsonargparse import ActionConfigFile

    from lit_merge.commands.parsing import CommandParser, refuse_saved_permissions, refuse_urls

    refuse_saved_permissions(arguments)
    typed, left_out = _typed(function, set(_settings_in(arguments)))
    parser = CommandParser(prog=f"lit-merge {command.name}", description=command.summary, allow_abbrev=False)
    parser.left_out = left_out
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="Path of a YAML or JSON configuration file.")
    several: set[int | str] = {name for name in command.positional if "list" in str(function.__annotations__.get(name))}
    for name in sorted(map(str, several)):
        parser.add_argument(name, nargs="*", type=str, help="names, e.g. mnist or clip8")
    parser.add_function_arguments(typed, as_group=False, as_positional=bool(command.positional), skip=several)
    config = parser.parse_args(list(arguments))
    saved = config.clone()
    for name in ("config", *_PERMISSIONS):
        saved.pop(name, None)
    resolved = parser.dump(saved, skip_none=False, skip_validation=True)
    settings = parser.instantiate_classes(config)
    settings.pop("config", None)
    refuse_urls(settings.as_dict())
    token = RESOLVED.set(resolved if command.name == "merge" else "")  # of no merge within another command
    try:
        result = function(**settings.as_dict())
    finally:
        RESOLVED.reset(token)
    if isinstance(result, str | Path):
        sys.stdout.write(f"{result}\n")
    elif hasattr(result, "describe"):
        sys.stdout.write(f"{result.describe()}\n")
    if hasattr(result, "refuse"):  # what was found out is shown, and is a failure
        result.refuse()
    return result


def _settings_in(arguments: Sequence[str]) -> Iterator[str]:
    """The settings that a command line and its files name; ``*`` for all, when the configuration is printed."""
    from lit_merge.commands.parsing import configurations

    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").partition(".")[0].rstrip("+")
        yield "*" if argument.startswith("--print_config") or argument == "--help" else name
    for content in configurations(arguments):
        yield from (str(key).partition(".")[0] for key in content)


def _typed(function: Callable[..., Any], named: set[str]) -> tuple[Callable[..., Any], list[str]]:
    """The function with evaluated types, without those settings whose type is costly to import and that nobody names.

    Costly are the types that its module imports for type checkers only, such as Lightning's data modules.

    Returns:
        The function as the parser is to see it, and the names of the settings that were left out.
    """
    assert isinstance(function, FunctionType)
    costly = _for_type_checkers(inspect.getsource(sys.modules[function.__module__]))
    signature, types, left_out = inspect.signature(function), {}, []
    for name, parameter in signature.parameters.items():
        text = str(parameter.annotation)
        needed = {one.id for one in ast.walk(ast.parse(text)) if isinstance(one, ast.Name) and one.id in costly} - set(
            function.__globals__
        )
        if needed and not named & {name, "*"}:
            left_out.append(name)
            continue
        found = {one: getattr(import_module(costly[one][0]), costly[one][1]) for one in needed}
        for module in _BY_SHORT_NAME.keys() & needed:
            import_module(_BY_SHORT_NAME[module])
        types[name] = eval(text, {**function.__globals__, **found})  # an annotation of our own
    typed = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    typed.__doc__, typed.__annotations__ = function.__doc__, types
    typed.__module__ = "builtins"  # where the parser looks for names: there are none left to find
    shown = [one.replace(annotation=types[name]) for name, one in signature.parameters.items() if name in types]
    typed.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return typed, left_out


def _for_type_checkers(source: str) -> dict[str, tuple[str, str]]:
    """Name -> module and name, of what is imported under ``if TYPE_CHECKING``."""
    return {
        alias.asname or alias.name: (str(node.module), alias.name)
        for block in ast.parse(source).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
