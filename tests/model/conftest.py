import jax
import pytest


@pytest.fixture(autouse=True)
def float64():
    """The model's tests compute in float64, so that tolerances can be tight."""
    with jax.enable_x64(True):
        yield
