"""Command lines made from a dataclass: one flag per field, and one line per user error."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import signal
import sys
import typing
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import jsonargparse
import yaml

from cfs.errors import MainRankError, UserError
from cfs.files import write_atomically

Config = TypeVar("Config")

EXIT_SIGTERM = 128 + signal.SIGTERM
METAVARS = {int: "N", float: "X", str: "TEXT"}


STOPPING = (signal.SIGTERM, signal.SIGUSR1)
"""What batch systems send before a job's time ends; Slurm's `--signal` names either."""


class Terminated(BaseException):
    """SIGTERM, raised where the program is, so that it cleans up on its way out."""


def option(default: Any, meaning: str, metavar: str | None = None) -> Any:
    """A dataclass field with its default, its line in `--help` and there a name for its value."""
    return dataclasses.field(default=default, metadata={"help": meaning, "metavar": metavar})


def parse(
    config_class: type[Config], description: str, arguments: list[str] | None = None
) -> Config:
    """Read flags, and a YAML file by `--config`, into `config_class`; flags win over the file.

    Raises `UserError` through `config_class.__post_init__`; a malformed flag exits with code 2.
    """
    parser = jsonargparse.ArgumentParser(
        prog=Path(sys.argv[0]).name,
        description=description,
        exit_on_error=False,
        formatter_class=argparse.HelpFormatter,  # jsonargparse's own repeats types and defaults
    )
    config_file = jsonargparse.ActionConfigFile  # pyright: ignore[reportPrivateImportUsage]
    parser.add_argument("--config", action=config_file, help="YAML file of the flags below")
    hints = typing.get_type_hints(config_class)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        group = field.metadata.get("group")
        if group is not None and group not in groups:
            groups[group] = parser.add_argument_group(f"options of {group}")
        shown = "" if field.default is None else f" [{field.default}]"
        hint = hints[field.name]
        kind: dict[str, Any] = {
            "type": hint,
            "metavar": field.metadata["metavar"] or _metavar(hint),
        }
        if hint is bool:
            kind, shown = {"action": "store_true"}, ""
        if (item := _list_item(hint)) is not None:
            kind |= {"nargs": "+", "type": item}
        (parser if group is None else groups[group]).add_argument(
            f"--{field.name.replace('_', '-')}",
            default=field.default,
            help=field.metadata["help"].replace("%", "%%") + shown,
            **kind,
        )
    try:
        given = sys.argv[1:] if arguments is None else arguments
        values = parser.parse_args(_file_first(given)).as_dict()
    except (jsonargparse.ArgumentError, UnicodeDecodeError) as error:
        raise UserError(_one_line(str(error), hints)) from error
    values.pop("config", None)
    return config_class(**values)


def given_flags(config_class: type[Any], arguments: list[str] | None = None) -> set[str]:
    """Fields that the command line or its `--config` file names, whatever value they give."""
    given = sys.argv[1:] if arguments is None else arguments
    names = {a[2:].split("=")[0].replace("-", "_") for a in given if a.startswith("--")}
    for flag, file in zip(given, [*given[1:], ""], strict=True):
        path = file if flag == "--config" else flag.removeprefix("--config=")
        if flag.startswith("--config"):
            keys = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
            names |= {str(key).replace("-", "_") for key in keys}
    return names & {field.name for field in dataclasses.fields(config_class)}


def _file_first(arguments: list[str]) -> list[str]:
    """`--config FILE` before all other flags, as what is parsed later wins."""
    files, flags = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config":
            files += [argument, *islice(rest, 1)]
        elif argument.startswith("--config="):
            files.append(argument)
        else:
            flags.append(argument)
    return files + flags


def _one_line(message: str, hints: dict[str, Any]) -> str:
    """jsonargparse's many lines on a bad value as one: the flag, what it got, what it takes."""
    message = " ".join(message.split())
    if message.endswith("object is not iterable"):  # all it says of a list's place in the file
        lists = [f"--{n.replace('_', '-')}" for n, hint in hints.items() if _list_item(hint)]
        return f"--config: {' or '.join(lists)} has no list in the file; expected one, as in [1, 2]"
    named = re.match(r'Parser key "(\w+)"(?: element \d+)?: ', message)
    given = re.search(r"(?:Given value|Got value): (.*)$", message)
    if named is None:
        return message
    flag = f"--{named[1].replace('_', '-')}"
    if given is None or named[1] not in hints:
        return f"{flag}: {message[named.end() :]}"
    return f"{flag} {given[1]}: expected {_type_name(hints[named[1]])}"


def _list_item(hint: Any) -> type[str] | type[float] | None:
    """Type of the values of a flag that takes several, such as `list[float] | None`."""
    for item in (str, float):
        if list[item] in (hint, *typing.get_args(hint)):
            return item
    return None


def _metavar(hint: Any) -> str | None:
    """What `--help` shows for a flag's value; a choice shows its words."""
    plain = [part for part in typing.get_args(hint) or (hint,) if part is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        plain = [hint]
    if typing.get_origin(plain[0]) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(plain[0]))) + "}"
    return METAVARS.get(plain[0])


def _type_name(hint: Any) -> str:
    """A type as a person would say it: its name, or the words that it allows."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    return " or ".join(map(_type_name, parts)) if parts else hint.__name__


def save_yaml(config: Any, path: Path, comments: list[str]) -> None:
    """Write a config as a file that `--config` reads back, under some lines of comment."""
    head = "".join(f"# {line}\n" for line in comments)
    body = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    write_atomically(path, head + body)


def run(main: Callable[[], None], resumes: str | None = None, stopped: int = EXIT_SIGTERM) -> None:
    """Call an entry point; a `UserError` becomes one line on stderr and its exit code.

    resumes  how the program goes on where it stopped, if it does ("run again"): SIGTERM is
             answered by cleaning up and a line that says so
    stopped  the exit code after it
    """
    program, rank = Path(sys.argv[0]).name, os.environ.get("RANK", "0")
    code = 0
    if resumes is not None:
        for number in STOPPING:
            signal.signal(number, _terminate)
    try:
        main()
    except UserError as error:
        where = "" if rank == "0" else f" (rank {rank})"
        if not isinstance(error, MainRankError):
            print(f"{program}{where}: error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except Terminated:
        if rank == "0":
            others = (
                "" if "TORCHELASTIC_RUN_ID" not in os.environ else ", unless another rank failed"
            )
            print(f"{program}: stopped by SIGTERM; {resumes} to resume{others}", file=sys.stderr)
        code = stopped
    leave(code)


def leave(code: int) -> NoReturn:
    """End the process without the interpreter's own shutdown.

    Threads of gloo and of pyarrow may outlive the work. One that frees a tensor while the
    interpreter shuts down aborts the process (pytorch issue 190489, arrow issue 34314).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    for number in STOPPING:  # torchrun and the shell may both send one
        signal.signal(number, signal.SIG_IGN)
    raise Terminated
