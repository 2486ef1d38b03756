import pytest

from flax_resnet.errors import UserError
from flax_resnet.licenses import LICENSES, License


def test_those_of_the_hub():
    assert len(set(LICENSES)) == len(LICENSES)
    assert all(word == word.lower() and word.split() == [word] for word in LICENSES)
    assert {"apache-2.0", "mit", "bsd-3-clause", "cc-by-nc-4.0", "eupl-1.2"} <= set(LICENSES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("Apache-2.0",), "did you mean 'apache-2.0'"),
        (("bsd3",), "did you mean 'bsd'"),
        (("",), "license '' is not one that the hub knows: expected"),
        (("other",), "expected both with 'other'"),
        (("other", "Mine"), "expected both"),
        (("mit", "Mine"), "and neither without"),
        (("mit", None, "https://x.org"), "and neither without"),
    ],
)
def test_others_are_one_line(given, message):
    with pytest.raises(UserError, match=message):
        License(*given)
    assert License("other", "Mine", "https://x.org").name == "Mine"
