"""How a setting that the other side cannot express is refused."""

from typing import Any

from moe.errors import ConfigError

Values = dict[str, Any]
"""A family's configuration, as config.json has it."""


def require(condition: bool, what: str) -> None:
    """Raise ConfigError with `what` there is that the other side cannot express, unless the condition holds."""
    if not condition:
        raise ConfigError(what)
