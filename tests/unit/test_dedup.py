import random

from megatron_specialm.data.dedup import containment, distinct

WORDS = [f"word{number}" for number in range(2000)]


def _text(seed: int, length: int = 400) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def test_equal_documents_are_kept_once_whatever_their_case_and_spacing() -> None:
    text = _text(0)
    assert distinct([text, _text(1), text.upper(), text.replace(" ", "\n ")]) == [0, 1]


def test_near_duplicates_are_found_and_others_kept() -> None:
    text = _text(0)
    words = text.split()
    words[200:204] = ["something", "else", "stands", "here"]
    halves = " ".join(text.split()[:200]) + " " + " ".join(_text(2).split()[:200])
    assert distinct([text, " ".join(words), halves, _text(3)]) == [0, 2, 3]


def test_the_first_of_two_is_kept_so_order_is_priority() -> None:
    test, train = _text(0), _text(0) + " and a little more"
    assert distinct([test, train]) == [0]
    assert distinct([train, test]) == [0]


def test_short_and_empty_documents() -> None:
    assert distinct(["", "a b", "a  b", "c d", ""]) == [0, 1, 3]


def test_containment_sees_what_no_single_document_holds() -> None:
    words = [f"word{number}" for number in range(200)]
    training = [" ".join(words[start : start + 40]) for start in range(0, 200, 40)]
    fresh = " ".join(f"other{number}" for number in range(50))
    shares = containment(
        [" ".join(words[:40]), " ".join(words[20:120]), f"{fresh} {' '.join(words[:57])}", fresh, ""], training
    )
    assert shares[0] == 1.0
    assert 0.8 < shares[1] < 1.0  # those that lie across the border of two pieces are new
    assert 0.4 < shares[2] < 0.6
    assert shares[3] == shares[4] == 0.0
