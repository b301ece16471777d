"""Markdown that shows any text as it is."""

from lewis.reports.markdown import block, code, markdown_table, plain


def test_a_table_escapes_what_would_break_it() -> None:
    assert markdown_table([{"a": "x|y", "b": 1}, {"a": "two\nlines"}]) == (
        "| a | b |\n| --- | --- |\n| x\\|y | 1 |\n| two lines |  |"
    )
    assert markdown_table([{"<b>": "<img>", "c": "`<i>`", "d": plain("<u>")}]).splitlines()[::2] == [
        "| \\<b> | c | d |",
        "| \\<img> | `<i>` | \\<u\\> |",
    ]
    assert markdown_table([{"a": "`<i>` <b>", "b": "a`<img>", "c": "``<b>`", "d": "x\r\ny\rz"}]).splitlines()[2:] == [
        "| `<i>` \\<b> | a`\\<img> | ``\\<b>` | x y z |"
    ]
    assert markdown_table([]) == ""


def test_code_and_plain_text() -> None:
    assert code("a`b``c") == "``` a`b``c ```" and code("") == "` `"
    assert block("x", "yaml") == "```yaml\nx\n```" and block("a\n````", "") == "`````\na\n````\n`````"
    assert plain("a_b <c>\nd") == r"a\_b \<c\> d"
