"""The pages' templates, which lie beside this file."""

from jinja2 import Environment, PackageLoader, StrictUndefined


def template_environment() -> Environment:
    """Escapes what it is given, and fails on a name that it is not given."""
    return Environment(
        loader=PackageLoader("erasediff", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
