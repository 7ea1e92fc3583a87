"""Where preference pairs come from: raw rows of public data sets, or of the planted world, as canonical pairs."""

from densityrm_core.sources.parsing import Parsed, SourceName, parse_rows
from densityrm_core.sources.reading import FileRead, Folders, SourceRead, files_of, read_source
from densityrm_core.sources.rows import REASONS, SourceError

__all__ = [
    "REASONS",
    "FileRead",
    "Folders",
    "Parsed",
    "SourceError",
    "SourceName",
    "SourceRead",
    "files_of",
    "parse_rows",
    "read_source",
]
