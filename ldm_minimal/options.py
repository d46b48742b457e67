"""Config dataclasses as command-line options: one place for the default, the type, the help text and the flag.

    width: int = option(160, "channels of a token")       in DiTConfig, added with prefix "dit", is
    --dit-width INT   channels of a token (default: 160)
"""

import argparse
from dataclasses import MISSING, field, fields, replace
from typing import get_args, get_origin, get_type_hints


def option(default, help: str, choices=None):
    """A dataclass field with a help text and, where given, its only allowed values."""
    return field(default=default, metadata={"help": help, "choices": choices})


def _parser_of(kind):
    """The annotation of a field -> what argparse needs to read it: int, float, str, bool, or a tuple of one of them."""
    if get_origin(kind) is tuple:
        return {"type": get_args(kind)[0], "nargs": "+"}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    inner = [a for a in get_args(kind) if a is not type(None)]  # X | None
    return {"type": inner[0] if inner else kind}


def add_options(parser: argparse.ArgumentParser, config_class, prefix: str = "") -> None:
    """One flag for each field made by option(). A flag not given leaves no trace, so that a preset's value stands."""
    hints = get_type_hints(config_class)
    group = parser.add_argument_group(prefix or config_class.__name__)
    for item in fields(config_class):
        if "help" not in item.metadata:
            continue
        name = "-".join(filter(None, [prefix, item.name.replace("_", "-")]))
        reader = _parser_of(hints[item.name])
        shown = item.default if item.default is not MISSING else item.default_factory()
        shown = " ".join(map(str, shown)) if isinstance(shown, tuple) else shown
        if "action" not in reader:
            reader |= {"choices": item.metadata["choices"]}
            if reader["choices"] is None:
                reader["metavar"] = reader["type"].__name__.upper()
        group.add_argument(f"--{name}", dest=f"{prefix}.{item.name}", default=argparse.SUPPRESS,
                           help=f"{item.metadata['help']} (default: {shown})", **reader)


def chosen(config, args: argparse.Namespace, prefix: str = ""):
    """`config` with every flag that was given in its place."""
    given = vars(args)
    names = [item.name for item in fields(config) if f"{prefix}.{item.name}" in given]
    values = {name: given[f"{prefix}.{name}"] for name in names}
    return replace(config, **{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
