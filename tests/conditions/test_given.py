"""Conditions as users give them: texts, parts, files, arrays; and what is refused."""

import jax
import numpy as np
import pytest
from PIL import Image

from diffjax.conditions import Classes, Images, Several, Tokens, TokenStates, Unconditional
from diffjax.errors import UserError
from diffjax.runs.samples.condition_files import read
from tests.support.phrases import Phrases

PHRASES, DIGITS = Phrases(), Classes(10, tuple("0123456789"))
BOTH = Several({"digit": DIGITS, "text": PHRASES})
KEPT = Several({"digit": DIGITS, "coarse": Images((2, 2, 1))}, kept=("coarse",))
COARSE = np.linspace(-1, 1, 8).reshape(2, 2, 2, 1)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_row_of_texts_names_its_parts_and_what_is_missing_is_null():
    cond = BOTH.parse(
        ["digit=3;text=very dark", 'text="left" ; digit = 4', "text=light", "digit=5"]
    )
    assert cond["digit"].tolist() == [3, 4, 10, 5]
    expected = PHRASES.parse(["very dark", "left", "light", ""])
    assert_equal(cond["text"], expected)
    assert_equal(BOTH.parse([{"digit": 3, "text": "very dark"}]), BOTH.take(cond, [0]))
    assert_equal(BOTH.parse(["digit=7"])["text"], PHRASES.null(1))


def test_a_text_in_quotes_has_semicolons_and_a_text_has_equal_signs():
    class Echo(Classes):
        def parse(self, given):
            seen.extend(given)
            return super().parse([0] * len(given))

    seen: list[str] = []
    several = Several({"prompt": Echo(3)})
    several.parse(['prompt="a; b = c"', "prompt=a = b, c", "prompt=", "prompt='x'"])
    assert seen == ["a; b = c", "a = b, c", "", "'x'"]


def test_parts_are_given_as_lists_and_arrays_by_name():
    cond = KEPT.of({"digit": ["3", 4], "coarse": COARSE})
    assert_equal(cond, {"digit": np.array([3, 4]), "coarse": COARSE.astype("f")})
    assert cond["coarse"].dtype == np.float32
    assert KEPT.of({"coarse": COARSE})["digit"].tolist() == [10, 10]


def test_an_array_of_labels_is_a_list_of_them():
    assert DIGITS.of(np.array([3, 0])).tolist() == [3, 0]
    assert Unconditional().of(np.zeros(2, int)).tolist() == [0, 0]


def test_images_are_files_or_bytes(tmp_path):
    pixels = np.array([[0, 255], [51, 204]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = np.array([[-1, 1], [-0.6, 0.6]], "f")[None, ..., None]
    kind, path = Images((2, 2, 1)), str(tmp_path / "a.png")
    np.testing.assert_allclose(kind.parse([path]), expected, atol=1e-6)
    np.testing.assert_allclose(kind.of(pixels[None, ..., None]), expected, atol=1e-6)
    both = KEPT.parse([f"digit=2;coarse={path}"])
    np.testing.assert_allclose(both["coarse"], expected, atol=1e-6)
    with pytest.raises(UserError, match=r"a\.png has 2x2 pixels, and 4x4 are needed"):
        Images((4, 4, 1)).parse([path])
    with pytest.raises(UserError, match="is no image file that can be read"):
        kind.parse(["there.png"])
    with pytest.raises(UserError, match="no file has images of 2 channels"):
        Images((2, 2, 2)).parse([path])


def test_a_file_has_a_text_in_each_line_or_arrays(tmp_path):
    lines, arrays = tmp_path / "prompts.txt", tmp_path / "made.npz"
    lines.write_text("digit=1;text=dark\n\ndigit=2;text=very light\n")
    cond = BOTH.parse(["digit=1;text=dark", "digit=2;text=very light"])
    assert_equal(read(BOTH, [f"@{lines}"]), cond)
    np.savez(arrays, label=cond["digit"], **PHRASES.arrays(cond["text"]))
    assert_equal(read(BOTH, [f"@{arrays}"]), cond)
    with pytest.raises(UserError, match=r"made\.npz has label, tokens_.*; a condition of images"):
        read(Images((2, 2, 1)), [f"@{arrays}"])
    with pytest.raises(UserError, match=r"can't read conditions from .*: .*No such file"):
        read(BOTH, ["@nowhere.txt"])
    with pytest.raises(UserError, match=r"@a\.txt is a file with all conditions: pass it alone"):
        read(BOTH, ["@a.txt", "digit=3"])
    lines.write_text("\n")
    with pytest.raises(UserError, match=r"prompts\.txt is empty"):
        read(BOTH, [f"@{lines}"])
    with pytest.raises(UserError, match="an empty list describes no sample"):
        read(BOTH, [])


def test_an_empty_list_is_no_sample():
    for kind in (BOTH, KEPT, DIGITS, Unconditional(), Tokens(3, 4)):
        assert_equal(kind.of([]), kind.null(0))


@pytest.mark.parametrize(
    ("condition", "given", "said"),
    [
        (BOTH, ["digit=11"], "no label is called '11'"),
        (Classes(10, tuple("abcdefghij")), ["11"], "this run has 10, from 0 to 9"),
        (BOTH, ["digti=1"], "no part of the condition is called 'digti'; did you mean 'digit'"),
        (BOTH, ["7"], "'7' is to name the parts of the condition, each once: digit=…;text=…"),
        (BOTH, ["digit=1;digit=2"], "each once"),
        (BOTH, ['text="dark; digit=3'], "in double quotes"),
        (BOTH, ["text=drak"], "no word 'drak'; did you mean 'dark'"),
        (BOTH, {}, "an empty dict has no part of the condition"),
        (BOTH, {"digits": [1]}, "no part of the condition is called 'digits'"),
        (BOTH, {"digit": [1, 2], "text": ["dark"]}, r"need an array of shape \(2, 3, 4\)"),
        (BOTH, np.array([1, 2]), r"shapes \{'digit': \(2,\), 'text': Tok.*\}, not \(2,\)"),
        (BOTH, None, "not None"),
        (KEPT, ["digit=3"], "'coarse' .*images of 2×2×1.* is missing in digit, and this net"),
        (KEPT, {"digit": [3]}, "is missing in digit"),
        (KEPT, {"coarse": COARSE[:, :1]}, r"shape \(2, 2, 2, 1\), not \(2, 1, 2, 1\)"),
        (Images((2, 2, 1)), COARSE * np.nan, "values that are not finite"),
        (Images((2, 2, 1)), COARSE.astype(complex), "is of complex128, and should be of float32"),
        (DIGITS, np.array([1.5]), "no label is called 1.5"),
        (DIGITS, np.array([[1]]), r"1 samples need an array of shape \(1,\), not \(1, 1\)"),
        (DIGITS, 3.5, "need an array of shape"),
        (Unconditional(), np.array([3]), "this run has no classes"),
        (
            Tokens(3, 4),
            TokenStates(np.zeros((2, 3, 4)), np.zeros((2, 3)), np.zeros((2, 0))),
            "an array is of float64, and should be of bool",
        ),
        (Tokens(3, 4), ["dark"], "Tokens can't be read from texts, such as 'dark': pass"),
    ],
)  # fmt: skip
def test_what_is_no_condition_is_refused(condition, given, said):
    with pytest.raises(UserError, match=said) as refused:
        condition.of(given)
    assert len(str(refused.value).splitlines()) == 1
