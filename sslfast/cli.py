"""The common part of the commands: flags and help from a dataclass, a config file, errors without a traceback."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

try:
    import tyro
    import yaml
    from tyro.conf import Positional, Suppress, arg
except ModuleNotFoundError as error:
    remedy = f"{error.name} is not installed; the trainer and its commands need: pip install 'sslfast[train]'"
    raise ModuleNotFoundError(remedy, name=error.name) from None

from sslfast.atomic_io import whole_file
from sslfast.errors import UserError, exit_status
from sslfast.ranges import check_ranges

__all__ = [
    "Positional",
    "Suppress",
    "arg",
    "flatten",
    "given_names",
    "last_value",
    "read_config",
    "run_command",
    "write_config",
]

Config = TypeVar("Config")
LONGEST = 2**16  # bytes of a config file


def run_command(
    config_class: type[Config],
    function: Callable[[Config], None],
    argv: Sequence[str] | None = None,
    *,
    refine: Callable[[dict[str, Any], Sequence[str]], tuple[type[Config], dict[str, Any]]] | None = None,
    complete: Callable[[Config, set[str]], dict[str, Any]] | None = None,
) -> int:
    """Parses `argv` (default: sys.argv) into a dataclass, runs `function` on it and returns its `exit_status`.

    If the dataclass has a field `config`, the command also reads flags from a YAML file, `--config FILE`. Flags on the
    command line take precedence.

    Args:
        refine: takes the values of the config file and the flags of the command line, and returns the subclass of
            `config_class` into which they are parsed, and the values of the file that apply.
        complete: takes the settings and the names of those that were given, and returns values for others; they replace
            those of the config file.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal in latin-1 or ascii shows ? for a character that it lacks
    arguments = list(sys.argv[1:] if argv is None else argv)
    module = sys.modules[function.__module__].__spec__
    name = f"python -m {module.name}" if module else "sslfast"

    def parse_and_run() -> None:
        has_file = any(field.name == "config" for field in dataclasses.fields(config_class))  # type: ignore[arg-type]
        path = last_value(arguments, "--config") if has_file else None
        values = read_config(Path(path)) if path else {}
        chosen, values = refine(values, arguments) if refine else (config_class, values)

        def parse(added: dict[str, Any]) -> Config:
            flags = [*to_flags(values), *to_flags(added), *arguments]
            config = tyro.cli(chosen, args=flags, prog=name, config=(tyro.conf.OmitArgPrefixes,))
            check_ranges(config)
            given = given_names(arguments, chosen) - given_names(to_flags(values), chosen)
            if useless := given & {*_empty_by_default(config)}:
                flag = useless.pop().replace("_", "-")
                raise UserError(f"--{flag} has no value; add one or more, or leave it out")
            return config

        config = parse({})
        if complete and (added := complete(config, given_names([*to_flags(values), *arguments], chosen))):
            config = parse(added)
        function(config)

    return exit_status(parse_and_run)


def _empty_by_default(config: Any) -> Iterator[str]:
    """The fields of a dataclass, and of those in it, that are empty tuples, as they are by default."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _empty_by_default(value)
        elif value == () == field.default:
            yield field.name


def given_names(flags: Sequence[str], config_class: type) -> set[str]:
    """The fields of a dataclass, and of those nested in it, that are set by these flags, also by their aliases."""
    names = {flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}
    others: dict[str, str] = {}
    for name, hint in get_type_hints(config_class, include_extras=True).items():
        for note in getattr(hint, "__metadata__", ()):
            others |= {alias.lstrip("-").replace("-", "_"): name for alias in getattr(note, "aliases", None) or ()}
    return {others.get(name, name.removeprefix("no_")) for name in names}


def last_value(flags: Sequence[str], name: str) -> str | None:
    """The value of the last `name VALUE` or `name=VALUE` in `flags`; None if there is none."""
    value = None
    for flag, following in zip(flags, [*flags[1:], None], strict=False):
        if flag == name:
            value = following
        elif flag.startswith(f"{name}="):
            value = flag.partition("=")[2]
    return value


def write_config(config: Any, path: Path) -> None:
    """Writes the dataclass of a command as YAML, which `--config` reads back."""
    with whole_file(path) as part:
        part.write_text(yaml.safe_dump(flatten(config), sort_keys=False))


def read_config(path: Path) -> dict[str, Any]:
    """The names and values of a config file: numbers, words, or lists of them.

    Raises:
        UserError: the file is missing, too long, not YAML, or not a mapping of names to such values.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(LONGEST + 1)
        _check_flat(text)
        values = yaml.safe_load(text)
        node = yaml.compose(text)
        names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.YAMLError(f"{twice[0]!r} is there twice")
    except (OSError, ValueError, OverflowError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the config file {path}: {reason}. Correct it, or choose another.") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: a config file must consist of `flag: value` lines")
    if wrong := {"help", "config"} & {*values}:
        raise UserError(f"{path}: {wrong.pop()!r} belongs on the command line; remove it")
    for key, value in values.items():
        if isinstance(value, dict) or "\0" in str(value):
            raise UserError(f"{path}: {key!r} must have a number, a word, or a list of them")
    return values


def _check_flat(text: bytes) -> None:
    """Raises a YAMLError for what no config file has and safe_load could choke on."""
    if len(text) > LONGEST:
        raise yaml.YAMLError(f"it has more than {LONGEST:,} bytes")
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) or depth > 2:
            raise yaml.YAMLError(f"a config file has no alias, no tag, and no list in a list{event.start_mark}")


def to_flags(values: dict[str, Any]) -> list[str]:
    """The content of a config file as a list of flags."""
    flags: list[str] = []
    for key, value in values.items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return flags


def flatten(config: Any) -> dict[str, Any]:
    """A dataclass and those nested in it as one mapping of names to plain values, without `config` and `resume`."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values.update(flatten(value))
        elif field.name not in ("config", "resume"):
            values[field.name] = (
                str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            )
    return values
