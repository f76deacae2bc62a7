from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core.hooks import DataSource
from miles_core.tasks import copy_digits, largest_number


def fields(source: DataSource, start: int, count: int) -> list[tuple[object, ...]]:
    return [(p.id, p.content, p.metadata) for p in source(start, count)]


@pytest.mark.parametrize("task", [copy_digits, largest_number])
@given(start=st.integers(0, 2**40), count=st.integers(0, 20), cut=st.integers(0, 20))
def test_a_position_always_gives_the_same_prompt(task: type, start: int, count: int, cut: int):
    whole = fields(task(seed=3), start, count)
    cut = min(cut, count)
    assert fields(task(seed=3), start, cut) + fields(task(seed=3), start + cut, count - cut) == whole
    assert len({row[0] for row in whole}) == count


@pytest.mark.parametrize("task", [copy_digits, largest_number])
def test_another_seed_gives_other_prompts(task: type):
    assert [p.content for p in task(0)(0, 20)] != [p.content for p in task(1)(0, 20)]


@given(st.integers(0, 5), st.integers(1, 8), st.integers(0, 1000))
def test_copying_digits(seed: int, digits: int, position: int):
    (prompt,) = copy_digits(seed, digits)(position, 1)
    answer = prompt.metadata["answer"]
    assert prompt.content == f"{answer}="
    assert len(answer) == digits and answer.isdigit()


def test_all_digits_are_as_frequent_everywhere():
    answers = [prompt.metadata["answer"] for prompt in copy_digits(0)(0, 4000)]
    for place in range(4):
        counts = Counter(answer[place] for answer in answers)
        assert set(counts) == set("0123456789") and max(counts.values()) < 500


def test_a_copy_of_nothing_is_refused():
    with pytest.raises(ValueError, match="digits=0"):
        copy_digits(0, digits=0)


def test_the_largest_of_four_numbers():
    first = 0
    for prompt in largest_number(1)(0, 1000):
        assert not isinstance(prompt.content, str)
        (message,) = prompt.content
        head, _, tail = message["content"].removeprefix("Which is the largest number: ").partition("? ")
        numbers = [int(number) for number in head.split(", ")]
        assert tail == "Reply with only the number." and message["role"] == "user"
        assert len(numbers) == 4 and all(10 <= number <= 999 for number in numbers)
        assert prompt.metadata == {"answer": str(max(numbers))}
        first += numbers[0] == max(numbers)
    assert 200 < first < 300  # the baseline of always answering with the first


def test_prompts_are_pinned():
    """Runs are resumed with other versions of numpy: these must never change."""
    assert [p.content for p in copy_digits(0)(0, 3)] == ["1743=", "9068=", "1102="]
    (prompt,) = largest_number(0)(10**12, 1)
    assert prompt.content == [
        {"role": "user", "content": "Which is the largest number: 162, 428, 153, 171? Reply with only the number."}
    ]
