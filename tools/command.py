"""One mechanism for every command: click options from an options class, one workflow call, one way to report."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from sparse_rt.config import Options, parse_assignments
from sparse_rt.errors import CheckFailed
from sparse_rt.tools.console import ConsoleProgress, check_json_target, write_json_result

COMMON = (
    click.Option(["--json", "json_target"], metavar="FILE", help="Write the result as JSON; '-' is standard output."),
    click.Option(["--quiet"], is_flag=True, help="Say nothing but errors."),
    click.Option(["--debug"], is_flag=True, help="Show the traceback of a failure."),
)
Build = Callable[[type[Options], dict[str, Any], list[str]], Options]


def workflow_command(
    options_class: type[Options],
    target: str,
    show: Callable[[dict[str, Any]], None],
    help: str,
    arguments: tuple[str, ...] = ("model",),
    build: Build | None = None,
    extra: tuple[click.Parameter, ...] = (),
    hidden: tuple[str, ...] = (),
) -> click.Command:
    """A click command that fills ``options_class``, calls the workflow ``target`` ("module:function") and reports.

    ``build`` replaces the plain construction of the options and receives what click did not recognise; with it,
    unknown options are collected instead of refused. Fields in ``hidden`` get no flag, ``extra`` flags are added.
    """

    def run(json_target: str | None, quiet: bool, debug: bool, **given: Any) -> None:
        check_json_target(json_target)
        progress = ConsoleProgress(quiet or json_target == "-")
        values = {name: value for name, value in given.items() if value is not None and value != ()}
        context = click.get_current_context()
        options = (
            build(options_class, values, context.args)
            if build
            else options_class.build(**_parsed(options_class, values))
        )
        module, function = target.split(":")
        try:
            result = getattr(importlib.import_module(module), function)(options, progress)
        except CheckFailed as failure:
            _report(failure.result or {"error": str(failure)}, json_target, quiet, show if failure.result else None)
            raise
        if result is not None:  # a process that helped the first one of a launch has nothing to report
            _report(result, json_target, quiet, show)

    parameters = [*_parameters(options_class, arguments, hidden), *extra, *COMMON]
    settings = {"ignore_unknown_options": True, "allow_extra_args": True} if build else {}
    return click.Command(None, params=parameters, callback=run, help=help, context_settings=settings)


def _report(result: dict[str, Any], json_target: str | None, quiet: bool, show: Callable | None) -> None:
    write_json_result(result, json_target)
    if show and not quiet and json_target != "-":
        show(result)


def _parameters(
    options_class: type[Options], arguments: tuple[str, ...], hidden: tuple[str, ...]
) -> list[click.Parameter]:
    parameters: list[click.Parameter] = [click.Argument([name], metavar=name.upper()) for name in arguments]
    for name, field in options_class.model_fields.items():
        if name not in (*arguments, *hidden):
            parameters.append(_option(name, field))
    return parameters


def _option(name: str, field: FieldInfo) -> click.Option:
    kind = _without_none(field.annotation)
    flag = "--" + name.replace("_", "-")
    declaration = [flag, name]
    if name == "output_dir":
        return click.Option(["-o", flag, name], required=True, metavar="DIR", help="Folder to write; appears whole.")
    if kind is bool:
        return click.Option(
            [f"{flag}/--no-{name.replace('_', '-')}" if field.default else flag, name],
            default=None,
            is_flag=True,
            help=_help(field),
        )
    if get_origin(kind) is list:
        return click.Option(declaration, multiple=True, type=_type(get_args(kind)[0]), help=_help(field))
    if get_origin(kind) is dict:
        return click.Option(declaration, multiple=True, metavar="KEY=VALUE", help=_help(field))
    return click.Option(declaration, type=_type(kind), required=field.is_required(), help=_help(field))


def _help(field: FieldInfo) -> str:
    text = (field.description or "").strip()
    default = field.default
    if field.is_required() or default in (None, False, True, [], {}):
        return text
    shown = ", ".join(default) if isinstance(default, list) and isinstance(default[0], str) else default
    return f"{text}  [default: {shown}]"


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation


def _type(kind: Any) -> click.ParamType | type:
    if get_origin(kind) is Literal:
        return click.Choice([str(choice) for choice in get_args(kind)])
    if kind is Path:
        return click.Path(path_type=Path)
    return kind if kind in (int, float, str) else str


def _parsed(options_class: type[Options], values: dict[str, Any]) -> dict[str, Any]:
    """Tuples of repeated options as the lists and dictionaries that the options class declares."""
    parsed = {}
    for name, value in values.items():
        kind = _without_none(options_class.model_fields[name].annotation)
        if get_origin(kind) is dict:
            # Values declared as text stay text: YAML would read the pattern of NAME=2:4 as a number.
            value = parse_assignments(list(value), text=get_args(kind)[1] is str)
        elif get_origin(kind) is list:
            value = list(value)
        parsed[name] = value
    return parsed
