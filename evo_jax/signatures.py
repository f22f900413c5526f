"""Signatures that spell out the options which several functions or constructors share."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def spelled_out(options: type, **defaults: Any) -> Callable[[F], F]:
    """A decorator: `inspect.signature` and `help` show the keys of the TypedDict `options` in place of `**options`.

    `defaults` are those that are not None; inspect.Parameter.empty is that of a required one.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name), annotation=annotation)
            for name, annotation in options.__annotations__.items()
        ]
        cast(Any, function).__signature__ = signature.replace(parameters=[*own, *shared])
        return function

    return decorate
