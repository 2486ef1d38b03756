"""What is escaped comes out as it was, by a reader of CommonMark that is not ours."""

import pytest

from flax_resnet import markdown

NASTY = [
    "a|b",
    "<script>alert(1)</script>",
    "[click](javascript:x)",
    "![x](y)",
    "`code`",
    "**bold** _it_ ~~gone~~",
    "a_b_c",
    "&amp; &lt;",
    "http://x.org www.x.org a@x.org",
    "$x$ # head \\ \\n",
]


@pytest.mark.parametrize("text", NASTY)
def test_texts_are_shown_as_they_are(text):
    parser = pytest.importorskip("markdown_it", reason="of gradio and sphinx: needs [docs]")
    reader = parser.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    (inline,) = [t for t in reader.parse(markdown.text(text)) if t.type == "inline"]
    assert {t.type for t in inline.children} <= {"text", "text_special"}
    assert "".join(t.content for t in inline.children) == text
    cells = [t for t in reader.parse(markdown.table([(text, text)])) if t.type == "inline"]
    assert ["".join(c.content for c in t.children) for t in cells] == ["", "", text, text]


def test_escapes():
    assert markdown.text("a|b\nc\t<d>\x1b[0m") == r"a\|b c \<d\>?\[0m"
    assert markdown.text("a_b _c_") == r"a_b \_c\_"
    assert markdown.text("http://x www.y z@w") == r"http\://x www\.y z\@w"


def test_code_does_not_end_its_block():
    assert markdown.fenced("a\nb", "bash") == "```bash\na\nb\n```"
    assert markdown.fenced("x ```\ny", "bash") == "````bash\nx ```\ny\n````"
    assert markdown.fenced("x\x1by", "") == "```\nx?y\n```"
