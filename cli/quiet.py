"""Keep the libraries' own chatter off the terminal; errors still come through as exceptions."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """Switch off progress bars and advice of transformers, datasets and the hub client, and their telemetry."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
