import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Compiling dominates these tests; what the compiler's optimiser does is not their subject."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
