"""Where documents come from: one class for each kind of source, with its settings, its traits and `read`.

To add a kind, write its class in a file of its own (see `base.BaseSource`) and name it in `Source`.
"""

from typing import Annotated

from pydantic import Field

from turbolm.recipe.sources.datasets import DatasetsSource
from turbolm.recipe.sources.jsonl import JsonlSource
from turbolm.recipe.sources.parquet import ParquetSource
from turbolm.recipe.sources.stdlib import StdlibSource
from turbolm.recipe.sources.text import TextSource

Source = Annotated[
    StdlibSource | TextSource | JsonlSource | ParquetSource | DatasetsSource, Field(discriminator="type")
]
