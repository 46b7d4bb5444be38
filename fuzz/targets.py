"""All targets by name."""

from __future__ import annotations

from typing import Final

from fuzz import ckks_targets, file_targets, protocol_targets
from fuzz.target import Target

TARGETS: Final[dict[str, Target]] = protocol_targets.TARGETS | ckks_targets.TARGETS | file_targets.TARGETS
