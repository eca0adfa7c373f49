"""The page of `profile` shows the keywords that it takes, which are the fields of its settings."""

from __future__ import annotations

from importlib import import_module
from inspect import Parameter, signature

import griffe

KINDS = {
    Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
    Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
}


class Keywords(griffe.Extension):
    """Functions under `with_keywords` are shown with the signature that they have at run time."""

    def on_function(self, *, func: griffe.Function, **_) -> None:
        if not any(str(each.value).startswith("with_keywords(") for each in func.decorators):
            return
        taken = signature(getattr(import_module(func.module.path), func.name)).parameters
        func.parameters = griffe.Parameters(*map(_shown, taken.values()))


def _shown(one: Parameter) -> griffe.Parameter:
    annotation = None if one.annotation is Parameter.empty else one.annotation
    default = None if one.default is Parameter.empty else repr(one.default)
    return griffe.Parameter(one.name, annotation=annotation, kind=KINDS[one.kind], default=default)
