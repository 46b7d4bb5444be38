"""`--shares`: a steering rule's shares on the command line."""

from __future__ import annotations

from fedpt_secure.config import Shares
from fedpt_secure.errors import ConfigError

SHARES_HELP = "The tuned small LM's own share by place in the text: 0:1,1:0.3 is all of token 0, then 0.3; or none."


def parse_shares(text: str | None) -> Shares | None:
    """`PLACE:SHARE,...` or `none` as pairs; None where the option was not given.

    Raises:
        ConfigError: another form. The numbers themselves are judged with the other settings.
    """
    if text is None:
        return None
    if text.strip() == "none":
        return ()
    try:
        pairs = [entry.split(":") for entry in text.split(",")]
        return tuple((int(place), float(share)) for place, share in pairs)
    except ValueError:
        raise ConfigError(
            f"--shares is {text!r}; it must be PLACE:SHARE,... or none", hint="as in --shares 0:1,1:0.3; see --help"
        ) from None
