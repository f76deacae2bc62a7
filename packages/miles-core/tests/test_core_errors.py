import pickle

import pytest

import miles_core
from miles_core import InputError, MilesError


def test_an_input_error_says_setting_value_rule_and_way_out():
    error = InputError("train.steps", -1, "must be positive", "Use 1 or more.")
    assert str(error) == "train.steps = -1: must be positive. Use 1 or more."
    assert isinstance(error, ValueError)


def test_an_input_error_survives_the_trip_between_processes():
    error = pickle.loads(pickle.dumps(InputError("a", "b", "c", "d.")))
    assert (error.setting, error.value, error.rule, error.way_out) == ("a", "b", "c", "d.")
    assert str(error) == "a = 'b': c. d."


@pytest.mark.parametrize("name", [name for name in miles_core.__all__ if name.endswith(("Error", "Died", "Exceeded"))])
def test_every_error_of_the_door_is_a_miles_error_with_an_exit_code(name: str):
    kind = getattr(miles_core, name)
    assert issubclass(kind, MilesError) and kind.exit_code > 0
