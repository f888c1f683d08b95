"""A csv or Parquet file of annotations as Arrow columns, with errors that name the row."""

import csv
from typing import NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from infra.errors import DataError
from infra.filesystems import Folder
from infra.settings import nearest
from preprocessing.annotations import read_annotation_file, short

COLUMNS = ("path", "label", "split", "start", "end", "video_id")
# Control and format characters, line and paragraph separators: what hides in a name or breaks a terminal.
UNPRINTABLE = r"[\p{C}\p{Zl}\p{Zp}]"

_REQUIRED = ("path", "label")
_SECONDS = r"^([0-9]{1,9}(\.[0-9]{1,9})?)?$"
_MAX_SECONDS = 1e9
# Arrow takes a row that is longer than a block for damage.
_BLOCK_BYTES = 4 << 20


class AnnotationTable:
    """The rows of an annotation file.

    Args:
        name: of the file, for messages.
        table: columns of `COLUMNS`, as read.
        data: the csv file's bytes, to find a row's number; None for Parquet.
    """

    def __init__(self, name: str, table: pa.Table, data: bytes | None) -> None:
        self.name = name
        self.names = table.column_names
        self._table = table
        self._data = data

    def texts(self, column: str) -> pa.ChunkedArray:
        """A column as text without unprintable characters; an absent value is "".

        Raises:
            DataError: if the column is of another type, or a value is not printable.
        """
        values = self._table[column]
        kind = values.type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)
        if not (is_text or (column != "path" and (pa.types.is_integer(kind) or pa.types.is_null(kind)))):
            raise DataError(f"{self.name}: column {column} is of type {values.type}; expected text; write it as text")
        try:
            texts = pc.fill_null(values.cast(pa.string()), "")
        except pa.ArrowException as error:
            raise DataError(f"{self.name}: column {column} cannot be read as text: {error}; write it as text") from error
        self.refuse_where(pc.match_substring_regex(texts, UNPRINTABLE), column, "printable text")
        return texts

    def seconds(self, column: str) -> pa.ChunkedArray:
        """A column of seconds as float64; an empty cell, or a column that is not there, is null.

        Raises:
            DataError: if a value is no number from 0 to 1e9.
        """
        expected = "seconds such as 12.5, from 0 to 1e9, or an empty cell"
        if column not in self.names:
            return pa.chunked_array([pa.nulls(self._table.num_rows, pa.float64())])
        values = self._table[column]
        if pa.types.is_large_string(values.type):
            values = values.cast(pa.string())
        if pa.types.is_string(values.type):
            self.refuse_where(pc.invert(pc.match_substring_regex(values, _SECONDS)), column, expected)
            values = pc.if_else(pc.equal(values, ""), None, values)
        try:
            seconds = values.cast(pa.float64())
        except pa.ArrowException as error:
            raise DataError(f"{self.name}: column {column} is of type {values.type}; expected {expected}") from error
        wrong = pc.or_(pc.invert(pc.is_finite(seconds)), pc.or_(pc.less(seconds, 0.0), pc.greater(seconds, _MAX_SECONDS)))
        self.refuse_where(pc.fill_null(wrong, False), column, expected)
        return seconds

    def refuse_where(self, wrong: pa.ChunkedArray, column: str, expected: str) -> None:
        """Raise DataError for the first row in which `wrong` is true."""
        row = pc.index(wrong, True).as_py()
        if row >= 0:
            found = short(self._table[column][row].as_py()) if column in self.names else "too long"
            raise DataError(
                f"{self.name} row {self.row_number(row)}: {column} is {found}; expected {expected}; correct the row"
            )

    def row_number(self, row: int) -> int:
        """The number, from 1, of the line that holds row `row` (from 0) of a csv file; of the row itself for Parquet."""
        if self._data is None:
            return row + 1
        lines = self._data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        return [number for number, line in enumerate(lines, start=1) if line][row + 1]


def read_table(root: Folder, name: str) -> AnnotationTable:
    """Read a csv file (with a header, UTF-8, commas, LF or CRLF) or, if its name ends in ".parquet", a Parquet file.

    Raises:
        DataError: if it cannot be read, a column is missing, unknown or there twice, or there is no row.
    """
    data = read_annotation_file(root, name)
    if name.lower().endswith(".parquet"):
        try:
            table = pq.read_table(pa.BufferReader(data))
            table.validate(full=True)  # text that is not UTF-8 is found here, and nowhere before
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{root}/{name} is no readable Parquet file: {error}; write it again") from error
        _check_columns(name, table.column_names)
        found = AnnotationTable(name, table, None)
    else:
        found = AnnotationTable(name, _parse_csv(name, data), data)
        for column in found.names:  # first of all, since a line break inside a cell would shift the numbers of rows
            found.texts(column)
    if found._table.num_rows == 0:
        raise DataError(f"{name} lists no video; expected a row a video; fill the file")
    return found


def _parse_csv(name: str, data: bytes) -> pa.Table:
    convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(COLUMNS, pa.string()), strings_can_be_null=False)
    read = pyarrow.csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES)
    try:
        table = pyarrow.csv.read_csv(pa.BufferReader(data), read_options=read, convert_options=convert)
        names = table.column_names
    except (pa.ArrowException, UnicodeDecodeError) as error:
        _explain_csv(name, data, error)
    _check_columns(name, names)
    return table


def _explain_csv(name: str, data: bytes, error: Exception) -> NoReturn:
    """Find the row that the fast reader stumbled over."""
    num_columns = 0
    for number, line in enumerate(data.splitlines(), start=1):
        if len(line) >= _BLOCK_BYTES // 2:
            raise DataError(f"{name} row {number} has {len(line)} bytes; expected a video a row; correct the row") from error
        try:
            cells = next(csv.reader([line.decode("utf-8-sig")], strict=True), [])
        except UnicodeDecodeError as wrong:
            raise DataError(f"{name} row {number} is not UTF-8: {wrong.reason}; save the file as UTF-8") from error
        except csv.Error as wrong:
            raise DataError(f"{name} row {number} is {short(line)}: {wrong}; correct the row") from error
        num_columns = num_columns or len(cells)
        if cells and len(cells) != num_columns:
            raise DataError(
                f"{name} row {number} has {len(cells)} cells; expected {num_columns}, as in the header; put text that holds "
                'commas in double quotes ("...")'
            ) from error
    raise DataError(f"{name} is no readable csv file: {error}; save it again as UTF-8 with a header") from error


def _check_columns(name: str, found: list[str]) -> None:
    for column in found:
        if column not in COLUMNS:
            if ";" in column or "\t" in column:
                raise DataError(f"{name} begins with {short(column)}; expected columns that commas separate; save it so")
            raise DataError(f"{name} has the column {short(column)}; {nearest(column[:200], COLUMNS)}; rename or remove it")
        if found.count(column) > 1:
            raise DataError(f"{name} has the column {column} twice; expected it once; remove one")
    missing = [column for column in _REQUIRED if column not in found]
    if missing:
        raise DataError(f"{name} has no column {' and no column '.join(missing)}; found {', '.join(map(short, found))}")
