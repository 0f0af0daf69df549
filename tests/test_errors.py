"""What is quoted of the errors of other packages."""

from hf_rskip.errors import first_line


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\nno such file.\nTry another one.")) == "no such file"
    assert first_line(RuntimeError("Sizes differ:\n\t2 and 3")) == "Sizes differ"
    assert first_line(OSError()) == "OSError"
