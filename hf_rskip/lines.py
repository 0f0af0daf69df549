"""Lines of UTF-8 text."""

from collections.abc import Iterable, Iterator

from .errors import UserError


def decode_lines(file: Iterable[bytes], name: str) -> Iterator[str]:
    """Yields the lines of a binary file without their ends; a [`UserError`] about other bytes names the file `name`.

    Only a line feed ends a line, and carriage returns before it go with it: text mode and `str.splitlines` also break
    at other characters, such as U+2028, any of which inside a sentence would shift every later line.
    """
    offset = 0
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}, line {number} is not UTF-8: byte 0x{line[error.start]:02x} at byte offset "
                f"{offset + error.start:,}."
            ) from None
        offset += len(line)
        yield (text.removeprefix("\ufeff") if number == 1 else text).rstrip("\r\n")
