"""Lines of UTF-8 text, and what is said about other bytes."""

import io

import pytest

from hf_rskip.errors import UserError
from hf_rskip.lines import decode_lines


def test_only_line_feeds_separate_lines():
    text = "\ufeffone\u2028still one\r\n\x0b\x85\n\nfour"
    assert list(decode_lines(io.BytesIO(text.encode()), "file")) == ["one\u2028still one", "\x0b\x85", "", "four"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("before", ["", "a\n"])
def test_the_place_of_a_wrong_byte(mark, before):
    content = mark + before.encode() + b"stra\xdfe\n"
    with pytest.raises(UserError) as error:
        list(decode_lines(io.BytesIO(content), "file"))
    line = 2 if before else 1
    assert str(error.value) == f"file, line {line} is not UTF-8: byte 0xdf at byte offset {content.index(0xDF)}."
