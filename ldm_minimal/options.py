"""Config dataclasses as command-line options: one place for the default, the type, the help text and the flag.

    width: int = option(128, "channels of a token")       in DiTConfig, added with prefix "dit", is
    --dit-width INT   channels of a token (default: 128)
"""

import argparse
from dataclasses import field, fields, replace
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
    return {"type": kind}


def add_options(parser: argparse.ArgumentParser, config, prefix: str = "", title: str | None = None) -> None:
    """One flag for each field of the instance `config` made by option(); its value is the default that is shown.

    A flag not given leaves no trace in the namespace, so that the value of whichever preset was chosen stands.
    """
    hints = get_type_hints(type(config))
    group = parser.add_argument_group(title or prefix or "options of the run")
    for item in fields(config):
        if "help" not in item.metadata:
            continue
        reader, value = _parser_of(hints[item.name]), getattr(config, item.name)
        if "action" not in reader:
            reader["choices"] = item.metadata["choices"]
            if reader["choices"] is None:
                reader["metavar"] = reader["type"].__name__.upper()
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        name = f"{prefix}.{item.name}"
        group.add_argument(flag(name), dest=name, default=argparse.SUPPRESS,
                           help=f"{item.metadata['help']} (default: {shown})", **reader)


def flag(name: str) -> str:
    """An argument's name as it is typed: vae.latent_channels -> --vae-latent-channels, .seed -> --seed."""
    return "--" + name.lstrip(".").replace(".", "-").replace("_", "-")


def chosen(config, args: argparse.Namespace, prefix: str = ""):
    """`config` with every flag that was given in its place."""
    given = vars(args)
    names = [item.name for item in fields(config) if f"{prefix}.{item.name}" in given]
    values = {name: given[f"{prefix}.{name}"] for name in names}
    return replace(config, **{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
